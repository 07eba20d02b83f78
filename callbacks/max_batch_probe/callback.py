"""`MaxBatchProbe`: find the largest batch that fits before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.callbacks.max_batch_probe.agreement import explained, reason_of, smallest_of_ranks
from lightning_fedscale.callbacks.max_batch_probe.rank_probe import RankProbe
from lightning_fedscale.callbacks.max_batch_probe.report import log, report
from lightning_fedscale.callbacks.max_batch_probe.step_timing import StepTiming
from lightning_fedscale.core.lightning.train_data import TrainData
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.devices import DeviceClass, MemoryModel
from lightning_fedscale.devices.performance import PerformanceModel, StepTimes
from lightning_fedscale.devices.probe import ProbeResult
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils import randomness


class MaxBatchProbe(Callback):
    """Finds the largest batch that fits, before training, and trains with it.

    The peak memory of the module's own training step is predicted with fake tensors: without trial and error, without
    out-of-memory errors, and also for devices that are not present. On CUDA, at most two real steps on a copy of the
    module then confirm and calibrate the prediction. Afterwards module, optimizers, generators, metrics, loaders and
    loop counters are restored. All ranks take the smallest batch size that any of them found.

    It works with any single-device strategy, DDP, and `FederatedStrategy`, where it bounds the batch of every client;
    for clients on different hardware see `Population`. Each process probes its own batch size. The memory of validation
    is not considered. If samples have unequal lengths, the longest is probed.

    Args:
        budget: memory that training may use: bytes, "8GiB", a `DeviceClass` or the name of one; "auto" for the free
            memory of each rank's device.
        headroom: fraction of the budget to leave free.
        verify: whether to run real steps; "auto" does on CUDA. True on a CPU runs them in a child process whose address
            space is limited to the budget.
        apply: set the batch size where the project keeps it: attribute or hyperparameter of the data module or module,
            else in the loader itself. False only reports, and never ends training: a failure is one warning.
        device_classes: device classes for which the largest batch is also reported, by name or as objects; None for
            those of the strategy's population.
        batch_arg_name: name under which the project keeps its batch size, if it is an unusual one.
        make_batch: returns a batch of so many samples, if collating the longest sample does not work.
        max_samples: largest batch to consider; None for the number of samples.
        noise_scale: the gradient noise scale in samples, if known: the fastest batch then accounts for the number of
            steps that each size needs.

    Attributes:
        result: a `ProbeResult` once ``fit`` has begun; also logged as ``probe/...`` and saved in checkpoints. A resumed
            run takes the batch size of its checkpoint and does not probe again.
        model: the `MemoryModel` of this rank, also if no batch fits; None after resuming.
        times: the steps timed since training began, without the first few; `performance` fits a model to them.

    Raises:
        TypeError, ValueError: for invalid arguments; in ``fit`` with ``apply=True``, if not even one sample fits, if
            there is no batch size to set, or if no batch can be made.
        RuntimeError: with ``apply=True``, if a step on a copy of the module fails.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> probe = MaxBatchProbe(budget="32KiB")
        >>> trainer = pl.Trainer(max_steps=1, callbacks=[probe], accelerator="cpu", logger=False,
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> probe.result.max_batch, probe.result.limited_by
        (64, 'samples')
    """

    def __init__(
        self,
        budget: int | str | DeviceClass = "auto",
        headroom: float = 0.1,
        verify: bool | Literal["auto"] = "auto",
        apply: bool = True,
        device_classes: Sequence[str | DeviceClass] | None = None,
        batch_arg_name: str | None = None,
        make_batch: Callable[[int], Any] | None = None,
        max_samples: int | None = None,
        noise_scale: float | None = None,
    ) -> None:
        self._probe = RankProbe(budget, headroom, verify, device_classes, batch_arg_name, make_batch, max_samples)
        if not isinstance(apply, bool):
            raise TypeError(f"apply={apply!r}: pass True to set the batch size, False to only report it.")
        if noise_scale is not None and (type(noise_scale) not in (int, float) or not noise_scale > 0):
            raise ValueError(f"noise_scale={noise_scale!r}: pass a number of samples above 0, or None if unknown.")
        self._apply = apply
        self._noise_scale = noise_scale
        self._timing = StepTiming(noise_scale)
        self._resumed: ProbeResult | None = None
        self._undo: Callable[[], None] | None = None
        self.result: ProbeResult | None = None
        self.model: MemoryModel | None = None

    @property
    def times(self) -> StepTimes:
        """The steps timed since training began."""
        return self._timing.times

    def performance(self, sync: float | Callable[[int], float] = 0.0) -> PerformanceModel:
        """Return the parallel performance model, fitted to the steps of this run.

        Args:
            sync: seconds that ranks or clients need to exchange the model, or a function of their number; see
                `lightning_fedscale.devices.communication`.

        Raises:
            ValueError: if no step has been timed.
        """
        return self._timing.performance(sync, self._largest)

    # ---- hooks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probe, agree with the other ranks, set the batch size and report it."""
        check_package(self, trainer)
        self.model, self._timing = None, StepTiming(self._noise_scale)
        with randomness.untouched():
            try:
                found, data = self._find(trainer, pl_module)
                self.result = self._set(found, data)
                report(trainer, self.result, self.model, applied=self._apply)
            except Exception as error:
                if self._apply:
                    raise explained(error) from error
                reason = reason_of(error).removeprefix("MaxBatchProbe: ")
                rank_zero_warn(f"MaxBatchProbe: nothing was probed, and the batch size is unchanged: {reason}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing a step."""
        self._timing.begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time of a step."""
        self._timing.end(trainer, batch, batch_idx)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Record the times of the round's clients."""
        self._timing.add_round(record)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the model of step times."""
        log(trainer, self._timing.metrics(trainer, self._largest))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the result again, since TensorBoard's charts do not show a single value, and report the step times."""
        if self.result is not None:
            log(trainer, self.result.metrics())
        self._timing.report(trainer, self._largest)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo the changes made to the project for the run."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    # ---- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: all results, but nothing that belongs to a Trainer, its module or its data."""
        return {**vars(self), "_undo": None, "model": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the result, for the checkpoint."""
        return {} if self.result is None else {"result": self.result.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the batch size of the checkpoint."""
        if (result := state_dict.get("result")) is not None:
            self._resumed = ProbeResult(**result)

    # ---- the batch size

    @property
    def _largest(self) -> int | None:
        return None if self.result is None else self.result.max_batch

    def _find(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[ProbeResult, TrainData]:
        """Return the largest batch of all ranks, or that of the checkpoint, and the training data."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            rank_zero_info(f"MaxBatchProbe: training resumes with the checkpoint's batch size, {resumed.max_batch}.")
            return resumed, self._probe.data(trainer)
        keep_model = partial(setattr, self, "model")
        found = smallest_of_ranks(trainer, lambda: self._probe.run(trainer, module, keep_model))
        return found.result, found.data

    def _set(self, found: ProbeResult, data: TrainData) -> ProbeResult:
        """Set the batch size, if it is to be applied, and return the result with the sizes before and after."""
        before = data.batch_size
        if self._apply:
            self._undo = self._probe.set_batch_size(data, found.max_batch)
        sizes = {
            "batch_size": found.max_batch if self._apply else before,
            "previous": before if found.previous is None else found.previous,
        }
        return ProbeResult(**{**found.state_dict(), **sizes})
