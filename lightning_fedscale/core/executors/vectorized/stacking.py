"""Stacking of several clients' batches into one: they are opened, compared, stacked, and rebuilt in their own types."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import types
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

_ATOMS = frozenset((
    type(None), bool, int, float, complex, str, bytes, range, type, types.FunctionType, torch.dtype, torch.device,
    torch.Size, torch.layout, decimal.Decimal, fractions.Fraction, datetime.date, datetime.datetime, datetime.time,
    datetime.timedelta, uuid.UUID,
))  # fmt: skip
_KINDS_OF_ATOMS = (enum.Enum, np.generic, np.dtype, pathlib.PurePath)
_HEAP_TYPE = 1 << 9  # of `type.__flags__`: a class made at run time, usually by Python's ``class``
_OWN = (dict, collections.OrderedDict, collections.defaultdict, list, tuple, collections.deque)
_BARE = (object, types.SimpleNamespace)  # only attributes
_Build = Callable[[Sequence[Tensor], dict[int, Any]], Any]


class NotVectorizable(RuntimeError):
    """Raised with the reason why clients of this module cannot be vectorized."""


class Opened(NamedTuple):
    """A batch taken apart.

    Attributes:
        tensors: the tensors in it, each once.
        signature: the types, keys and nesting of everything, and shape, type and device of the tensors; it is hashable.
        rest: the values other than tensors, each with its place in the batch.
        close: rebuilds the batch, in its own types, with other tensors.
    """

    tensors: list[Tensor]
    signature: Any
    rest: list[tuple[str, Any]]
    close: Callable[[Sequence[Tensor]], Any]

    def guard(self) -> Any:
        """Return everything besides the tensors' values on which a step may depend; None if it cannot be compared."""
        guard = self.signature, tuple((type(value), _comparable(value)) for _, value in self.rest)
        try:
            hash(guard)
        except TypeError:
            return None
        return guard


def opened(batch: Any) -> Opened:
    """Take a batch apart.

    A batch may hold tensors, numbers, strings and the like; dicts, lists, tuples, named tuples, dataclasses, mappings
    and other objects with attributes, including subclasses; and types that are registered with torch's pytree. An
    object that appears twice in a batch appears twice in the rebuilt one.

    Raises:
        NotVectorizable: if it holds anything else.

    Example:
        >>> batch = opened({"x": torch.zeros(2, 3), "name": "a"})
        >>> batch.close([torch.ones(1)])
        {'x': tensor([1.]), 'name': 'a'}
    """
    kind = type(batch)
    if (kind is list or kind is tuple) and batch and _all_plain(batch):
        # A fast path for the usual batch, with the same result, since there may be one for each client and step.
        signatures = [(tensor.shape, tensor.dtype, tensor.device) for tensor in batch]
        return Opened(list(batch), (kind, repr(None), *signatures), [], kind)
    opening = _Opening()
    build, signature = opening.open(batch, "batch")
    return Opened(opening.tensors, signature, opening.rest, lambda tensors: build(tensors, {}))


def stacked(batches: Sequence[Opened]) -> Opened:
    """Stack batches of one signature along a new first dimension of every tensor.

    Raises:
        NotVectorizable: if they differ in a value that is not a tensor.
    """
    first, *others = batches
    for other in others:
        for (place, mine), (_, theirs) in zip(first.rest, other.rest, strict=True):
            if not _same(mine, theirs):
                raise NotVectorizable(
                    f"{place} is not a tensor and differs between clients ({mine!r:.40} and {theirs!r:.40})"
                )
    columns = zip(*(batch.tensors for batch in batches), strict=True)
    return first._replace(tensors=[torch.stack(column) for column in columns])


def _all_plain(batch: Sequence[Any]) -> bool:
    """Return whether all are distinct plain tensors, without attributes or gradients."""
    for value in batch:
        if type(value) is not Tensor or value.layout is not torch.strided or value.requires_grad or vars(value):
            return False
    return len({*map(id, batch)}) == len(batch)


