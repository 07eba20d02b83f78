"""A chain of server optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_fedscale.server.base import ServerOptimizer, own_state
from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def chain(*rules: ServerOptimizer) -> ServerOptimizer:
    """Apply rules in sequence: the step of each is the delta of the next, and the last step moves the global model.

    Args:
        rules: the rules in order, at least one. One that reads the clients' norms (`fed_exp`) can only be the first,
            since these are the norms of the clients' own deltas.

    Raises:
        TypeError: if one of them is not a server optimizer.
        ValueError: if there are none, or if one that reads norms is not the first.

    Example:
        >>> import torch
        >>> from lightning_fedscale.server import scale, trace
        >>> slow, params = chain(trace(0.9), scale(0.5)), {"w": torch.tensor([1.0])}
        >>> slow.update({"w": torch.tensor([2.0])}, slow.init(params), params)[0]["w"].tolist()
        [1.0]
    """
    if not rules:
        raise ValueError("chain(): pass at least one server optimizer, chain(scale_by_adam(), scale(0.01)).")
    for i, rule in enumerate(rules):
        if not isinstance(rule, ServerOptimizer):
            raise TypeError(f"chain: argument {i} is {rule!r}: pass a server optimizer, such as server.scale(0.1).")
        if rule.reads_norms and i:
            raise ValueError(
                f"chain: argument {i} reads the norms of the clients' deltas, which the rules before it change: pass it"
                " first."
            )
    return ServerOptimizer(
        partial(_init, rules=rules),
        partial(_update, rules=rules),
        reads_norms=rules[0].reads_norms,
        reads_params=any(rule.reads_params for rule in rules),
    )


def _init(params: Params, *, rules: tuple[ServerOptimizer, ...]) -> dict[str, Any]:
    return {"optimizer": _name(rules), "links": [rule.init(params) for rule in rules]}


def _update(
    delta: Params, state: Any, params: Params, *norms: float, rules: tuple[ServerOptimizer, ...]
) -> tuple[Params, dict[str, Any]]:
    links = own_state(state, _name(rules))["links"]
    step, first = rules[0].update(delta, links[0], params, *norms)
    states = [first]
    for rule, link in zip(rules[1:], links[1:], strict=True):
        step, after = rule.update(step, link, params)
        states.append(after)
    return step, {"optimizer": _name(rules), "links": states}


def _name(rules: tuple[ServerOptimizer, ...]) -> str:
    return f"chain of {len(rules)}"
