"""The contents of objects of each type: how to read and how to restore them."""

from __future__ import annotations

import array
import collections
import contextvars
import datetime
import decimal
import enum
import functools
import logging
import os
import pathlib
import random
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedscale.core.user_code.values import ArrayValue, Closed, GeneratorState, TensorValue

_PACKAGES = {
    *sys.stdlib_module_names, "torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric",
    "lightning_utilities", "lightning_fedscale", "numpy", "omegaconf",
}  # fmt: skip
# Types that cannot change, or whose contents are not the module's; metrics have their own states.
_FIXED = (
    enum.Enum, re.Pattern, range, slice, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    decimal.Decimal, torch.layout, torch.memory_format, np.dtype, np.ufunc, types.CodeType, types.ModuleType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.ClassMethodDescriptorType, types.MethodWrapperType, types.GenericAlias, types.UnionType, logging.Logger,
    type(collections.namedtuple("_", "name").name),  # type: ignore[attr-defined]
)  # fmt: skip
# Internal attributes of torch and Lightning. "training", submodules and hooks count as the user's.
_NOT_THE_USERS = (vars(pl.LightningModule()).keys() | {"log"}) - {"training"}
_STRUCTURE = {"_modules"} | {n for n in vars(nn.Module()) if "_hooks" in n and "state_dict" not in n}
_OF_CLASSES = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__orig_bases__", "__parameters__",
    "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__annotate__", "__slots__",
    "__annotate_func__", "__annotations_cache__", "__dataclass_fields__", "__dataclass_params__", "__match_args__",
}  # fmt: skip
_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__")
_CACHES = {"_flags_cache"}  # of OmegaConf, written when a value is read


def _numbered(held: list[Any]) -> list[str]:
    return [f"[{i}]" for i in range(len(held))]


class Part(NamedTuple):
    """One kind of contents of objects of a type, such as attributes or items.

    Attributes:
        read: returns the contents as a dict by name or as a list, or as any other value that is compared directly.
        write: restores the contents that were read.
        names: returns the names of the entries of a list, given the list.
        valued: whether ``read`` also takes whether to read large values, and how many bytes may be copied.
    """

    read: Callable[..., Any]
    write: Callable[[Any, Any], object]
    names: Callable[[list[Any]], list[str]] = _numbered
    valued: bool = False


def is_library(module: Any) -> bool:
    """Return whether a Python module, by its dotted name, is of Python, torch, Lightning, numpy or this package."""
    return isinstance(module, str) and module.partition(".")[0] in _PACKAGES


_INSTALLED = tuple({sysconfig.get_path(kind) + os.sep for kind in ("purelib", "platlib")})


def is_installed(module: Any) -> bool:
    """Return whether a Python module, by its dotted name, is part of an installed package or of a library."""
    if is_library(module):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) if isinstance(module, str) else None
    return isinstance(file, str) and file.startswith(_INSTALLED)


def parts_of(value: Any) -> tuple[Part, ...] | None:
    """Return the kinds of contents of an object: empty if it cannot change, None if they are unknown."""
    kind: Any = type(value)
    if kind is types.ModuleType:
        return () if is_library(value.__name__) else None
    parts = parts_of_type(kind)
    return () if parts == (_CLASS,) and is_library(value.__module__) else parts


@functools.lru_cache(4096)
def parts_of_type(kind: Any) -> tuple[Part, ...] | None:
    """Return the kinds of contents of a type's instances; see `parts_of`."""
    if issubclass(kind, type):
        return (_CLASS,)
    if issubclass(kind, (Metric, *_FIXED)):
        return ()
    if issubclass(kind, Tensor):
        return (_TENSOR,)
    if issubclass(kind, nn.Module):
        return _with_class(kind, (_IDENTITY, _MODULE, TENSORS))
    package = str(kind.__module__).partition(".")[0]
    if package == "lightning_fedscale":
        return ()
    special = next((part for base, part in _SPECIAL.items() if issubclass(kind, base)), None)
    if special is None and package in ("lightning", "pytorch_lightning", "lightning_fabric"):
        return None
    slots = [slot for base in kind.__mro__ for slot in _slots_of(base)]
    parts = [] if special is None else [special]
    if kind.__dictoffset__:
        parts.append(_ATTRIBUTES)
    if slots:
        parts.append(_slot_part(slots))
    if special is None:
        size = object.__basicsize__ + 8 * (len(slots) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0))
        if kind.__basicsize__ > size or kind.__itemsize__:
            return None  # the test of `object.__reduce__` for contents that Python cannot see
    return _with_class(kind, tuple(parts))


