"""Steps that were recorded, and what must be unchanged for them to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.core.user_code.guards import Guard, Reads, Unguarded
from lightning_fedscale.core.user_code.state import PythonState

# Recording costs about as much as this many steps.
_RECORD_AT = 20
_FORGOTTEN_TOO_OFTEN = 3
_FORMS = 64


class Recordings:
    """The recorded steps of a module, by form.

    A recording holds as long as everything that the step's Python code reads is as it was: the module at any depth, and
    what the code reads outside of it. What cannot be watched so is not recorded.

    Args:
        module: the user's.

    Attributes:
        record_at: how many times a step of one form is taken before it is recorded.
        obstacle: why nothing is recorded any more; None if it is.
        made: how many steps were recorded.
        forgotten: how many times recordings ceased to hold.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._state: PythonState | None = None
        self._suspect = False
        self._steps: dict[Any, Callable[..., Any]] = {}
        self._uses: dict[Any, int] = {}
        self._guard = Guard(module)
        self.record_at = _RECORD_AT
        self.obstacle: str | None = None
        self.made = self.forgotten = 0

    def __len__(self) -> int:
        return len(self._steps)

    def open_wave(self, state: PythonState) -> bool:
        """Forget what does not hold any more; whether something has changed since the last wave.

        Args:
            state: the module's, now.
        """
        before, self._state, self._suspect = self._state, state, False
        changed = before is not None and (state != before or not self._guard.holds())
        if changed:
            self._forget()
        return changed

    def suspect(self) -> None:
        """Some Python code has run since the wave began."""
        self._suspect = True

    def find(self, form: Any) -> Callable[..., Any] | None:
        """The recorded step of a form, if there is one that holds."""
        if form in self._steps and self._suspect:
            self._suspect = False
            if self._state is None or self._state.again() != self._state or not self._guard.holds():
                self._forget()
        return self._steps.get(form)

    def is_due(self, form: Any) -> bool:
        """Count a step that is about to be taken in Python; whether it is time to record it."""
        self._suspect = True
        if form is None or self.obstacle is not None:
            return False
        if len(self._uses) >= _FORMS and form not in self._uses:  # forms that do not come again
            self._steps, self._uses = {}, {}
        self._uses[form] = uses = self._uses.get(form, 0) + 1
        return uses == self.record_at

    def add(self, form: Any, record: Callable[[], Callable[..., Any]], reads: Reads) -> None:
        """Record a step that was taken while its reads were noted.

        Args:
            form: what it depends on besides what Python reads.
            record: gives what replays it, or raises an error if that is not the same.
            reads: what its Python code reads.
        """
        assert self._state is not None
        try:
            if not self._guard.holds():
                self._forget()
                raise Unguarded("what it reads has changed meanwhile")
            self._guard.add(reads, self._state)
            step = record()
            if not self._guard.holds():
                raise Unguarded("it changes what it reads")
            self._steps[form] = step
            self.made += 1
        except Exception as error:
            self.stop(str(error) or type(error).__name__)

    def stop(self, obstacle: str) -> None:
        """Record nothing any more."""
        self.obstacle = self.obstacle or obstacle

    def close(self) -> None:
        """Let go of everything: the run is over."""
        self._steps, self._uses, self._guard, self._state = {}, {}, Guard(self._module), None

    def _forget(self) -> None:
        if self._steps:
            self.forgotten += 1
            if self.forgotten >= _FORGOTTEN_TOO_OFTEN:
                self.stop("what it reads changes too often")
        self._steps, self._uses, self._guard = {}, {}, Guard(self._module)
