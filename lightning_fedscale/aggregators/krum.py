"""Rules that trust the updates which lie closest together: Krum and Multi-Krum."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.rows import needing
from lightning_fedscale.aggregators.stacked import Stack, stacked
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils.factory_repr import told


@told
def krum(attackers: int) -> Aggregator:
    r"""The one update that is closest to its neighbours (Blanchard et al., NeurIPS 2017, arXiv 1703.02757).

    An update's score is the sum of squared distances to its :math:`n - f - 2` closest others, of :math:`n` updates
    with :math:`f` attackers among them; the lowest score wins, of equal ones the client with the lower number.
    Distances are over trainable parameters, the winner's buffers come with it.

    **Bears** ``attackers`` **of at least** ``2 * attackers + 3`` **clients.** All count the same, however many samples
    they hold.

    Args:
        attackers: most clients of a round that may be hostile.

    Raises:
        TypeError: if ``attackers`` is no integer.
        ValueError: if it is negative; a cohort that is too small is found at the beginning of a round.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(krum(attackers=1), torch.tensor([[1.0], [1.5], [1.75], [2.5], [-50.0]])).tolist()
        [1.5]
    """
    return _krum(attackers, 1, f"krum(attackers={attackers})")


@told
def multi_krum(attackers: int, keep: int) -> Aggregator:
    """The mean of the updates with the lowest scores of `krum` (Blanchard et al., 2017, section 4).

    ``keep=1`` is Krum. The paper's experiments keep all but the attackers' number, which loses least to the plain mean.

    **Bears** ``attackers`` **of at least** ``2 * attackers + 3`` **clients**, as long as ``keep`` is no more than the
    honest ones. All count the same, however many samples they hold.

    Args:
        attackers: most clients of a round that may be hostile.
        keep: number of updates in the mean.

    Raises:
        TypeError: if a number is no integer.
        ValueError: if it is too small; a cohort that is too small is found at the beginning of a round.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(multi_krum(attackers=1, keep=2), torch.tensor([[1.0], [1.5], [1.75], [2.5], [-50.0]])).tolist()
        [1.625]
    """
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"keep={keep!r}: pass the number of updates to average, an integer of at least 1.")
    if keep < 1:
        raise ValueError(f"keep={keep}: pass the number of updates to average, at least 1.")
    return _krum(attackers, keep, f"multi_krum(attackers={attackers}, keep={keep})")


def _krum(attackers: int, keep: int, name: str) -> Aggregator:
    if isinstance(attackers, bool) or not isinstance(attackers, int):
        raise TypeError(f"attackers={attackers!r}: pass the number of clients of a round that may be hostile.")
    if attackers < 0:
        raise ValueError(f"attackers={attackers}: pass the number of clients of a round that may be hostile.")
    rule = stacked(mean("uniform").weigh, partial(_read, attackers=attackers, keep=keep))
    return needing(rule, max(2 * attackers + 3, attackers + keep), name)


def _read(stack: Stack, cohort: Cohort, *, attackers: int, keep: int) -> Tensor:
    best = scores(stack.deltas[:, : stack.trainable], attackers).argsort(stable=True)[:keep]
    return stack.deltas[best.sort().values].mean(dim=0)


def scores(rows: Tensor, attackers: int) -> Tensor:
    """Krum's score of every row: the sum of squared distances to its closest others."""
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square_()
    # A distance that overflows is infinite, never NaN: updates are finite. A row is no neighbour of its own.
    squares.fill_diagonal_(torch.inf)
    # At least one neighbour: there may be fewer updates than clients, since those that are not finite are left out.
    neighbours = max(1, len(rows) - attackers - 2)
    return squares.sort(dim=1).values[:, :neighbours].sum(dim=1)