def _with_class(kind: type, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return parts if is_library(kind.__module__) else (*parts, _OWN_CLASS)


# ---- attributes


def _read_attributes(value: Any) -> dict[str, Any]:
    held = {name: v for name, v in vars(value).items() if name not in _CACHES}
    if type(value).__module__.startswith("omegaconf") and re.search(r"\$\{[\w.]+:", str(held.get("_val"))):
        raise Closed  # a resolver may read anything
    return held


def _write_attributes(value: Any, held: dict[str, Any], others: Callable[[str], bool] = _CACHES.__contains__) -> None:
    now = vars(value)
    mine = [(name, v) for name, v in now.items() if not others(name)]
    if len(mine) != len(held) or any(
        one[0] != two[0] or one[1] is not two[1] for one, two in zip(mine, held.items(), strict=True)
    ):
        kept = {name: v for name, v in now.items() if others(name)}
        now.clear()
        now.update(kept)
        now.update(held)


def _read_module(value: Any) -> dict[str, Any]:
    return {n: v for n, v in vars(value).items() if n not in _NOT_THE_USERS or (v and n in _STRUCTURE)}


def _write_module(value: Any, held: dict[str, Any]) -> None:
    _write_attributes(value, {n: v for n, v in held.items() if n not in _STRUCTURE}, _NOT_THE_USERS.__contains__)
    for name in _STRUCTURE - held.keys():
        if vars(value).get(name):
            vars(value)[name].clear()


def _write_tensors(value: Any, held: dict[str, Any]) -> None:
    groups = value._parameters, value._buffers
    for group in groups:
        for name in list(group):
            if name not in held:
                del group[name]
            elif group[name] is not held[name]:
                group[name] = held[name]
    for name in held.keys() - value._parameters.keys() - value._buffers.keys():
        groups[not isinstance(held[name], nn.Parameter)][name] = held[name]


def _read_class(value: Any) -> dict[str, Any]:
    held = {name: v for name, v in vars(value).items() if name not in _OF_CLASSES}
    held["__bases__"] = value.__bases__
    return held


def _write_class(value: Any, held: dict[str, Any]) -> None:
    for name in [name for name in vars(value) if name not in _OF_CLASSES and name not in held]:
        type.__delattr__(value, name)
    for name, v in held.items():
        if name != "__bases__" and vars(value).get(name, held) is not v:
            type.__setattr__(value, name, v)


def _slots_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the slots that a Python class adds to its instances."""
    names = vars(kind).get("__slots__", ())
    for name in [names] if isinstance(names, str) else names:
        mangled = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        slot = vars(kind).get(mangled)
        if isinstance(slot, types.MemberDescriptorType):
            yield name, slot


def _slot_part(slots: list[tuple[str, Any]]) -> Part:
    def read(value: Any) -> dict[str, Any]:
        held = {}
        for name, slot in slots:
            with suppress(AttributeError):
                held[name] = slot.__get__(value)
        return held

    def write(value: Any, held: dict[str, Any]) -> None:
        for name, slot in slots:
            if name in held:
                slot.__set__(value, held[name])
            else:
                with suppress(AttributeError):
                    slot.__delete__(value)

    return Part(read, write)


# ---- containers


def _write_list(value: Any, held: list[Any]) -> None:
    if len(value) != len(held) or any(one is not two for one, two in zip(value, held, strict=True)):
        list.__setitem__(value, slice(None), held)


def _write_deque(value: Any, held: list[Any]) -> None:
    collections.deque.clear(value)
    collections.deque.extend(value, held)


def _base_of(value: Any) -> Any:
    return collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict


def _read_dict(value: Any) -> list[Any]:
    base = _base_of(value)
    return [*base.values(value), *base.keys(value), getattr(value, "default_factory", None)]


def _write_dict(value: Any, held: list[Any]) -> None:
    now, base = _read_dict(value), _base_of(value)
    if len(now) != len(held) or any(one is not two for one, two in zip(now, held, strict=True)):
        base.clear(value)
        half = len(held) // 2
        for key, v in zip(held[half:-1], held[:half], strict=True):
            base.__setitem__(value, key, v)


def _names_in_dict(held: list[Any]) -> list[str]:
    half = len(held) // 2
    names = [key if isinstance(key, str) else f"[{key!r}]" for key in held[half:-1]]
    return [*names, *(f"key {i}" for i in range(half)), "default_factory"]


def _read_set(value: Any) -> Any:
    return frozenset(value) if {type(v) for v in value} <= {int, str} else list(value)


def _write_set(value: Any, held: Any) -> None:
    if isinstance(value, set) and (len(value) != len(held) or any(v not in value for v in held)):
        set.clear(value)
        set.update(value, held)


def _nothing(value: Any, held: Any) -> None:
    """Do nothing, since the contents cannot change."""


# ---- functions


def _read_function(value: Any) -> dict[str, Any]:
    cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
    return {**cells, **{name: getattr(value, name) for name in _OF_FUNCTIONS}}


def _write_function(value: Any, held: dict[str, Any]) -> None:
    for name in _OF_FUNCTIONS:
        if getattr(value, name) is not held[name]:
            setattr(value, name, held[name])


def _read_cell(value: Any) -> list[Any]:
    try:
        return [value.cell_contents]
    except ValueError:
        return []


def _write_cell(value: Any, held: list[Any]) -> None:
    if held:
        value.cell_contents = held[0]
    else:
        with suppress(ValueError):
            del value.cell_contents


def _read_context(value: Any) -> list[Any]:
    try:
        return [value.get()]
    except LookupError:
        return []


def _write_context(value: Any, held: list[Any]) -> None:
    if held and value.get() is not held[0]:
        value.set(held[0])


def _write_array(value: Any, held: Any) -> None:
    value[:] = array.array(*held)


def _read_builtin(value: Any) -> list[Any]:
    return [] if isinstance(value.__self__, types.ModuleType) else [value.__self__]


# ---- the kinds of contents by type

_TENSOR = Part(TensorValue, lambda value, held: held.write(value), valued=True)
_ATTRIBUTES = Part(_read_attributes, _write_attributes)
_IDENTITY = Part(id, _nothing)
_MODULE = Part(_read_module, _write_module)
TENSORS = Part(lambda module: {**module._parameters, **module._buffers}, _write_tensors)
_CLASS = Part(_read_class, _write_class)
_OWN_CLASS = Part(lambda value: {"__class__": type(value)}, _nothing)
_SPECIAL: dict[Any, Part] = {
    np.ndarray: Part(ArrayValue, lambda value, held: held.write(value), valued=True),
    np.generic: Part(lambda value: (value.dtype.str, value.tobytes()), _nothing),
    dict: Part(_read_dict, _write_dict, _names_in_dict),
    types.MappingProxyType: Part(lambda value: [*value.values(), *value.keys(), None], _nothing, _names_in_dict),
    list: Part(list, _write_list),
    tuple: Part(list, _nothing),
    (set, frozenset): Part(_read_set, _write_set),
    collections.deque: Part(list, _write_deque),
    bytearray: Part(bytes, lambda value, held: value.__setitem__(slice(None), held)),
    pathlib.PurePath: Part(str, _nothing),
    **{base: Part(base.__repr__, _nothing) for base in (str, bytes, int, float, complex)},
    types.FunctionType: Part(_read_function, _write_function),
    types.MethodType: Part(lambda value: {"__self__": value.__self__, "__func__": value.__func__}, _nothing),
    types.BuiltinFunctionType: Part(_read_builtin, _nothing),
    threading.local: _ATTRIBUTES,
    contextvars.ContextVar: Part(_read_context, _write_context, lambda held: [""]),
    array.array: Part(lambda value: (value.typecode, value.tobytes()), _write_array),
    types.CellType: Part(_read_cell, _write_cell, lambda held: [""]),
    functools.partial: Part(lambda value: [value.func, value.args, value.keywords], _nothing),
    property: Part(lambda value: [value.fget, value.fset, value.fdel], _nothing),
    (staticmethod, classmethod): Part(lambda value: [value.__func__], _nothing),
    weakref.ReferenceType: Part(lambda value: [value()], _nothing),
    torch.Generator: Part(
        lambda value: value.get_state().numpy().tobytes(),
        lambda value, held: value.set_state(torch.frombuffer(bytearray(held), dtype=torch.uint8)),
    ),
    random.Random: Part(random.Random.getstate, random.Random.setstate),
    np.random.RandomState: Part(
        lambda value: GeneratorState(value.get_state(legacy=False)), lambda value, held: value.set_state(held.state)
    ),
    np.random.Generator: Part(lambda value: [value.bit_generator], _nothing),
    np.random.BitGenerator: Part(
        lambda value: GeneratorState(value.state), lambda value, held: setattr(value, "state", held.state)
    ),
}
