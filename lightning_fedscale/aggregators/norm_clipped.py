"""Clip the norm of every client's update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def norm_clipped(max_norm: float, inner: Aggregator | None = None) -> Aggregator:
    r"""Apply any rule to updates that are clipped to norm :math:`S` (Sun et al., arXiv 1911.07963).

    .. math:: \Delta_k \leftarrow \Delta_k \min(1, S / \lVert \Delta_k \rVert)

    Only the trainable part is measured and clipped; buffers stay unchanged.

    **By itself it tolerates no attackers, but it bounds their harm**: under the mean, attackers with a share ``p`` of
    the weight move the result by at most ``p * max_norm``. If ``inner`` tolerates attackers, both hold.

    Args:
        max_norm: largest norm, in the units of the parameters; start with the median of ``RoundRecord.delta_norms``.
        inner: the rule for clipped updates; the default is the mean by samples.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``max_norm`` is not above 0.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(norm_clipped(1.0), torch.tensor([[0.5, 0.0], [0.0, 4096.0]])).tolist()
        [0.25, 0.5]
    """
    checks.number("max_norm", max_norm, "pass the largest norm of a client's update, above 0.", lambda norm: norm > 0)
    rule = mean() if inner is None else inner
    if not isinstance(rule, Aggregator):
        raise TypeError(f"inner={inner!r}: pass an aggregators.Aggregator such as aggregators.median(), or None.")
    return rule._replace(accumulate=partial(_accumulate, inner=rule.accumulate, max_norm=max_norm))


def _accumulate(
    total: Tensor,
    update: ClientUpdate,
    weight: float,
    cohort: Cohort,
    *,
    inner: Callable[[Tensor, ClientUpdate, float, Cohort], Tensor],
    max_norm: float,
) -> Tensor:
    if update.norm > max_norm:
        delta = update.delta.clone()  # others may read the client's original update
        delta[: cohort.trainable] *= max_norm / update.norm
        update = update._replace(delta=delta, norm=max_norm)
    return inner(total, update, weight, cohort)
