"""Snapshots of everything that can be reached from some objects in Python."""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedscale.core.user_code.objects import TENSORS, Part, parts_of, parts_of_type
from lightning_fedscale.core.user_code.values import Closed

# Types compared directly. Neither `bool` nor `float` is here, since 1 == True == 1.0 and nan != nan.
_PLAIN = {int, str, bytes, type(None), types.EllipsisType, torch.dtype, torch.device, types.CodeType}
_TRUE, _FALSE, _REGISTERED, _OPENED = object(), object(), object(), object()
_MOST = 10_000
_WRAPPERS = (functools._lru_cache_wrapper, staticmethod, classmethod)


class _Node(NamedTuple):
    """An opened object.

    Attributes:
        value: the object.
        held: its contents, with the part that reads and writes them.
        compared: its type, and the compared values of each part.
    """

    value: Any
    held: list[tuple[Part, Any]]
    compared: list[Any]


class Snapshot:
    """A snapshot of everything that can be reached from some objects, at any depth, to compare with later snapshots.

    Numbers, strings and the like are compared by value, containers and other objects by their contents, tensors and
    arrays by identity and value, generators by their state. Parameters, buffers and metrics of ``module`` are left
    out, and so are internals of torch, Lightning and this package.

    Args:
        roots: the objects to start from, by name.
        module: its parameters and buffers are left out, since others manage them.
        exact: also open large containers and arrays, and compare the values of large tensors. This takes as much time
            and memory as they do, so it is for proofs; compare only exact snapshots with each other.
        most: bytes of the largest tensor that is copied, so that it can be restored.

    Attributes:
        complete: False if an object cannot be opened or is too large; it may then change unnoticed.
        iterators: descriptions of iterators, such as generators and files, that cannot be opened and therefore cannot
            be reset to their present position.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        module: nn.Module | None = None,
        *,
        exact: bool = False,
        most: int = sys.maxsize,
    ) -> None:
        self.complete = True
        self._iterators: list[Any] = []
        self._exact = exact
        self._most = most
        self._room = sys.maxsize if exact else _MOST
        self._numbers: dict[int, int] = {}
        self._found: list[Any] = []
        self._bare: list[tuple[types.FunctionType, types.CodeType]] = []  # functions with nothing to open
        self._parameters, buffers = ([], []) if module is None else _registered(module)
        self._own = {*map(id, self._parameters), *map(id, buffers)}
        self._flags = [_flags_of(parameter) for parameter in self._parameters]
        self._names, self._begun_with = list(roots), list(roots.values())
        self._roots = [self._token(value) for value in roots.values()]
        # Opening objects finds further ones.
        self._nodes = [self._open(value) for value in self._found]
        self._compared = [node.compared for node in self._nodes]
        self.iterators = [f"{type(each).__name__} ({self._path_to(each)})" for each in self._iterators]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Snapshot) and (
            (self._names, self._roots, self._flags, self._compared)
            == (other._names, other._roots, other._flags, other._compared)
        )

    __hash__ = None  # type: ignore[assignment]

    def still_holds(self) -> bool:
        """Return whether certainly nothing changed: the same objects in the same places; cheaper than a new snapshot.

        False does not prove a change: a number may have been recomputed, or an object could not be opened.
        """
        if not self.complete or self._flags != [_flags_of(parameter) for parameter in self._parameters]:
            return False
        for function, code in self._bare:
            if function.__code__ is not code or not _is_bare(function):
                return False
        try:
            for value, parts, _ in self._nodes:
                for part, held in parts:
                    now = part.read(value, self._exact, self._most) if part.valued else part.read(value)
                    if not _identical(held, now):
                        return False
        except Exception:  # it cannot be opened any more
            return False
        return True

    def difference(self, other: Snapshot) -> str | None:
        """Return the path of the first difference, such as "cfg.loss.kl.beta" or "net.0.table"; None without one."""
        if Snapshot.__eq__(self, other):
            return None
        if self._flags != other._flags:
            return "requires_grad or the hooks of a parameter"
        paths: dict[int, str] = {}
        for name, one, two in zip(self._names, self._roots, other._roots, strict=False):
            if one != two:
                return name
            _note(paths, one, name)
        for number, (one, two) in enumerate(zip(self._nodes, other._nodes, strict=False)):
            path = paths.get(number, "")
            if one.compared[0] is not two.compared[0] or len(one.held) != len(two.held):
                return path
            if not one.held and one.compared != two.compared:
                return path
            for i, (mine, theirs) in enumerate(zip(one.compared[1:], two.compared[1:], strict=False)):
                if isinstance(mine, list) and isinstance(theirs, list):
                    mine, theirs = _named(one.held[i], mine), _named(two.held[i], theirs)
                if not isinstance(mine, dict) or not isinstance(theirs, dict):
                    if mine != theirs:
                        return path
                    continue
                for name in (*mine, *theirs):
                    if name not in mine or name not in theirs or mine[name] != theirs[name]:
                        return _joined(path, name)
                    _note(paths, mine[name], _joined(path, name))
            if one.compared != two.compared:
                return path
        return next(iter(self._names), None)

    def _path_to(self, value: Any) -> str:
        """Return the path of an opened object, such as "cfg.batches"."""
        paths: dict[int, str] = {}
        for name, root in zip(self._names, self._roots, strict=True):
            _note(paths, root, name)
        for number, node in enumerate(self._nodes):
            for held, tokens in zip(node.held, node.compared[1:], strict=False):  # unopened objects have no contents
                inside = _named(held, tokens) if isinstance(tokens, list) else tokens
                for name, token in inside.items() if isinstance(inside, dict) else ():
                    _note(paths, token, _joined(paths.get(number, ""), name))
        return paths.get(self._numbers[id(value)], "")

    def reaches(self, value: Any) -> bool:
        """Return whether an object was opened."""
        return id(value) in self._numbers

    def functions(self) -> Iterator[types.FunctionType]:
        """Yield the Python functions among the roots, the opened objects and their contents."""
        inside = [
            one
            for node in self._nodes
            for _, held in node.held
            if isinstance(held, dict | list)
            for one in _members(held)
        ]
        for one in (*self._begun_with, *(node.value for node in self._nodes), *inside):
            function = getattr(one, "__wrapped__", None) if type(one) in _WRAPPERS else one
            if isinstance(function, types.FunctionType):
                yield function

    def restore(self) -> None:
        """Restore attributes, members of containers, values of tensors and arrays, and states of generators."""
        for parameter, (flag, *_) in zip(self._parameters, self._flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for function, _ in self._bare:
            function.__dict__.clear()
        for value, held, _ in self._nodes:
            for part, inside in held:
                part.write(value, inside)

    def _token(self, value: Any) -> Any:
        """Return what stands for a value in comparisons; an object is opened later, once."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is bool:
            return _TRUE if value else _FALSE
        if kind is float:
            return (value if value == value and value else repr(value),)
        if kind is types.FunctionType and _is_bare(value):
            self._bare.append((value, value.__code__))
            return self._bare[-1]
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._found)
            self._found.append(value)
        return _OPENED, number

    def _tokens(self, held: Any, part: Part) -> Any:
        """Return the compared values of the contents of a part."""
        if type(held) is dict:
            self._room -= len(held)
            if part is TENSORS:
                return {n: _REGISTERED if id(v) in self._own else self._token(v) for n, v in held.items()}
            return {n: v if type(v) in _PLAIN else self._token(v) for n, v in held.items()}
        if type(held) is list:
            self._room -= len(held)
            if self._room < 0:
                raise Closed
            return [v if type(v) in _PLAIN else self._token(v) for v in held]
        return held

    def _open(self, value: Any) -> _Node:
        kind, closed = type(value), _Node(value, [], [type(value), id(value)])
        if id(value) in self._own:
            return closed
        try:
            parts = parts_of(value)
            if parts == ():
                return closed
            if parts is None or self._room < 0:
                raise Closed
            held = [(p, p.read(value, self._exact, self._most) if p.valued else p.read(value)) for p in parts]
            return _Node(value, held, [kind, *[self._tokens(inside, part) for part, inside in held]])
        except Exception:
            self.complete = False
            if hasattr(kind, "__next__"):
                self._iterators.append(value)
            return closed


