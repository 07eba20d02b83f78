"""Record the call that made a rule (a tuple of functions), for logs and sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"told": "record_call"})

P = ParamSpec("P")
R = TypeVar("R")


class Arguments(dict[str, Any]):
    """Arguments by name; the hash of their names lets the tuples that hold them stay keys of dicts.

    Example:
        >>> hash(Arguments(lr=0.1)) == hash(Arguments(lr=0.1))
        True
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))


def record_call(factory: Callable[P, R]) -> Callable[P, R]:
    """Decorate a factory so that its products have its arguments, and its call as text: fields ``arguments``, ``call``.

    A product without a field ``call`` gets the arguments only. Iterators and views of dicts are passed on as tuples,
    since they can be read only once, or neither copied nor pickled.

    Example:
        >>> import torch
        >>> from lightning_fedscale.server import fed_adam, from_torch
        >>> fed_adam(lr=0.1, tau=1e-4).arguments
        {'lr': 0.1, 'beta1': 0.9, 'beta2': 0.99, 'tau': 0.0001}
        >>> from_torch(torch.optim.SGD, lr=0.7).call
        'from_torch(optimizer=SGD, lr=0.7)'
    """

    @wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        given, named = tuple(map(_lasting, args)), {name: _lasting(value) for name, value in kwargs.items()}
        made: Any = factory(*given, **named)
        arguments = _bound(factory, given, named)
        text = {"call": _text(factory, arguments)} if "call" in made._fields else {}
        recorded: R = made._replace(arguments=arguments, **text)
        return recorded

    return make


def numbers_of(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Return the arguments that are finite numbers, as Python's own.

    Example:
        >>> numbers_of({"levels": 100, "alpha": 0.3, "partition_by": "speaker", "shuffle": True, "cap": math.inf})
        {'levels': 100, 'alpha': 0.3}
    """
    real = {n: v for n, v in arguments.items() if isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v)}
    return {name: int(value) if isinstance(value, Integral) else float(value) for name, value in real.items()}


def _lasting(value: Any) -> Any:
    return tuple(value) if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)) else value


def _bound(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a call by name, with defaults and those of ``**kwargs``."""
    parameters, bound = signature(factory).parameters, signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = Arguments()
    for name, value in bound.arguments.items():
        arguments |= value if parameters[name].kind is Parameter.VAR_KEYWORD else {name: value}
    return arguments


def _text(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    parameters = signature(factory).parameters
    shown: list[str] = []
    for name, value in arguments.items():
        if name in parameters and parameters[name].kind is Parameter.VAR_POSITIONAL:
            shown += map(_shown, value)
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
