"""`MaxBatchProbe`: find the largest batch that fits before training starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fedscale.core.lightning.handover import has_gradient_buckets
from lightning_fedscale.core.lightning.loggers import Layout, lay_out, show, shows_figures
from lightning_fedscale.core.lightning.side_effects import undone
from lightning_fedscale.core.lightning.train_data import TrainData
from lightning_fedscale.core.lightning.trainer_state import metric_stores
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.devices import DeviceClass, MemoryModel, device_class, estimate_memory
from lightning_fedscale.devices.memory import SIMULATED
from lightning_fedscale.devices.performance import PerformanceModel, StepTimes
from lightning_fedscale.devices.probe import Measure, ProbeResult, probe
from lightning_fedscale.devices.profiling.batches import samples_in
from lightning_fedscale.devices.profiling.real_step import RealStep, real_step, real_step_on_cuda
from lightning_fedscale.devices.profiling.samples import LargestSample
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils import collectives, randomness
from lightning_fedscale.utils.foreign import is_really
from lightning_fedscale.utils.memory import format_bytes, free_memory, parse_bytes

_WARM_UP = 3
"""Steps or rounds at the beginning that are not timed, since they take longer."""

_LAYOUT: Layout = {
    "MaxBatchProbe": {
        "largest batch": ["Multiline", ["probe/max_batch", "probe/batch_size$", "probe/best_batch$"]],
        "memory": ["Multiline", ["probe/budget_bytes$", "probe/predicted_bytes$", "probe/measured_bytes$"]],
        "fixed seconds per step": ["Multiline", ["probe/step_fixed_seconds$"]],
        "seconds per sample": ["Multiline", ["probe/step_seconds_per_sample$"]],
    }
}


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
        model: the `MemoryModel` of this rank; None after resuming.
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
        self._budget = _checked_budget(budget)
        if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
            raise ValueError(f"headroom={headroom!r}: pass the share of the budget to leave free, in [0, 1).")
        if verify not in ("auto", True, False):
            raise ValueError(f"verify={verify!r}: choose 'auto', True or False.")
        if not isinstance(apply, bool):
            raise TypeError(f"apply={apply!r}: pass True to set the batch size, False to only report it.")
        if batch_arg_name is not None and not isinstance(batch_arg_name, str):
            raise TypeError(f"batch_arg_name={batch_arg_name!r}: pass the name of an attribute or hyperparameter.")
        if make_batch is not None and not callable(make_batch):
            raise TypeError(f"make_batch={make_batch!r}: pass a function of the number of samples.")
        if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
            raise ValueError(f"max_samples={max_samples!r}: pass a number of samples, at least 1, or None.")
        if noise_scale is not None and (type(noise_scale) not in (int, float) or not noise_scale > 0):
            raise ValueError(f"noise_scale={noise_scale!r}: pass a number of samples above 0, or None if unknown.")
        if isinstance(device_classes, (str, DeviceClass)):
            raise TypeError(f"device_classes={device_classes!r}: pass a list, [{device_classes!r}].")
        if device_classes is not None and not isinstance(device_classes, Sequence):
            raise TypeError(f"device_classes={device_classes!r}: pass a list of names, ['phone', 't4'], or None.")
        self._headroom = headroom
        self._verify = verify
        self._apply = apply
        self._classes = None if device_classes is None else [device_class(each) for each in device_classes]
        self._batch_arg_name = batch_arg_name
        self._make_batch = make_batch
        self._max_samples = max_samples
        self._noise_scale = noise_scale
        self._begun = 0.0
        self._resumed: ProbeResult | None = None
        self._undo: Callable[[], None] | None = None
        self.result: ProbeResult | None = None
        self.model: MemoryModel | None = None
        self.times = StepTimes()

    # ---- hooks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probe, agree with the other ranks, set the batch size and report it."""
        check_package(self, trainer)
        self.model, self.times = None, StepTimes()
        with randomness.untouched():
            try:
                self._prepare(trainer, pl_module)
            except Exception as error:
                if self._apply:
                    raise _clear(error) from error
                rank_zero_warn(f"MaxBatchProbe: nothing was probed, and training is as without it: {_reason(error)}")

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            found, data = self._agree(trainer, lambda: self._look(trainer, pl_module))
        else:
            found, data = resumed, self._data(trainer)
            rank_zero_info(f"MaxBatchProbe: goes on with the checkpoint's batch size, {found.max_batch}.")
        previous = data.batch_size
        if self._apply:
            self._undo = data.set_batch_size(found.max_batch, self._batch_arg_name)
        self.result = ProbeResult(
            **{
                **found.state_dict(),
                "batch_size": found.max_batch if self._apply else previous,
                "previous": previous if found.previous is None else found.previous,
            }
        )
        self._report(trainer, self.result)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing a step; its time is used only without federated rounds."""
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time of a step, unless it is a federated round."""
        if not isinstance(trainer.strategy, FederatedStrategy) and batch_idx >= _WARM_UP:
            with suppress(Exception):  # batches of unknown size are not timed
                self._time(1, samples_in(batch), time.perf_counter() - self._begun)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Record the times of the round's clients."""
        if record.round >= _WARM_UP:
            for row in zip(record.local_steps, record.samples, record.client_seconds, strict=True):
                self._time(*map(float, row))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the model of step times."""
        if not self.times.measurements:
            return
        step = self.times.fit()
        metrics = {"probe/step_residual": step.residual, "probe/steps_timed": float(step.measurements)}
        if step.identified:
            metrics |= {"probe/step_fixed_seconds": step.fixed, "probe/step_seconds_per_sample": step.per_sample}
            metrics["probe/best_batch"] = float(self._best(trainer))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the result again, and plot time against batch size if it is identified."""
        if self.result is not None:
            self._log(trainer, self.result)  # TensorBoard's charts do not show a single value
        if not self.times.measurements or not (step := self.times.fit()).identified:
            return
        rank_zero_info(
            f"MaxBatchProbe: a step takes {1000 * step.fixed:.3g} ms and {1000 * step.per_sample:.3g} ms per sample"
            f" (relative error {step.residual:.0%} over {step.measurements:,} measurements); fastest to the target:"
            f" batches of {self._best(trainer):,}"
            + (", by their speed alone, as noise_scale= is not given." if self._noise_scale is None else ".")
        )
        if shows_figures(trainer):
            show(trainer, "probe/time", self.performance().plot(*self._duty(trainer)))

    def performance(self, sync: float | Callable[[int], float] = 0.0) -> PerformanceModel:
        """Return the parallel performance model, fitted to the steps of this run.

        Args:
            sync: seconds that ranks or clients need to exchange the model, or a function of their number; see
                `lightning_fedscale.devices.communication`.

        Raises:
            ValueError: if no step has been timed.
        """
        largest = None if self.result is None else self.result.max_batch
        return PerformanceModel(self.times.fit(), sync, self._noise_scale, largest)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo the changes made to the project for the run."""
        if self._undo is not None:
            self._undo()
            self._undo = None

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

    # ---- time

    def _time(self, steps: float, samples: float, seconds: float) -> None:
        self.times = self.times.add(steps=steps, samples=samples, seconds=seconds)

    def _best(self, trainer: pl.Trainer) -> int:
        return self.performance().best_batch(*self._duty(trainer))

    def _duty(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Return the number of ranks or clients that train at once, and of steps between two exchanges."""
        record = getattr(trainer.strategy, "last_round", None)
        if record is None:
            return trainer.world_size, 1
        steps = record.local_steps[record.local_steps > 0]
        return max(1, len(steps)), max(1, round(float(steps.mean()))) if len(steps) else 1

    # ---- one rank

    def _data(self, trainer: pl.Trainer) -> TrainData:
        data = TrainData(trainer, need_samples=self._make_batch is None)
        data.keepers(self._batch_arg_name)
        return data

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[ProbeResult, TrainData]:
        _check_strategy(trainer)
        with undone(trainer):
            data = self._data(trainer)
            return self._probe(trainer, module, data), data

    def _probe(self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainData) -> ProbeResult:
        device = trainer.strategy.root_device
        batch, make_batch, note = self._batches(data)
        self.model = model = estimate_memory(
            module,
            batch,
            precision=trainer.precision,
            make_batch=make_batch,
            accumulate=_accumulation(trainer),
            extras=_extras(trainer),
            trainer=trainer,
            usual=data.batch_size,
        )
        for found in note:
            if found.total is not None and 64 < found.looked_at < found.total:
                rank_zero_warn(
                    f"MaxBatchProbe: {found.looked_at} of {found.total} samples were looked at for the longest; pass"
                    " make_batch= with longer ones if there are any."
                )
        if model.fallback:
            rank_zero_warn(
                "MaxBatchProbe: the training step cannot run on tensors without contents"
                f" ({model.fallback}); real ones on a copy of the module are used instead."
            )
        budget = self._bytes(trainer, device)
        wanted = self._verify if self._verify != "auto" else device.type == "cuda"
        measure, physical = self._measure(trainer, model, budget, device) if wanted else (None, None)
        return probe(
            model,
            budget,
            headroom=self._headroom,
            limit=self._limit(trainer, data),
            measure=measure,
            physical=physical,
            device_classes=self._classes_of(trainer),
        )

    def _batches(self, data: TrainData) -> tuple[Any, Callable[[int], Any] | None, list[LargestSample]]:
        """Return a batch of the largest samples, a function for others if it cannot be resized, and those samples."""
        if self._make_batch is not None:
            return self._make_batch(2), self._make_batch, []
        make, note = data.largest()
        batch = make(2)
        if data.gives_batches:
            return batch, None, note
        other = make(4)
        if _numbers(batch) == _numbers(other) > 0:
            raise ValueError(
                f"collate_fn: of 2 samples and of 4 it makes {_rows(batch)} rows, so batches cannot be resized: pass"
                " make_batch=, a function of the number of samples that returns such a batch."
            )
        # Non-tensors, such as a list of names, would not be resized: then batches of other sizes are collated.
        return batch, None if _rows(batch) == 2 and _others(batch) == _others(other) is not None else make, note

    def _bytes(self, trainer: pl.Trainer, device: torch.device) -> int:
        if self._budget is not None:
            return self._budget
        free = free_memory(device)
        if device.type == "cpu":  # the processes of this machine share its memory
            free //= max(1, getattr(trainer.strategy, "num_processes", 1))
        # The memory model includes the module's weights, which are already allocated.
        return free + _bytes_of(trainer.lightning_module)

    def _limit(self, trainer: pl.Trainer, data: TrainData) -> int | None:
        limits = [self._max_samples]
        if (samples := data.samples) is not None:
            limits.append(max(1, math.ceil(samples / trainer.world_size)))
            if isinstance(trainer.strategy, FederatedStrategy):
                sizes = trainer.strategy.client_sizes(data.loaders[0].dataset)
                # With drop_last, a larger batch would leave the smallest client without batches.
                limits.append(int(sizes.min() if data.drops_tails else sizes.max()))
        return min((limit for limit in limits if limit is not None), default=None)

    def _classes_of(self, trainer: pl.Trainer) -> Sequence[DeviceClass]:
        if self._classes is not None:
            return self._classes
        population = getattr(trainer.strategy, "population", None)
        return () if population is None else population.classes

    def _measure(
        self, trainer: pl.Trainer, model: MemoryModel, budget: int, device: torch.device
    ) -> tuple[Measure, int | None]:
        def measure(batch: int) -> RealStep:
            if device.type == "cuda":
                done = real_step_on_cuda(model.real_step(batch), device)
            else:
                done = real_step(model.real_step(batch), budget)
                if not done.fits and not done.out_of_memory:
                    raise RuntimeError(f"MaxBatchProbe: a real step with {batch} samples failed: {done.reason}")
            self._tell(trainer, model.cost(batch).flops * (1 + _accumulation(trainer)))  # two optimizer steps
            return done

        # The module itself stays in memory next to its copy.
        return measure, int(free_memory(device) * (1 - self._headroom)) if device.type == "cuda" else None

    def _tell(self, trainer: pl.Trainer, flops: float) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (hook := getattr(callback, "on_probe", None)) is not None:
                hook(trainer, flops=flops)

    # ---- all ranks

    def _agree(
        self, trainer: pl.Trainer, work: Callable[[], tuple[ProbeResult, TrainData]]
    ) -> tuple[ProbeResult, TrainData]:
        """Return the smallest batch of all ranks; a failure on one is raised on all, so that none waits forever."""
        failure: Exception | None = None
        result: ProbeResult | None = None
        try:
            result, data = work()
        except Exception as error:
            failure = error
        own = result.max_batch if result is not None else 0
        answers = collectives.gather_over_ranks(
            [own, "" if failure is None else _reason(failure)], trainer.strategy.root_device
        )
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(answers):
            if reason:
                raise RuntimeError(f"MaxBatchProbe: the probe failed on another rank ({rank}): {reason}")
        assert result is not None
        if (smallest := min(batch for batch, _ in answers)) < own:
            assert self.model is not None
            with undone(trainer):
                predicted, parts = self.model.peak(smallest), self.model.breakdown(smallest)
            agreed = {
                "max_batch": smallest,
                "predicted_bytes": predicted,
                "parts": parts,
                "limited_by": "another rank",
            }
            result = ProbeResult(**{**result.state_dict(), **agreed})
        return result, data

    def _log(self, trainer: pl.Trainer, result: ProbeResult) -> dict[str, float]:
        metrics = result.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        return metrics

    def _report(self, trainer: pl.Trainer, result: ProbeResult) -> None:
        metrics = self._log(trainer, result)
        lay_out(trainer, _LAYOUT)
        if self.model is not None and shows_figures(trainer):
            budgets = {"budget": result.budget, "with headroom": int(result.budget * (1 - result.headroom))}
            show(trainer, "probe/memory", self.model.plot(budgets=budgets))
        metric_stores(trainer).watched.update({k: torch.tensor(v) for k, v in metrics.items()})
        largest = max(result.parts, key=lambda part: result.parts[part])
        measured = "" if result.measured_bytes is None else f", measured {format_bytes(result.measured_bytes)}"
        measured += "" if result.measured_batch in (None, result.max_batch) else f" at {result.measured_batch}"
        rank_zero_info(
            f"MaxBatchProbe: a batch of {result.max_batch:,} samples takes {format_bytes(result.predicted_bytes)} of"
            f" {format_bytes(result.budget)}{measured}; most of it {largest}; limited by {result.limited_by}."
            + (f" What libraries keep is assumed: {result.assumed}." if result.assumed else "")
            + ("" if result.previous is None else f" Was {result.previous}.")
            + ("" if self._apply else " Nothing was changed.")
        )


