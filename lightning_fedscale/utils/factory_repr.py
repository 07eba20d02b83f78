"""Record the call that made a rule (a tuple of functions), for logs and sweeps."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def told(factory: Callable[P, R]) -> Callable[P, R]:
    """Decorate a factory so that its products store their call in the field ``call``.

    Example:
        >>> import torch
        >>> from lightning_fedscale.server import fed_adam, from_torch
        >>> fed_adam(lr=0.1, tau=1e-4).call
        'fed_adam(lr=0.1, beta1=0.9, beta2=0.99, tau=0.0001)'
        >>> from_torch(torch.optim.SGD, lr=0.7).call
        'from_torch(optimizer=SGD, lr=0.7)'
    """

    @wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        made: Any = factory(*args, **kwargs)
        told_by: R = made._replace(call=_call(factory, args, kwargs))
        return told_by

    return make


def numbers_in(call: str) -> dict[str, float]:
    """Return the keyword arguments of a call that are numbers; other text has none.

    Example:
        >>> numbers_in("DirichletPartitioner(num_partitions=100, alpha=0.3, label='speaker')")
        {'num_partitions': 100, 'alpha': 0.3}
        >>> numbers_in("<function mine at 0x7f>")
        {}
    """
    try:
        tree = ast.parse(call, mode="eval").body
    except SyntaxError:
        return {}
    if not isinstance(tree, ast.Call):
        return {}
    found: dict[str, float] = {}
    for each in tree.keywords:
        value = each.value.value if isinstance(each.value, ast.Constant) else None
        if each.arg is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[each.arg] = value
    return found


def _call(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parameters = signature(factory).parameters
    bound = signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    shown: list[str] = []
    for name, value in bound.arguments.items():
        kind = parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            shown += map(_shown, value)
        elif kind is Parameter.VAR_KEYWORD:
            shown += (f"{each}={_shown(of)}" for each, of in value.items())
        else:
            shown.append(f"{name}={_shown(value)}")
    return f"{factory.__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(call := getattr(value, "call", None), str) and call:
        return call
    function = getattr(value, "func", value)  # the function of a partial
    if (name := getattr(function, "__name__", None)) is not None:
        return str(name)
    # A repr with an address would differ in every run.
    return type(value).__name__ if (written := repr(value)).startswith("<") else written
