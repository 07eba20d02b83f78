"""Step values of clients' local batches for the loggers, over the number of local batches."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from lightning_fedscale.types import FloatArray


class _Picked(NamedTuple):
    """A number, or a vector of the values at several positions, that still waits on the device."""

    name: str
    positions: list[int]
    value: Tensor | float


class StepPoints:
    """Collects the step values of every n-th local batch of a round, and sends them to the loggers as ``client/...``.

    Args:
        trainer: the Trainer.
        every_n: which local batches count; None for none of them.

    Attributes:
        local_batches: local batches of all ranks in all complete rounds, from which the x-axis continues.
    """

    def __init__(self, trainer: pl.Trainer, every_n: int | None) -> None:
        self._trainer = trainer
        self._every_n = every_n
        self._picked: list[_Picked] = []
        self._points: dict[int, dict[str, float]] = {}
        self.local_batches = 0

    def is_due(self, position: int) -> bool:
        """Return whether the local batch at this position within the rank's round is one of every n."""
        return self._every_n is not None and (self.local_batches + position + 1) % self._every_n == 0

    def pick(self, name: str, positions: list[int], value: Tensor | float) -> None:
        """Add the values at these positions, of which only those that are due will be sent."""
        self._picked.append(_Picked(name, positions, value))

    def take(self) -> list[_Picked]:
        """Return what was picked since the last call, to be read from the device."""
        picked, self._picked = self._picked, []
        return picked

    def place(self, picked: list[_Picked], numbers: FloatArray) -> None:
        """Turn what `take` returned into points, given its numbers in the same order."""
        for name, positions, _ in picked:
            mine, numbers = np.split(numbers, [len(positions)])
            for position, number in zip(positions, mine.tolist(), strict=True):
                if self.is_due(position):
                    self._points.setdefault(self.local_batches + position + 1, {})[f"client/{name}"] = number

    def commit(self, batches: int) -> None:
        """Count the local batches of all ranks, since the round is complete."""
        self.local_batches += batches

    def send(self) -> None:
        """Send the loggers the points of the round."""
        points, self._points = self._points, {}
        for step, values in sorted(points.items()):
            for logger in self._trainer.loggers:
                logger.log_metrics(values, step=step)

    def drop(self) -> None:
        """Forget everything that was not sent."""
        self._picked, self._points = [], {}
