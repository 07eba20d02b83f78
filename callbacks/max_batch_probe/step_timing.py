"""The times of a run's steps, and which batch would reach a target first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.core.lightning.loggers import show, shows_figures
from lightning_fedscale.devices.performance import PerformanceModel, StepTimes
from lightning_fedscale.devices.profiling.batches import samples_in
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils.stopwatch import Stopwatch

_WARM_UP = 3
"""Steps or rounds at the beginning that are not timed, since they take longer."""


class StepTiming:
    """Times the steps of a run, or those of its clients, without the first few.

    Args:
        noise_scale: the gradient noise scale in samples; None if it is unknown.
    """

    def __init__(self, noise_scale: float | None) -> None:
        self._noise_scale = noise_scale
        self._watch: Stopwatch[float] | None = None  # with the samples of each step
        self._begun: Any = None
        self._times = StepTimes()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None, "_begun": None}

    @property
    def times(self) -> StepTimes:
        """The steps so far."""
        self._read(wait=True)
        return self._times

    def begin(self, trainer: pl.Trainer) -> None:
        """Start timing a step."""
        if self._watch is None:
            self._watch = Stopwatch(trainer.strategy.root_device)
        self._begun = self._watch.start()

    def end(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Add the step that has ended, unless it is a federated round."""
        if self._watch is not None and not isinstance(trainer.strategy, FederatedStrategy) and batch_idx >= _WARM_UP:
            with suppress(Exception):  # batches of unknown size are not timed
                self._watch.stop(self._begun, samples_in(batch))
            self._read(wait=False)

    def add_round(self, record: RoundRecord) -> None:
        """Add the steps of a round's clients."""
        if record.round >= _WARM_UP:
            for row in zip(record.local_steps, record.samples, record.client_seconds, strict=True):
                self._add(*map(float, row))

    def _read(self, *, wait: bool) -> None:
        """Add the steps that the device has finished."""
        if self._watch is not None:
            for samples, seconds in self._watch.read(wait=wait):
                self._add(1, samples, seconds)

    def _add(self, steps: float, samples: float, seconds: float) -> None:
        self._times = self._times.add(steps=steps, samples=samples, seconds=seconds)

    def performance(self, sync: float | Callable[[int], float], largest: int | None) -> PerformanceModel:
        """Return the performance model that is fitted to these steps, for batches up to the largest."""
        return PerformanceModel(self.times.fit(), sync, self._noise_scale, largest)

    def metrics(self, trainer: pl.Trainer, largest: int | None) -> dict[str, float]:
        """Return the logged numbers; none if no step has been timed."""
        if not self.times.measurements:
            return {}
        step = self.times.fit()
        metrics = {"probe/step_residual": step.residual, "probe/steps_timed": float(step.measurements)}
        if step.identified:
            metrics |= {"probe/step_fixed_seconds": step.fixed, "probe/step_seconds_per_sample": step.per_sample}
            metrics["probe/best_batch"] = float(self.performance(0.0, largest).best_batch(*_parallelism(trainer)))
        return metrics

    def report(self, trainer: pl.Trainer, largest: int | None) -> None:
        """Print the fitted model and plot time against batch size, if the steps identify it."""
        if not self.times.measurements or not (step := self.times.fit()).identified:
            return
        performance, parallelism = self.performance(0.0, largest), _parallelism(trainer)
        rank_zero_info(
            f"MaxBatchProbe: a step takes {1000 * step.fixed:.3g} ms and {1000 * step.per_sample:.3g} ms per sample"
            f" (relative error {step.residual:.0%} over {step.measurements:,} measurements); batches of"
            f" {performance.best_batch(*parallelism):,} reach a target fastest"
            + (", judged by speed alone, since noise_scale= is not given." if self._noise_scale is None else ".")
        )
        if shows_figures(trainer):
            show(trainer, "probe/time", performance.plot(*parallelism))


def _parallelism(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the number of ranks or clients that train at once, and of steps between two exchanges."""
    record = getattr(trainer.strategy, "last_round", None)
    if record is None:
        return trainer.world_size, 1
    steps = record.local_steps[record.local_steps > 0]
    return max(1, len(steps)), max(1, round(float(steps.mean()))) if len(steps) else 1
