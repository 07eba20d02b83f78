"""Clipping around the previous aggregate: the only rule here that keeps a state between rounds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.rows import distances_to
from lightning_fedscale.aggregators.stacked import Stack, stacked
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def centered_clipping(radius: float, iterations: int = 1) -> Aggregator:
    r"""Clip updates to a ball around the previous aggregate (Karimireddy, He and Jaggi, arXiv 2012.10333).

    .. math:: v \leftarrow v + \frac{1}{n} \sum_{k=1}^{n} (\Delta_k - v) \min\Big(1, \frac{\tau}{\lVert \Delta_k - v
        \rVert}\Big)

    :math:`v` starts from the aggregate of the round before (in the first round from zero), takes ``iterations`` of
    these steps over the round's :math:`n` clients, and is then this round's aggregate. It is part of checkpoints. The
    norm is over trainable parameters. Buffers take the clients' mean, weighted by the last factors ``min(1, ...)``.

    **Bounds the harm of attackers**: each client moves the aggregate by at most ``iterations * radius / n`` in a round,
    and the next round starts where honest clients have pulled it. The paper's bounds assume that clients send momenta:
    let clients keep their optimizer (``client_optimizer="keep"``, SGD with momentum). All clients count the same,
    however many samples they hold.

    Args:
        radius: the paper's :math:`\tau`, in the units of the parameters: the longest distance to the previous aggregate
            at which an update counts in full. The usual distance of an update from the mean is a start:
            ``RoundRecord.drift * RoundRecord.delta_norm`` of a run without attackers.
        iterations: steps of the formula in a round, at least 1; the paper uses 1.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if ``radius`` is not above 0, or ``iterations`` is below 1.

    Example:
        >>> from lightning_fedscale.aggregators import aggregate
        >>> rows = torch.tensor([[3.0], [3.0], [3.0], [-1e9]])  # the last one is hostile, the mean lies at -2.5e8
        >>> aggregate(centered_clipping(radius=2.0), rows).tolist()  # (2 + 2 + 2 - 2) / 4
        [1.0]
        >>> aggregate(centered_clipping(radius=2.0, iterations=2), rows).tolist()  # 1 + (2 + 2 + 2 - 2) / 4
        [2.0]
    """
    checks.positive("radius", radius)
    checks.integer("iterations", iterations)
    read = partial(_read, radius=radius, iterations=iterations)
    return stacked(mean("uniform").weigh, read, _zero)


def _zero(like: Tensor, cohort: Cohort) -> Tensor:
    return torch.zeros_like(like[: cohort.trainable])


def _read(stack: Stack, cohort: Cohort, center: Tensor, *, radius: float, iterations: int) -> tuple[Tensor, Tensor]:
    rows, buffers = stack.deltas[:, : stack.trainable], stack.deltas[:, stack.trainable :]
    for _ in range(iterations):
        # Never quite zero, so that the factors have a sum, however far away all clients are.
        factors = (radius / distances_to(center, rows)).clamp(torch.finfo(rows.dtype).tiny, 1.0)
        center = center + (factors @ rows - factors.sum() * center) / len(rows)
    return torch.cat([center, factors @ buffers / factors.sum()]), center
