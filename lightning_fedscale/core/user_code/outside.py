"""The global variables that code names, and so may read and write outside of its module."""

from __future__ import annotations

import builtins
import dis
import functools
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_fedscale.core.user_code.objects import is_installed, is_library
from lightning_fedscale.core.user_code.snapshot import Snapshot
from lightning_fedscale.core.user_code.variables import Place, is_fixed

Code = tuple[types.CodeType, dict[str, Any]]
"""A piece of code and its global variables."""
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM"}


class Names(NamedTuple):
    """The names in a piece of code.

    Attributes:
        variables: global variables.
        attributes: attributes of any object.
        imports: Python modules that it imports itself.
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]


@functools.lru_cache(1 << 14)
def names_in(code: types.CodeType) -> Names:
    """Return the names in a piece of code and in the functions that are defined in it.

    Example:
        >>> sorted(names_in((lambda x: sorted(x.items())).__code__).attributes)
        ['items']
    """
    found = [(instruction.opname, instruction.argval) for instruction in dis.get_instructions(code)]
    own = Names(
        frozenset(name for kind, name in found if kind in _GLOBAL),
        frozenset(name for kind, name in found if kind in _ATTRIBUTE),
        frozenset(name for kind, name in found if kind == "IMPORT_NAME"),
    )
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return Names(*(frozenset().union(*each) for each in zip(own, *inner, strict=True)))


def resolved(codes: Collection[Code]) -> tuple[list[Place], list[types.ModuleType]]:
    """Return the global variables that pieces of code name, also in other Python modules, and these modules.

    Any piece may get a module from another one, so all attributes that any piece names are looked up in each module.
    """
    places: dict[tuple[int, str], Place] = {}
    pending: list[Any] = []
    attributes: set[str] = set()
    for code, variables in codes:
        names = names_in(code)
        attributes |= names.attributes
        pending += map(sys.modules.get, sorted(names.imports))
        for name in sorted(names.variables):
            places[id(variables), name] = Place(variables, name)
            pending.append(variables.get(name))
    modules: dict[int, types.ModuleType] = {}
    for module in pending:
        if isinstance(module, types.ModuleType) and id(module) not in modules:
            modules[id(module)] = module
            for name in sorted(attributes & vars(module).keys()):
                places[id(vars(module)), name] = Place(vars(module), name)
                pending.append(vars(module)[name])
    return list(places.values()), list(modules.values())


def places_of(module: nn.Module) -> list[Place]:
    """Return the global variables named by a module's methods and by the user's functions that these call.

    In installed packages, whose layers the module may use, only the methods of the module and its submodules count, not
    the functions that they call: these may be a whole package, with thousands of variables. Variables reached through
    ``globals()`` or by computed names are not found.

    Args:
        module: the user's module.
    """
    codes: dict[tuple[types.CodeType, int], Code] = {}
    places: list[Place] = []
    while True:
        values = [value for place in places if not is_fixed(value := place.value)]
        roots: Mapping[str, Any] = {"": module, **{str(i): value for i, value in enumerate(values)}}
        known, is_left_out = len(codes), is_installed if places else is_library
        for function in Snapshot(roots, module, most=0).functions():
            if not is_left_out(function.__module__):
                code = function.__code__, function.__globals__
                codes.setdefault((code[0], id(code[1])), code)
        if len(codes) == known:
            return places
        places = [place for place in resolved(codes.values())[0] if _is_the_users(place)]


def _is_the_users(place: Place) -> bool:
    missing = place.name not in place.variables
    return not (is_library(place.variables.get("__name__")) or (missing and hasattr(builtins, place.name)))