def _checked_budget(budget: object) -> int | None:
    if isinstance(budget, DeviceClass):
        return budget.memory
    if isinstance(budget, str) and budget != "auto":
        try:
            amount = parse_bytes("budget", budget)
        except ValueError:
            try:
                return device_class(budget).memory
            except ValueError as error:
                raise ValueError(
                    f"budget={budget!r}: pass bytes, an amount such as '8GiB', 'auto', or a device class: {error}"
                ) from None
    else:
        amount = parse_bytes("budget", budget)  # type: ignore[arg-type]
    if amount is not None and amount <= 0:
        raise ValueError(f"budget={budget!r}: pass more than 0 bytes.")
    return amount


def _check_strategy(trainer: pl.Trainer) -> None:
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__}: MaxBatchProbe predicts the memory of a module that every"
            " process holds whole: use a single device, DDP or FederatedStrategy."
        )


def _rows(batch: Any) -> int | None:
    """Return the size of the first dimension that all tensors of a batch share; None if there is none."""
    try:
        return samples_in(batch)
    except ValueError:
        return None


def _numbers(batch: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def _others(batch: Any) -> list[Any] | None:
    """Return the non-tensors of a batch; None if one of them may have a size that varies."""
    found = [leaf for leaf in tree_leaves(batch) if not isinstance(leaf, Tensor)]
    return found if all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in found) else None