class _Opening:
    """Collects the tensors and other values of a batch while walking through it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.rest: list[tuple[str, Any]] = []
        self._met: dict[int, tuple[_Build, Any]] = {}  # with the object itself, so that its id stays unique
        self._within: set[int] = set()

    def open(self, value: Any, place: str) -> tuple[_Build, Any]:
        """Return a function that rebuilds the value, and its signature."""
        if _is_atom(value):
            self.rest.append((place, value))
            return lambda tensors, made: value, type(value)
        key = id(value)
        if key in self._met:
            return self._met[key][0], ("again", list(self._met).index(key))
        if key in self._within:
            raise NotVectorizable(f"{place} contains itself")
        self._within.add(key)
        build, signature = self._open_tensor(value, place) if isinstance(value, Tensor) else self._open(value, place)

        def once(tensors: Sequence[Tensor], made: dict[int, Any]) -> Any:
            if key not in made:
                made[key] = build(tensors, made)
            return made[key]

        self._met[key] = once, value
        return once, signature

    def _open_tensor(self, value: Tensor, place: str) -> tuple[_Build, Any]:
        if type(value) is not Tensor or vars(value):
            kind = "tensor with attributes" if type(value) is Tensor else f"{type(value).__name__}, not a plain tensor"
            raise NotVectorizable(f"{place} is a {kind}")
        if value.layout != torch.strided or value.requires_grad:
            raise NotVectorizable(
                f"{place} is a tensor that is {'part of an autograd graph' if value.requires_grad else value.layout}"
            )
        self.tensors.append(value)
        number = len(self.tensors) - 1
        return lambda tensors, made: tensors[number], (value.shape, value.dtype, value.device)

    def _open(self, value: Any, place: str) -> tuple[_Build, Any]:
        kind = type(value)
        if kind is types.MappingProxyType:
            build, signature = self.open(dict(value), place)
            return lambda tensors, made: types.MappingProxyType(build(tensors, made)), (kind, signature)
        if kind is set or kind is frozenset:
            if not all(map(_is_atom, value)):
                raise NotVectorizable(f"{place} is a {kind.__name__} with members that are neither numbers nor strings")
            self.rest.append((place, frozenset(value)))
            return lambda tensors, made: kind(value), kind
        if kind not in _OWN and kind in _pytree.SUPPORTED_NODES:
            return self._open_node(value, place)
        return self._open_object(value, place)

    def _open_node(self, value: Any, place: str) -> tuple[_Build, Any]:
        """Open an object of a type that is registered with pytree."""
        kind = type(value)
        node = _pytree.SUPPORTED_NODES[kind]
        children, context = node.flatten_fn(value)
        self.rest.append((place, context))
        builds, signatures = self._each([(f"{place}.{i}", child) for i, child in enumerate(children)])
        return lambda tensors, made: node.unflatten_fn([build(tensors, made) for build in builds], context), (
            kind, *signatures,
        )  # fmt: skip

    def _open_object(self, value: Any, place: str) -> tuple[_Build, Any]:
        """Open any Python object: the members of a container, and attributes."""
        kind = type(value)
        base: Any = kind
        attributes: dict[str, Any] = {}  # Python's own containers, which most batches are, have none
        if kind not in _OWN or kind.__dictoffset__:
            base = next(parent for parent in kind.__mro__ if not parent.__flags__ & _HEAP_TYPE)
            attributes = _attributes_of(value)
        if base not in (*_OWN, *_BARE) or (base is object and not _is_python(kind)):
            raise NotVectorizable(f"{place} is a {kind.__name__}, whose contents cannot be read")
        members, keys = [], list[Any]()
        if issubclass(base, dict):
            keys = list(dict.keys(value))
            members = [(f"{place}[{key!r}]", dict.__getitem__(value, key)) for key in keys]
        elif base not in _BARE:
            members = [(f"{place}[{i}]", member) for i, member in enumerate(base.__iter__(value))]
        if not all(_is_atom(key) or isinstance(key, tuple) for key in keys):
            raise NotVectorizable(f"{place} has keys that are neither numbers nor strings")
        builds, signatures = self._each([*members, *((f"{place}.{name}", each) for name, each in attributes.items())])
        options = _options_of(base, value)

        def build(tensors: Sequence[Tensor], made: dict[int, Any]) -> Any:
            values = (build(tensors, made) for build in builds)
            new = _new(base, kind, keys, [next(values) for _ in members], options)
            for name in attributes:
                object.__setattr__(new, name, next(values))
            return new

        return build, (kind, *((type(key), key) for key in keys), *attributes, repr(options), *signatures)

    def _each(self, members: Sequence[tuple[str, Any]]) -> tuple[list[_Build], list[Any]]:
        found = [self.open(member, place) for place, member in members]
        return [build for build, _ in found], [signature for _, signature in found]


def _new(base: Any, kind: Any, keys: Sequence[Any], members: list[Any], options: Any) -> Any:
    """Make an object of a class with these members, without calling the class."""
    if base is tuple:
        return tuple.__new__(kind, members)
    new = base.__new__(kind)
    if base is collections.deque:
        collections.deque.__init__(new, members, options)
    elif base is list:
        list.extend(new, members)
    elif base not in _BARE:
        if base is collections.defaultdict:
            new.default_factory = options
        for key, member in zip(keys, members, strict=True):
            base.__setitem__(new, key, member)
    return new


def _options_of(base: Any, value: Any) -> Any:
    """Return what a container of the standard library keeps besides its members."""
    if base is collections.deque:
        return value.maxlen
    return value.default_factory if base is collections.defaultdict else None


def _attributes_of(value: Any) -> dict[str, Any]:
    found = dict(vars(value)) if type(value).__dictoffset__ else {}
    for parent in type(value).__mro__:
        for name, slot in vars(parent).items() if parent.__flags__ & _HEAP_TYPE else ():
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # a slot may be empty
                    found[name] = slot.__get__(value)
    return found


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or isinstance(value, _KINDS_OF_ATOMS)


def _is_python(kind: type) -> bool:
    """Return whether instances have attributes that Python can see, in a ``__dict__`` or in slots."""
    return any("__dict__" in vars(parent) or "__slots__" in vars(parent) for parent in kind.__mro__)


def _same(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if type(mine) is not type(theirs):
        return False
    try:
        return bool(_comparable(mine) == _comparable(theirs))
    except Exception:
        return False  # such as arrays in a pytree context


def _comparable(value: Any) -> Any:
    """Return a value whose comparison treats NaN as equal to NaN, and 0.0 as different from -0.0."""
    return repr(value) if isinstance(value, float | complex | np.inexact) else value
