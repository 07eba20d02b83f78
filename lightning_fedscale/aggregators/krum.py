"""Rules that select the updates that are closest together: Krum and Multi-Krum."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.rows import needing
from lightning_fedscale.aggregators.stacked import Stack, stacked
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def krum(attackers: int) -> Aggregator:
    r"""Take the single update that is closest to its neighbours (Blanchard et al., NeurIPS 2017, arXiv 1703.02757).

    Of :math:`n` updates with :math:`f` attackers, an update's score is the sum of squared distances to its
    :math:`n - f - 2` closest others; the lowest score is selected, for equal scores the client with the lower number.
    Distances are over trainable parameters; buffers are taken from the same client.

    **It tolerates** ``attackers`` **of at least** ``2 * attackers + 3`` **clients.** All count the same, whatever their
    number of samples.

    Args:
        attackers: maximum number of hostile clients in a round.

    Raises:
        TypeError: if ``attackers`` is not an integer.
        ValueError: if it is negative; a cohort that is too small is found at the beginning of a round.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(krum(attackers=1), torch.tensor([[1.0], [1.5], [1.75], [2.5], [-50.0]])).tolist()
        [1.5]
    """
    return _krum(attackers, 1, f"krum(attackers={attackers})")


@record_call
def multi_krum(attackers: int, keep: int) -> Aggregator:
    """Average the updates with the lowest scores of `krum` (Blanchard et al., 2017, section 4).

    ``keep=1`` is Krum. The paper's experiments keep all updates but ``attackers``, which stays closest to the mean.

    **It tolerates** ``attackers`` **of at least** ``2 * attackers + 3`` **clients**, if ``keep`` is at most the number
    of honest ones. All count the same, whatever their number of samples.

    Args:
        attackers: maximum number of hostile clients in a round.
        keep: number of updates in the mean.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if it is too small; a cohort that is too small is found at the beginning of a round.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(multi_krum(attackers=1, keep=2), torch.tensor([[1.0], [1.5], [1.75], [2.5], [-50.0]])).tolist()
        [1.625]
    """
    checks.integer("keep", keep, meaning="the number of updates to average")
    return _krum(attackers, keep, f"multi_krum(attackers={attackers}, keep={keep})")


def _krum(attackers: int, keep: int, name: str) -> Aggregator:
    checks.integer("attackers", attackers, minimum=0, meaning="the number of clients of a round that may be hostile")
    rule = stacked(mean("uniform").weigh, partial(_read, attackers=attackers, keep=keep))
    return needing(rule, max(2 * attackers + 3, attackers + keep), name)


def _read(stack: Stack, cohort: Cohort, *, attackers: int, keep: int) -> Tensor:
    best = scores(stack.deltas[:, : stack.trainable], attackers).argsort(stable=True)[:keep]
    return stack.deltas[best.sort().values].mean(dim=0)


def scores(rows: Tensor, attackers: int) -> Tensor:
    """Return Krum's score of every row: the sum of squared distances to its closest others."""
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square_()
    # A distance that overflows is infinite, never NaN, since updates are finite. A row is not its own neighbour.
    squares.fill_diagonal_(torch.inf)
    # Use at least one neighbour: updates that are not finite are left out, so there may be fewer than clients.
    neighbours = max(1, len(rows) - attackers - 2)
    return squares.sort(dim=1).values[:, :neighbours].sum(dim=1)
