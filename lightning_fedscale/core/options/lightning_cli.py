"""Parts in the configuration files of LightningCLI: ``class_path`` may name the function that makes one.

jsonargparse does so by itself where a part is an object of a class. Rules that are tuples of functions it takes for
structures whose fields are to be given; here they are registered as what their factories make.

    server_optimizer:
      class_path: lightning_fedscale.server.fed_adam
      init_args: {lr: 0.03}
"""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.local_rules import LocalRule
from lightning_fedscale.phases import Detector
from lightning_fedscale.scaling import Law
from lightning_fedscale.server import ServerOptimizer

KINDS: tuple[type[Any], ...] = (Aggregator, Compressor, Detector, LocalRule, ServerOptimizer)


def _remembering(kind: type[Any], given: dict[str, Any]) -> type[Any]:
    """The same kind of tuple, whose class knows how it was given, so that configurations can be saved.

    The class, since jsonargparse makes new tuples of the values of those that it is given.
    """

    def reduced(part: Any) -> tuple[Any, ...]:
        return made_by_path, (kind, given)

    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "given": given, "__reduce__": reduced})


def register() -> None:
    """Let jsonargparse make parts by the path of their factories, and laws, which are dataclasses, by their classes."""
    set_parsing_settings(subclasses_enabled=[Law])
    for kind in KINDS:
        register_type(
            kind,
            partial(_given, kind),
            partial(made_by_path, kind),
            type_check=lambda value, kind: isinstance(value, kind),
        )


def made_by_path(kind: type[Any], given: Any) -> Any:
    """What a function makes that a configuration names.

    Args:
        kind: what it must make.
        given: ``class_path``, ``init_args``, which are checked against the function's types, and ``dict_kwargs`` for
            what it takes besides; parts of parts are given in the same way, and several in a list.

    Raises:
        ValueError: if there is no such function, it makes something else, or its arguments are wrong.

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
            f"{given!r}: pass the class_path of a function that makes a {kind.__name__}, and its init_args."
        )
    path = given["class_path"]
    made = _call(_function(path), path, kind, dict(given.get("init_args") or {}), given.get("dict_kwargs") or {})
    if not isinstance(made, kind):
        raise ValueError(f"class_path={path!r} makes a {type(made).__name__}, not a {kind.__name__}.")
    return _remembering(kind, dict(given))(*made)


def _given(kind: type[Any], value: Any) -> Any:
    """How a part was given; what was made in Python is shown as it is."""
    return getattr(value, "given", None) or f"<{kind.__name__}>"


def _function(path: str) -> Callable[..., Any]:
    where, _, name = str(path).rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(where), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"class_path={path!r}: cannot be imported ({error}); pass package.module.name.") from None
    if not callable(found):
        raise ValueError(f"class_path={path!r}: is no function.")
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
