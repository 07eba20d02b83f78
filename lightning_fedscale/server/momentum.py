"""Momentum on the server."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.server.per_parameter import Moments, per_parameter
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def trace(momentum: float = 0.9, nesterov: bool = False) -> ServerOptimizer:
    r"""Heavy-ball momentum, :math:`v \leftarrow \beta v + \Delta`: step by :math:`v`, or :math:`\Delta + \beta v`.

    It is a link of `chain`; with a learning rate it is `fed_avgm`.

    Args:
        momentum: :math:`\beta`, in [0, 1).
        nesterov: whether to step by :math:`\Delta + \beta v`.

    Raises:
        TypeError: if ``momentum`` is not a number.
        ValueError: if it is out of range.

    Example:
        >>> rule, params = trace(0.5), {"w": torch.tensor([1.0])}
        >>> _, state = rule.update({"w": torch.tensor([4.0])}, rule.init(params), params)
        >>> rule.update({"w": torch.tensor([1.0])}, state, params)[0]["w"].tolist()
        [3.0]
    """
    decay = checks.in_interval("momentum", momentum, 0.0, 1.0, closed_end=False)
    return per_parameter("trace", _init, partial(_update, decay=decay, nesterov=bool(nesterov)), reads_params=False)


def _init(like: Tensor) -> Moments:
    return {"velocity": torch.zeros_like(like)}


def _update(delta: Tensor, state: Moments, *, decay: float, nesterov: bool) -> tuple[Tensor, Moments]:
    velocity = decay * state["velocity"] + delta
    return delta + decay * velocity if nesterov else velocity, {"velocity": velocity}
