"""The server of FedAvg."""

from __future__ import annotations

import math
import numbers
from functools import partial

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.types import Params


def fed_avg(lr: float = 1.0) -> ServerOptimizer:
    r"""Move by the aggregated delta: :math:`x \leftarrow x - \eta\,\Delta` (arXiv 1602.05629, 2003.00295).

    With ``lr=1`` and the weighted mean the new global model is the weighted mean of the client models.

    Args:
        lr: server learning rate, > 0.

    Raises:
        TypeError: if ``lr`` is not a number.
        ValueError: if ``lr`` is not positive and finite.

    Example:
        >>> import torch
        >>> server = fed_avg(lr=0.5)
        >>> params, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> step, state = server.update(delta, server.init(params), params)
        >>> step["w"].tolist()
        [1.0]
    """
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real):
        raise TypeError(f"lr={lr!r}: pass a positive number, 1.0 is plain FedAvg.")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} must be positive and finite: 1.0 is plain FedAvg.")
    return ServerOptimizer(_init, partial(_update, lr=lr))


def _init(params: Params) -> dict[str, object]:
    return {}


def _update(delta: Params, state: dict[str, object], params: Params, *, lr: float) -> tuple[Params, dict[str, object]]:
    return ({name: lr * value for name, value in delta.items()} if lr != 1 else delta), state
