"""No client moves the model by more than a given length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import told


@told
def norm_clipped(max_norm: float, inner: Aggregator | None = None) -> Aggregator:
    r"""Any rule over updates that are not longer than :math:`S` (Sun et al., arXiv 1911.07963).

    .. math:: \Delta_k \leftarrow \Delta_k \min(1, S / \lVert \Delta_k \rVert)

    The norm is that of the trainable part, which is what gets shorter; buffers stay.

    **Bears no number of attackers by itself, but bounds their harm**: under the mean, attackers with a share ``p`` of
    the weight move the result by at most ``p * max_norm``, from wherever the honest ones put it. With a robust rule
    inside, both hold.

    Args:
        max_norm: longest norm, in the units of the parameters; the median of ``RoundRecord.delta_norms`` is a start.
        inner: the rule over clipped updates; the mean by samples if not given.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if ``max_norm`` is not above 0.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(norm_clipped(1.0), torch.tensor([[0.5, 0.0], [0.0, 4096.0]])).tolist()
        [0.25, 0.5]
    """
    checks.number("max_norm", max_norm, "pass the longest norm of a client's update, above 0.", lambda norm: norm > 0)
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
        delta = update.delta.clone()  # others may look at what the client sent
        delta[: cohort.trainable] *= max_norm / update.norm
        update = update._replace(delta=delta, norm=max_norm)
    return inner(total, update, weight, cohort)
