"""Captured steps, and the check of everything that must be unchanged for a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.core.user_code.guards import Guard, Reads, Unguarded
from lightning_fedscale.core.user_code.state import PythonState

# Capturing costs about as much as this many steps.
_CAPTURE_AT = 20
_FORGOTTEN_TOO_OFTEN = 3
_MOST_KEYS = 64


class CapturedSteps:
    """The captured steps of a module, by batch signature.

    A captured step is valid while everything that its Python code reads is unchanged: the module at any depth, and
    anything that the code reads outside of it. A step whose reads cannot be checked is not captured.

    Args:
        module: the user's module.

    Attributes:
        capture_at: the number of runs of a step, by signature, at which it is captured.
        reason: why nothing is captured any more; None while steps are captured.
        made: number of captured steps.
        forgotten: number of times that captured steps became invalid.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._state: PythonState | None = None
        self._suspect = False
        self._steps: dict[Any, Callable[..., Any]] = {}
        self._uses: dict[Any, int] = {}
        self._guard = Guard(module)
        self.capture_at = _CAPTURE_AT
        self.reason: str | None = None
        self.made = self.forgotten = 0

    def __len__(self) -> int:
        return len(self._steps)

    def open_wave(self, state: PythonState) -> bool:
        """Drop invalid captured steps; return whether something has changed since the last wave.

        Args:
            state: the module's present state.
        """
        before, self._state, self._suspect = self._state, state, False
        changed = before is not None and (state != before or not self._guard.holds())
        if changed:
            self._forget()
        return changed

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Capture steps at their first use inside the context."""
        self.capture_at, usual, self._uses = 1, self.capture_at, {}
        try:
            yield
        finally:
            self.capture_at = usual

    def suspect(self) -> None:
        """Note that some Python code has run since the wave began, so that captured steps must be checked again."""
        self._suspect = True

    def find(self, key: Any) -> Callable[..., Any] | None:
        """Return the valid captured step of a signature; None if there is none."""
        if key in self._steps and self._suspect:
            self._suspect = False
            if self._state is None or self._state.again() != self._state or not self._guard.holds():
                self._forget()
        return self._steps.get(key)

    def is_due(self, key: Any) -> bool:
        """Count a step that is about to run in Python; return whether it should be captured."""
        self._suspect = True
        if key is None or self.reason is not None:
            return False
        if len(self._uses) >= _MOST_KEYS and key not in self._uses:  # signatures that do not recur
            self._steps, self._uses = {}, {}
        self._uses[key] = uses = self._uses.get(key, 0) + 1
        return uses == self.capture_at

    def add(self, key: Any, capture: Callable[[], Callable[..., Any]], reads: Reads) -> None:
        """Capture a step that ran while its reads were noted.

        Args:
            key: everything on which it depends besides Python's reads.
            capture: returns its replay, or raises an error if the replay is not bit-identical.
            reads: the reads of its Python code.
        """
        assert self._state is not None
        try:
            if not self._guard.holds():
                self._forget()
                raise Unguarded("what it reads has changed meanwhile")
            self._guard.add(reads, self._state)
            step = capture()
            if not self._guard.holds():
                raise Unguarded("it changes what it reads")
            self._steps[key] = step
            self.made += 1
        except Exception as error:
            self.stop(str(error) or type(error).__name__)

    def stop(self, reason: str) -> None:
        """Stop capturing."""
        self.reason = self.reason or reason

    def close(self) -> None:
        """Release everything at the end of the run."""
        self._steps, self._uses, self._guard, self._state = {}, {}, Guard(self._module), None

    def _forget(self) -> None:
        if self._steps:
            self.forgotten += 1
            if self.forgotten >= _FORGOTTEN_TOO_OFTEN:
                self.stop("what it reads changes too often")
        self._steps, self._uses, self._guard = {}, {}, Guard(self._module)
