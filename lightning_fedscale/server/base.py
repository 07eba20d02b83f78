"""The shape of a server optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_fedscale.types import Params


class ServerOptimizer(NamedTuple):
    """A pair of pure functions over the trainable parameters, in float64; buffers are averaged apart from it.

    Attributes:
        init: the state before the first round; tensors and primitives in dicts and lists, nothing else.
        update: ``(delta, state, params) -> (step, state)``; the server then *subtracts* the step.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params], tuple[Params, Any]]