def _flags_of(parameter: nn.Parameter) -> tuple[Any, ...]:
    hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return parameter.requires_grad, *(each and tuple(each.items()) for each in hooks)


def _is_bare(function: types.FunctionType) -> bool:
    return not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or function.__dict__)


def _identical(held: Any, now: Any) -> bool:
    if type(held) is dict:
        return held.keys() == now.keys() and all(map(operator.is_, held.values(), now.values()))
    if type(held) is list:
        return type(now) is list and len(held) == len(now) and all(map(operator.is_, held, now))
    return bool(held == now)


def _registered(module: nn.Module) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Return the parameters and buffers of all submodules except metrics, faster than `named_parameters` does."""
    parts = {module: None}
    parameters: list[nn.Parameter] = []
    buffers: list[Tensor] = []
    stack = [module]
    for part in stack:
        parameters += [p for p in part._parameters.values() if p is not None]
        buffers += [b for b in part._buffers.values() if b is not None]
        for child in part._modules.values():
            kind: Any = type(child)
            if child is not None and child not in parts and parts_of_type(kind):
                parts[child] = None
                stack.append(child)
    return parameters, buffers


def _members(held: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def _named(held: tuple[Part, Any], tokens: list[Any]) -> dict[str, Any]:
    return dict(zip(held[0].names(held[1]), tokens, strict=True))


_UNNAMED = ("_modules", "_content", "_val", "__class__")


def _joined(path: str, name: str) -> str:
    if name in _UNNAMED or not name:
        return path
    return f"{path}{name}" if not path or name.startswith("[") else f"{path}.{name}"


def _note(paths: dict[int, str], token: Any, path: str) -> None:
    if type(token) is tuple and token[0] is _OPENED:
        paths.setdefault(token[1], path)
