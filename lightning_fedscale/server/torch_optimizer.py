"""Any torch optimizer as the server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.types import Params


def from_torch(optimizer: Callable[..., Optimizer], **options: Any) -> ServerOptimizer:
    """Feed the aggregated delta to a torch optimizer as its gradient.

    Since ``delta = server - client``, the optimizer subtracts, as it always does: ``from_torch(SGD, lr=1.0)`` is
    FedAvg, ``from_torch(SGD, lr=0.7, momentum=0.9, nesterov=True)`` with clients that keep their optimizer is DiLoCo
    (arXiv 2311.08105).

    Args:
        optimizer: a class of ``torch.optim`` or another with the same interface whose ``step`` needs no closure.
        options: its arguments.

    Raises:
        TypeError: if ``optimizer`` cannot be called with parameters and these options (by the optimizer itself).

    Example:
        >>> import torch
        >>> server = from_torch(torch.optim.SGD, lr=1.0, momentum=0.5)
        >>> params, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.25])}
        >>> step, state = server.update(delta, server.init(params), params)
        >>> step, state = server.update(delta, state, params)
        >>> step["w"].tolist()
        [0.375]
    """
    return ServerOptimizer(
        partial(_init, optimizer=optimizer, options=options), partial(_update, optimizer=optimizer, options=options)
    )


def _build(params: Params, optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    copies = [value.detach().clone().requires_grad_() for value in params.values()]
    return copies, optimizer(copies, **options)


def _init(params: Params, *, optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> Any:
    return _build(params, optimizer, options)[1].state_dict()


def _update(
    delta: Params, state: Any, params: Params, *, optimizer: Callable[..., Optimizer], options: dict[str, Any]
) -> tuple[Params, Any]:
    copies, server = _build(params, optimizer, options)
    # `load_state_dict` keeps references and `step` works in place: without the copy the old state would change.
    server.load_state_dict(copy.deepcopy(state))
    for value, name in zip(copies, params, strict=True):
        value.grad = delta[name].detach()
    server.step()
    moved = zip(params.items(), copies, strict=True)
    return {name: before - after.detach() for (name, before), after in moved}, server.state_dict()
