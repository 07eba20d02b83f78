"""Options in the configuration files of LightningCLI: ``class_path`` may name the factory function of an option.

jsonargparse supports this only for options that are objects of classes. For rules that are tuples of functions it would
require the fields, so these are registered here as the results of their factories.

    server_optimizer:
      class_path: lightning_fedscale.server.fed_adam
      init_args: {lr: 0.03}
"""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.local_rules import LocalRule
from lightning_fedscale.phases import Detector
from lightning_fedscale.server import ServerOptimizer

KINDS: tuple[type[Any], ...] = (Aggregator, Compressor, Detector, LocalRule, ServerOptimizer)


def _remembering(kind: type[Any], given: dict[str, Any]) -> type[Any]:
    """Return a subclass of the tuple that stores its configuration, so that configurations can be saved.

    The class stores it because jsonargparse makes new tuples from the values of given ones.
    """

    def reduced(part: Any) -> tuple[Any, ...]:
        return made_by_path, (kind, given)

    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "given": given, "__reduce__": reduced})


@cache
def register() -> None:
    """Let jsonargparse make options by the paths of their factories; `lightning_fedscale.scaling` registers laws."""
    for kind in KINDS:
        register_type(
            kind,
            partial(_given, kind),
            partial(made_by_path, kind),
            type_check=lambda value, kind: isinstance(value, kind),
        )


def made_by_path(kind: type[Any], given: Any) -> Any:
    """Return the result of the function that a configuration names.

    Args:
        kind: the required type of the result.
        given: ``class_path``; ``init_args``, which are checked against the function's types; and ``dict_kwargs`` for
            further arguments. Nested options are given in the same way, several of them in a list.

    Raises:
        ValueError: if there is no such function, its result has another type, or its arguments are invalid.

    Example:
        >>> from lightning_fedscale.compressors import Compressor
        >>> sparse = {"class_path": "lightning_fedscale.compressors.top_k", "init_args": {"ratio": 0.1}}
        >>> feedback = {"class_path": "lightning_fedscale.compressors.error_feedback"}
        >>> made_by_path(Compressor, {**feedback, "init_args": {"compressor": sparse}}).name
        'error_feedback(top_k(0.1))'
    """
    given = given.as_dict() if isinstance(given, Namespace) else given
    if not isinstance(given, Mapping) or "class_path" not in given:
        raise ValueError(
            f"{given!r}: pass the class_path of a function that returns a {kind.__name__}, and its init_args."
        )
    path = given["class_path"]
    made = _call(_function(path), path, kind, dict(given.get("init_args") or {}), given.get("dict_kwargs") or {})
    if not isinstance(made, kind):
        raise ValueError(
            f"class_path={path!r} returns a {type(made).__name__}: pass a function that returns a {kind.__name__}."
        )
    return _remembering(kind, dict(given))(*made)


def _given(kind: type[Any], value: Any) -> Any:
    """Return the configuration of an option, or a placeholder if the option was made in Python."""
    return getattr(value, "given", None) or f"<{kind.__name__}>"


def _function(path: str) -> Callable[..., Any]:
    where, _, name = str(path).rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(where), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"class_path={path!r} cannot be imported ({error}): pass package.module.name.") from None
    if not callable(found):
        raise ValueError(f"class_path={path!r} is not a function: pass package.module.name of one.")
    return found


def _call(
    function: Callable[..., Any], path: str, kind: type[Any], given: dict[str, Any], more: Mapping[str, Any]
) -> Any:
    parameters = inspect.signature(function).parameters.values()
    several = [
        made_by_path(kind, each) for p in parameters if p.kind is p.VAR_POSITIONAL for each in given.pop(p.name, ())
    ]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, fail_untyped=False)
    try:
        arguments = parser.instantiate(parser.parse_object(given))
    except ArgumentError as error:
        raise ValueError(f"init_args of {path}: {error}") from None
    return function(*several, **arguments.as_dict(), **more)