def _reason(error: Exception) -> str:
    """Return one line that says what failed and what to do."""
    text = " ".join(str(error).split())
    if _is_ours(error):
        return text
    return (
        f"a training step on a copy of the module fails ({type(error).__name__}: {text:.300}). Pass make_batch=, a"
        " function of the number of samples that returns a batch which training_step takes, or leave the probe out."
    )


def _clear(error: Exception) -> Exception:
    if _is_ours(error):
        return error
    return RuntimeError(f"MaxBatchProbe: {_reason(error)} With apply=False training goes on without it.")


def _is_ours(error: Exception) -> bool:
    """Return whether this package raised the error; those of the project and of torch need an introduction."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("lightning_fedscale.")


def _accumulation(trainer: pl.Trainer) -> int:
    """Return the largest number of batches per optimizer step during the run."""
    counts = [getattr(trainer.strategy, "local_accumulation", trainer.accumulate_grad_batches)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_really(callback, GradientAccumulationScheduler):
            counts += callback.scheduling.values()
    return max(counts)


def _extras(trainer: pl.Trainer) -> dict[str, float]:
    """Return the memory of the strategy besides module and optimizers, in bytes per exchanged number."""
    if isinstance(trainer.strategy, FederatedStrategy):
        return dict(SIMULATED)
    if has_gradient_buckets(trainer.strategy):
        return {"gradient buckets": 4}
    return {}


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
