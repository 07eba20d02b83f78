"""Snapshots of global variables."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_fedscale.core.user_code.objects import is_installed
from lightning_fedscale.core.user_code.snapshot import Snapshot

_FIXED = (types.ModuleType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_OWNERS_OF_FIXED = (types.ModuleType, type, type(None))
_WITH_A_MODULE = (types.FunctionType, type)
MISSING = object()
"""Stands for a missing variable."""


class Place(NamedTuple):
    """A global variable.

    Attributes:
        variables: all variables of its Python module.
        name: its name.
    """

    variables: dict[str, Any]
    name: str

    @property
    def value(self) -> Any:
        """The variable's value; `MISSING` if it does not exist."""
        return self.variables.get(self.name, MISSING)

    def write(self, value: Any) -> None:
        """Set the variable to this value; `MISSING` deletes it."""
        if value is MISSING:
            self.variables.pop(self.name, None)
        elif self.value is not value:
            self.variables[self.name] = value


class Variables(Snapshot):
    """A snapshot of global variables, and of everything that can be reached from them.

    Args:
        places: the variables.
        others: further roots.
        module: see `Snapshot`.
        most: see `Snapshot`.

    Example:
        >>> variables = {"__name__": "mine", "count": 1, "activation": torch.relu}
        >>> before = Variables([Place(variables, name) for name in ("count", "activation")])
        >>> variables["activation"] = torch.sigmoid
        >>> before.difference(before.again())
        'mine.activation'
        >>> before.restore()
        >>> variables["activation"] is torch.relu
        True
    """

    def __init__(
        self,
        places: Sequence[Place],
        others: Sequence[Any] = (),
        module: nn.Module | None = None,
        *,
        most: int = sys.maxsize,
    ) -> None:
        self._given = places, others, module
        self._values = [place.value for place in places]
        self._fixed = [value if is_fixed(value) else None for value in self._values]
        roots = {str(number): value for number, value in enumerate(others)}
        for number, (place, value, fixed) in enumerate(zip(places, self._values, self._fixed, strict=True)):
            if fixed is None:
                name = _name_of(place)
                roots[name if name not in roots else f"{name} {number}"] = value
        super().__init__(roots, module if roots else None, most=most)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Variables) or len(self._fixed) != len(other._fixed):
            return False
        return super().__eq__(other) and self._rebound(other) is None

    __hash__ = None

    def _rebound(self, other: Variables) -> str | None:
        """Return the first variable that now refers to another function, class or module of a library."""
        pairs = zip(self._given[0], self._fixed, other._fixed, strict=True)
        return next((_name_of(place) for place, mine, theirs in pairs if mine is not theirs), None)

    def still_holds(self) -> bool:
        """See `Snapshot`."""
        places = self._given[0]
        for place, value in zip(places, self._values, strict=True):
            if place.variables.get(place.name, MISSING) is not value:
                return False
        return super().still_holds()

    def again(self) -> Variables:
        """Return a present snapshot: this one if certainly nothing changed, else a new one."""
        return self if self.still_holds() else Variables(*self._given, most=self._most)

    def difference(self, other: Snapshot) -> str | None:
        """Return the path of the first difference; see `Snapshot`."""
        assert isinstance(other, Variables)
        return rebound if (rebound := self._rebound(other)) is not None else super().difference(other)

    def restore(self) -> None:
        """Restore everything, including the objects to which the variables refer."""
        for place, value in zip(self._given[0], self._values, strict=True):
            place.write(value)
        super().restore()


def is_fixed(value: Any) -> bool:
    """Return whether a global variable's value is compared only by identity: missing, a module, or from a package."""
    if isinstance(value, _WITH_A_MODULE):
        return is_installed(value.__module__)
    if isinstance(value, types.BuiltinFunctionType):
        return isinstance(value.__self__, _OWNERS_OF_FIXED)
    return value is MISSING or isinstance(value, _FIXED)


def _name_of(place: Place) -> str:
    return f"{place.variables.get('__name__')}.{place.name}"
