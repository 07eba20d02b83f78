"""A module's state in Python, which stacking of tensors does not cover."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from lightning_fedscale.core.user_code.snapshot import Snapshot
from lightning_fedscale.core.user_code.variables import Place, Variables

_MOST_OUTSIDE = 1 << 24  # bytes of a tensor in a global variable that is copied, so that it can be restored


class PythonState(Snapshot):
    """A snapshot of a module's Python attributes, of the objects to which they refer, and of the classes of these.

    Args:
        module: the user's module.
        places: global variables that are included.
        exact: see `Snapshot`; does not apply to the variables, which may be the training data.
        most: bytes of the largest tensor of the module that is copied, so that it can be restored.

    Example:
        >>> module = nn.Module()
        >>> module.seen = [{"step": 1}]
        >>> before = PythonState(module)
        >>> module.seen[0]["step"] = 2
        >>> before.difference(before.again())
        'seen[0].step'
        >>> before.restore()
        >>> before == before.again()
        True
    """

    def __init__(
        self, module: nn.Module, places: Sequence[Place] = (), *, exact: bool = False, most: int = sys.maxsize
    ) -> None:
        super().__init__({"": module}, module, exact=exact, most=most)
        self._module, self._places = module, places
        self._outside = Variables(places, (), module, most=_MOST_OUTSIDE)
        self.iterators += self._outside.iterators

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, PythonState) and self._outside == other._outside

    __hash__ = None

    def still_holds(self) -> bool:
        """See `Snapshot`."""
        return super().still_holds() and self._outside.still_holds()

    def again(self) -> PythonState:
        """Return a present snapshot: this one if certainly nothing changed, else a new one."""
        return (
            self if self.still_holds() else PythonState(self._module, self._places, exact=self._exact, most=self._most)
        )

    def exactly(self) -> PythonState:
        """Return a present, exact snapshot; see `Snapshot`."""
        return PythonState(self._module, self._places, exact=True)

    def difference(self, other: Snapshot) -> str | None:
        """Return the path of the first difference; see `Snapshot`."""
        assert isinstance(other, PythonState)
        own = super().difference(other)
        return own if own is not None else self._outside.difference(other._outside)

    def restore(self) -> None:
        """Restore everything."""
        self._outside.restore()
        super().restore()
