"""What a module keeps in Python, where no stacking of tensors reaches."""

from __future__ import annotations

import enum
import types
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

_ATOMS = (
    type(None), bool, int, str, bytes, complex, enum.Enum, type, types.FunctionType, types.BuiltinFunctionType,
    torch.dtype, torch.device,
)  # fmt: skip
_DEPTH, _ENTRIES = 4, 10_000
# What torch and Lightning themselves keep; "training" counts.
_NOT_THE_USERS = (vars(pl.LightningModule()).keys() | {"_current_fx_name", "_trainer", "log"}) - {"training"}


class PythonState:
    """A snapshot of a module's Python attributes, to be compared with another one.

    Numbers, strings and the like count by value, containers and plain objects by what is in them, tensors and
    everything else by identity. Parameters, buffers and metrics do not count.

    Args:
        module: the user's.

    Attributes:
        complete: False if there was too much to look at; then nothing can be said about it.

    Example:
        >>> module = pl.LightningModule()
        >>> module.seen = [1]
        >>> before = PythonState(module)
        >>> module.seen.append(2)
        >>> before == PythonState(module)
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[Any] = []  # alive, so that an address stands for one object
        self._entries = 0
        self.complete = True
        self._parts = [
            (
                id(part),
                {name: self._atom(value, _DEPTH) for name, value in vars(part).items() if name not in _NOT_THE_USERS},
            )
            for part in module.modules()
            if not isinstance(part, Metric)
        ]
        self._flags = [parameter.requires_grad for parameter in module.parameters()]
        self._values = [
            (
                part,
                {name: (value, _contents(value)) for name, value in vars(part).items() if name not in _NOT_THE_USERS},
            )
            for part in module.modules()
            if not isinstance(part, Metric)
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PythonState) and (self._parts, self._flags) == (other._parts, other._flags)

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Give every attribute the value that it had, and lists, dicts and sets among them the members they had."""
        for part, values in self._values:
            for name in vars(part).keys() - values.keys() - _NOT_THE_USERS:
                object.__delattr__(part, name)
            for name, (value, contents) in values.items():
                object.__setattr__(part, name, value)
                if isinstance(value, list):
                    value[:] = contents
                elif isinstance(value, dict | set) and value != contents:
                    value.clear()
                    value.update(contents)

    def _atom(self, value: Any, depth: int) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if isinstance(value, float):
            return value if value == value else "nan"
        self._kept.append(value)
        self._entries += 1
        if isinstance(value, Tensor | nn.Module):
            return id(value)
        if self._entries > _ENTRIES or depth == 0:
            self.complete = False
            return id(value)
        if isinstance(value, dict):
            return [(self._atom(k, depth - 1), self._atom(v, depth - 1)) for k, v in value.items()]
        if isinstance(value, list | tuple):
            return [self._atom(v, depth - 1) for v in value]
        if isinstance(value, set | frozenset):
            return frozenset(v if isinstance(v, _ATOMS) else id(v) for v in value)
        if hasattr(value, "__dict__") and not callable(value):
            return id(value), self._atom(vars(value), depth - 1)
        return id(value)


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else None
