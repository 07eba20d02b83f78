"""Server optimizers that update every parameter separately."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from lightning_fedscale.server.base import ServerOptimizer, own_state
from lightning_fedscale.types import Params

Moments: TypeAlias = dict[str, Tensor]


def per_parameter(
    name: str,
    init: Callable[[Tensor], Moments],
    update: Callable[[Tensor, Moments], tuple[Tensor, Moments]],
    reads_params: bool = True,
) -> ServerOptimizer:
    """Build a server optimizer from the rule for a single parameter.

    The state is stored by parameter name: a frozen parameter loses its state, and an unfrozen one gets a new state.

    Args:
        name: name of the rule, stored in its state.
        init: returns the state of a parameter like this tensor, as tensors like it.
        update: ``(delta, state) -> (step, state)`` of one parameter; must not change its arguments.
        reads_params: whether ``init`` reads the values of the tensor; if not, these are zeros, which take no memory.

    Example:
        >>> import torch
        >>> def late(delta, state):
        ...     return state["delta"], {"delta": delta}
        >>> last = per_parameter("last", lambda like: {"delta": 0 * like}, late)
        >>> params = {"w": torch.tensor([1.0])}
        >>> step, state = last.update({"w": torch.tensor([5.0])}, last.init(params), params)
        >>> last.update({"w": torch.tensor([6.0])}, state, params)[0]["w"].tolist()
        [5.0]
    """
    return ServerOptimizer(
        partial(_init, name=name, init=init),
        partial(_update, name=name, init=init, update=update),
        reads_params=reads_params,
    )


def _init(params: Params, *, name: str, init: Callable[[Tensor], Moments]) -> dict[str, Any]:
    return {"optimizer": name, "moments": {parameter: init(value) for parameter, value in params.items()}}


def _update(
    delta: Params,
    state: Any,
    params: Params,
    *,
    name: str,
    init: Callable[[Tensor], Moments],
    update: Callable[[Tensor, Moments], tuple[Tensor, Moments]],
) -> tuple[Params, dict[str, Any]]:
    kept = own_state(state, name)["moments"]
    results = {
        parameter: update(delta[parameter], kept[parameter] if parameter in kept else init(value))
        for parameter, value in params.items()
    }
    moments = {parameter: moments for parameter, (_, moments) in results.items()}
    return {parameter: step for parameter, (step, _) in results.items()}, {"optimizer": name, "moments": moments}
