"""The interface of a server optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import Arguments


class ServerOptimizer(NamedTuple):
    """A pair of pure functions over the trainable parameters, in float64; buffers are averaged separately.

    Attributes:
        init: returns the state before the first round, of tensors and primitives in dicts and lists only.
        update: ``(delta, state, params) -> (step, state)``; the server then *subtracts* the step. With
            ``reads_norms``, ``(delta, state, params, mean_square)``.
        reads_norms: whether ``update`` also takes the weighted mean of the clients' squared norms,
            ``sum_k p_k |delta_k|^2``.
        call: the call that made it, such as ``fed_adam(lr=0.01)``; for logs only.
        arguments: the arguments of that call; for logs only.
        reads_params: whether it reads the values of ``params``; if not, these are zeros, which take no memory.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]
    reads_norms: bool = False
    call: str = ""
    arguments: Mapping[str, Any] = Arguments()
    reads_params: bool = True


def own_state(state: Any, name: str) -> dict[str, Any]:
    """Return ``state`` if it belongs to the rule of this name.

    Raises:
        ValueError: if it belongs to another rule.
    """
    if (saved := state.get("optimizer")) != name:
        raise ValueError(
            f"server_optimizer={name}: the checkpoint has the state of {saved or 'another rule'}: resume with the"
            " server optimizer of the checkpoint, or start a new run without ckpt_path."
        )
    kept: dict[str, Any] = state
    return kept


def follows_scale(rule: ServerOptimizer) -> bool:
    """Return whether a rule's steps double if all deltas double; those of adaptive rules hardly change.

    It is tested with three steps of a single parameter, which is zero so that weight decay does not matter.

    Example:
        >>> from lightning_fedscale.server import fed_avg, from_torch
        >>> follows_scale(fed_avg(lr=0.5)), follows_scale(from_torch(torch.optim.Adam, lr=0.1))
        (True, False)
    """
    deltas = (0.5, -0.25, 1.0)
    single, double = _steps(rule, 0.0, *deltas), _steps(rule, 0.0, *(2 * delta for delta in deltas))
    return all(abs(b - 2 * a) <= 1e-6 * abs(b) for a, b in zip(single, double, strict=True))


def own_decay(rule: ServerOptimizer) -> float:
    """Return the share of a parameter that every step subtracts for any delta: decoupled weight decay.

    It is 0 for rules without weight decay and for those that add it to the delta, where it is processed like the delta.
    It is tested with two steps.

    Example:
        >>> from lightning_fedscale.server import from_torch
        >>> own_decay(from_torch(torch.optim.AdamW, lr=0.5, weight_decay=0.25))
        0.125
        >>> own_decay(from_torch(torch.optim.Adam, lr=0.5, weight_decay=0.25))
        0.0
    """
    (of_one,), (of_two,) = _steps(rule, 1.0, 0.0), _steps(rule, 2.0, 0.0)
    return of_one if abs(of_two - 2 * of_one) <= 1e-6 * abs(of_two) else 0.0


def _steps(rule: ServerOptimizer, value: float, *deltas: float) -> list[float]:
    """Return a rule's steps for a parameter of this constant value."""
    params = {"parameter": torch.full((1,), value, dtype=torch.float64)}
    state, taken = rule.init(params), []
    for delta in deltas:
        # All clients agree, so their norms equal that of their mean.
        norms = (delta**2,) if rule.reads_norms else ()
        step, state = rule.update({"parameter": torch.full((1,), delta, dtype=torch.float64)}, state, params, *norms)
        taken.append(float(step["parameter"]))
    return taken
