"""The shape of a server optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning_fedscale.types import Params


class ServerOptimizer(NamedTuple):
    """A pair of pure functions over the trainable parameters, in float64; buffers are averaged apart from it.

    Attributes:
        init: the state before the first round; tensors and primitives in dicts and lists, nothing else.
        update: ``(delta, state, params) -> (step, state)``; the server then *subtracts* the step. With
            ``reads_norms``, ``(delta, state, params, mean_square)``.
        reads_norms: whether ``update`` also takes the weighted mean of the clients' squared norms,
            ``sum_k p_k |delta_k|^2``.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]
    reads_norms: bool = False


def follows_scale(rule: ServerOptimizer) -> bool:
    """Whether a rule's steps become twice as long when all deltas do; those of adaptive rules hardly change.

    Found out with three steps of a single parameter.

    Example:
        >>> from lightning_fedscale.server import fed_avg, from_torch
        >>> follows_scale(fed_avg(lr=0.5)), follows_scale(from_torch(torch.optim.Adam, lr=0.1))
        (True, False)
    """

    def steps(factor: float) -> list[float]:
        params = {"parameter": torch.ones(1, dtype=torch.float64)}
        state, taken = rule.init(params), []
        for value in (0.5, -0.25, 1.0):
            step, state = rule.update(
                {"parameter": torch.full((1,), factor * value, dtype=torch.float64)}, state, params
            )
            taken.append(float(step["parameter"]))
        return taken

    return all(abs(b - 2 * a) <= 1e-6 * abs(b) for a, b in zip(steps(1.0), steps(2.0), strict=True))
