"""Any torch optimizer as the server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.server.base import ServerOptimizer, own_state
from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def from_torch(optimizer: Callable[..., Optimizer], **options: Any) -> ServerOptimizer:
    """Feed the aggregated delta to a torch optimizer as its gradient.

    Since ``delta = server - client``, the optimizer subtracts as usual: ``from_torch(SGD, lr=1.0)`` is FedAvg, and
    ``from_torch(SGD, lr=0.7, momentum=0.9, nesterov=True)`` with clients that keep their optimizer is DiLoCo (arXiv
    2311.08105). The state is stored by parameter name: a frozen parameter loses its state, and an unfrozen one starts
    without state.

    Args:
        optimizer: a class of ``torch.optim``, or another one with the same interface whose ``step`` needs no closure.
        options: arguments of the optimizer. Pass ``lr``: torch's defaults are for gradients, not for deltas.

    Raises:
        TypeError: if ``optimizer`` cannot be called with parameters and these options, or ``step`` needs a closure.
        ValueError: if it rejects the options' values.

    Example:
        >>> import torch
        >>> server = from_torch(torch.optim.SGD, lr=1.0, momentum=0.5)
        >>> params, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.25])}
        >>> step, state = server.update(delta, server.init(params), params)
        >>> step, state = server.update(delta, state, params)
        >>> step["w"].tolist()
        [0.375]
    """
    rule = ServerOptimizer(
        partial(_init, optimizer=optimizer, options=options), partial(_update, optimizer=optimizer, options=options)
    )
    probe = {"probe": torch.zeros(1, 1, dtype=torch.float64)}
    try:
        rule.update(probe, rule.init(probe), probe)
    except Exception as error:
        given = ", ".join([_name(optimizer), *(f"{k}={v!r}" for k, v in options.items())])
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"from_torch({given}) fails ({error}): pass a class such as torch.optim.SGD, whose step needs no closure,"
            " and its arguments."
        ) from error
    return rule


def _build(params: Params, optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    copies = [value.detach().clone().requires_grad_() for value in params.values()]
    return copies, optimizer(copies, **options)


def _init(params: Params, *, optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> Any:
    return _state(_build(params, optimizer, options)[1], params, optimizer)


def _state(server: Optimizer, params: Params, optimizer: Callable[..., Optimizer]) -> dict[str, Any]:
    return {"optimizer": _name(optimizer), "names": list(params), **server.state_dict()}


def _update(
    delta: Params, state: Any, params: Params, *, optimizer: Callable[..., Optimizer], options: dict[str, Any]
) -> tuple[Params, Any]:
    state = own_state(state, _name(optimizer))
    copies, server = _build(params, optimizer, options)
    # `load_state_dict` keeps references and `step` works in place, so without a copy the old state would change.
    server.load_state_dict(_renumbered(copy.deepcopy(state), params, fresh=server.state_dict()))
    for value, name in zip(copies, params, strict=True):
        value.grad = delta[name].detach()
    server.step()
    moved = zip(params.items(), copies, strict=True)
    step = {name: before - after.detach() for (name, before), after in moved}
    return step, _state(server, params, optimizer)


def _renumbered(state: dict[str, Any], params: Params, *, fresh: dict[str, Any]) -> dict[str, Any]:
    """Renumber ``state`` for these parameters: torch indexes them by number, which freezing and unfreezing changes."""
    kept = {name: state["state"][i] for i, name in enumerate(state["names"]) if i in state["state"]}
    of_kept = {i: kept[name] for i, name in enumerate(params) if name in kept}
    (group,), (now,) = state["param_groups"], fresh["param_groups"]
    return {"state": {**fresh["state"], **of_kept}, "param_groups": [{**group, "params": now["params"]}]}


def _name(optimizer: Callable[..., Optimizer]) -> str:
    name: str = getattr(optimizer, "__name__", type(optimizer).__name__)
    return name
