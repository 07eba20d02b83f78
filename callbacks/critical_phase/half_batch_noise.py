"""The noise of single samples, measured from the two halves of some of a run's batches."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.core.lightning.half_batch_gradients import half_batch_gradients, no_halves
from lightning_fedscale.phases.noise import NoiseEstimate, estimate_from_half_batches
from lightning_fedscale.utils import collectives

COLUMNS = 4
"""Numbers of a measurement: trace of the covariance of a sample's gradient, ranks, samples, squared gradient norm."""


class HalfBatchNoise:
    """Compares the gradients of both halves of a batch, every so many batches.

    Args:
        every: number of batches from one measurement to the next; None for none.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._since = 0  # batches
        self._open: Tensor | None = None  # of the current batch, whose whole gradient is not computed yet
        self._unread: list[Tensor] = []  # not read from the device yet

    @staticmethod
    def can_measure(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Return whether the gradients of half batches can be computed on a copy of the module."""
        return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) and module.automatic_optimization

    def begin_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure, if this is due."""
        self._since += 1
        if self._every is None or self._since < self._every or batch_idx % trainer.accumulate_grad_batches:
            return
        self._since = 0
        if self.can_measure(trainer, module):
            self._open = _measure(trainer, module, batch, batch_idx)

    def add_gradient(self, norms: Tensor) -> None:
        """Complete the measurement of this step by the norms of its gradients."""
        if self._open is not None:
            self._unread.append(torch.cat([self._open, norms.square().sum()[None]]))
            self._open = None

    def take(self, device: torch.device) -> Tensor | None:
        """Return the sum over ranks of all complete measurements, flattened; call it on all ranks."""
        unread, self._unread = self._unread, []
        if not unread:
            return None
        return collectives.sum_over_ranks(torch.stack([each.to(device) for each in unread]).flatten())

    def saved_state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {"since_look": self._since, "looks": [each.tolist() for each in self._unread]}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._since = state["since_look"]
        self._unread = [torch.tensor(each, dtype=torch.float64) for each in state["looks"]]


def estimate_of(accumulated: int, trace: float, ranks: float, samples: float, square: float) -> NoiseEstimate | None:
    """Return the estimate from a measurement that is summed over ranks; None if it failed.

    Args:
        accumulated: batches per optimizer step.
        trace: sum of the traces of the covariance of a sample's gradient.
        ranks: number of ranks that have measured it.
        samples: sum of their batches.
        square: sum of the squared gradient norms.
    """
    if not ranks or not math.isfinite(trace * square):
        return None
    trace, square = trace / ranks, square / collectives.world_size()
    batch = samples * accumulated
    one, halves = np.ones(1), np.full((1, 2), batch / 2)
    # Only the difference comes from the halves; the mean gradient is that of the whole update.
    return estimate_from_half_batches(one * trace * 4 / batch, halves, one * square, one, square)


def _measure(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the first three of `COLUMNS`; zeros if they cannot be measured."""
    found = torch.zeros(COLUMNS - 1, dtype=torch.float64, device=module.device)
    try:
        if (halves := half_batch_gradients(trainer, module, batch, batch_idx)) is not None:
            m, n = halves.samples
            found[0], found[1], found[2] = halves.difference_square() / (1 / m + 1 / n), 1.0, m + n
    except Exception as error:
        rank_zero_warn(no_halves(error))
    return found
