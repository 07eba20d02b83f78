"""The probe of one rank: the largest batch that fits its device, for the module and the data of a Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fedscale.core.lightning.handover import has_gradient_buckets
from lightning_fedscale.core.lightning.hooks import announce_probe
from lightning_fedscale.core.lightning.side_effects import undone
from lightning_fedscale.core.lightning.train_data import TrainData
from lightning_fedscale.devices import DeviceClass, MemoryModel, device_class, estimate_memory
from lightning_fedscale.devices.classes import budget_in_bytes
from lightning_fedscale.devices.memory import SIMULATED
from lightning_fedscale.devices.probe import Measure, ProbeResult, probe
from lightning_fedscale.devices.profiling.batches import samples_in
from lightning_fedscale.devices.profiling.real_step import RealStep, real_step, real_step_on_cuda
from lightning_fedscale.devices.profiling.samples import LargestSample
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.utils.foreign import is_really
from lightning_fedscale.utils.memory import free_memory


class Probed(NamedTuple):
    """What one rank has found.

    Attributes:
        result: the largest batch, and how it was found.
        model: the memory model of the module's training step.
        data: the training data, whose batch size can be set.
    """

    result: ProbeResult
    model: MemoryModel
    data: TrainData


class RankProbe:
    """Finds the largest batch for the device of this rank; the arguments are those of `MaxBatchProbe`.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """

    def __init__(
        self,
        budget: int | str | DeviceClass = "auto",
        headroom: float = 0.1,
        verify: bool | Literal["auto"] = "auto",
        device_classes: Sequence[str | DeviceClass] | None = None,
        batch_arg_name: str | None = None,
        make_batch: Callable[[int], Any] | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._budget = budget_in_bytes("budget", budget)
        if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
            raise ValueError(f"headroom={headroom!r}: pass the share of the budget to leave free, in [0, 1).")
        if verify not in ("auto", True, False):
            raise ValueError(f"verify={verify!r}: choose 'auto', True or False.")
        if batch_arg_name is not None and not isinstance(batch_arg_name, str):
            raise TypeError(f"batch_arg_name={batch_arg_name!r}: pass the name of an attribute or hyperparameter.")
        if make_batch is not None and not callable(make_batch):
            raise TypeError(f"make_batch={make_batch!r}: pass a function of the number of samples.")
        if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
            raise ValueError(f"max_samples={max_samples!r}: pass a number of samples, at least 1, or None.")
        if isinstance(device_classes, (str, DeviceClass)):
            raise TypeError(f"device_classes={device_classes!r}: pass a list, [{device_classes!r}].")
        if device_classes is not None and not isinstance(device_classes, Sequence):
            raise TypeError(f"device_classes={device_classes!r}: pass a list of names, ['phone', 't4'], or None.")
        self._headroom = headroom
        self._verify = verify
        self._classes = None if device_classes is None else [device_class(each) for each in device_classes]
        self._batch_arg_name = batch_arg_name
        self._make_batch = make_batch
        self._max_samples = max_samples

    def data(self, trainer: pl.Trainer) -> TrainData:
        """Return the training data.

        Raises:
            TypeError, ValueError: if its batch size cannot be found.
        """
        data = TrainData(trainer, need_samples=self._make_batch is None)
        data.keepers(self._batch_arg_name)
        return data

    def set_batch_size(self, data: TrainData, size: int) -> Callable[[], None]:
        """Set the batch size where the project keeps it, and return a function that undoes this."""
        return data.set_batch_size(size, self._batch_arg_name)

    def run(self, trainer: pl.Trainer, module: pl.LightningModule, on_model: Callable[[MemoryModel], None]) -> Probed:
        """Probe without lasting effects on the run.

        Args:
            trainer: the Trainer.
            module: the module.
            on_model: called with the memory model, which also shows why a search fails.

        Raises:
            TypeError, ValueError: if no batch can be made or not even one sample fits.
            Exception: whatever the module's training step raises on a copy of the module.
        """
        check_whole_module(trainer)
        with undone(trainer):
            data = self.data(trainer)
            model = self._model(trainer, module, data)
            on_model(model)
            device = trainer.strategy.root_device
            budget = self._bytes(trainer, device)
            wanted = self._verify if self._verify != "auto" else device.type == "cuda"
            measure, physical = self._measure(trainer, model, budget, device) if wanted else (None, None)
            result = probe(
                model, budget, headroom=self._headroom, limit=self._limit(trainer, data), measure=measure,
                physical=physical, device_classes=self._classes_of(trainer),
            )  # fmt: skip
            return Probed(result, model, data)

    def _model(self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainData) -> MemoryModel:
        batch, make_batch, largest = self._batches(data)
        model = estimate_memory(
            module, batch, precision=trainer.precision, make_batch=make_batch, accumulate=_accumulation(trainer),
            extras=_extras(trainer), trainer=trainer, usual=data.batch_size,
        )  # fmt: skip
        for found in largest:
            if found.total is not None and 64 < found.looked_at < found.total:
                rank_zero_warn(
                    f"MaxBatchProbe: the longest of {found.looked_at} samples (of {found.total}) is probed: if others"
                    " are longer, pass make_batch=, a function of the number of samples that returns a batch of these."
                )
        if model.fallback:
            rank_zero_warn(
                f"MaxBatchProbe: the training step cannot run on fake tensors ({model.fallback}): a copy of the module"
                " runs with real ones instead."
            )
        return model

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
                f"collate_fn: it makes {_rows(batch)} rows of 2 samples and of 4, so batches cannot be resized: pass"
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
            # Two optimizer steps.
            announce_probe(trainer, flops=model.cost(batch).flops * (1 + _accumulation(trainer)))
            return done

        # The module itself stays in memory next to its copy.
        return measure, int(free_memory(device) * (1 - self._headroom)) if device.type == "cuda" else None


def check_whole_module(trainer: pl.Trainer) -> None:
    """Refuse a strategy whose processes do not hold the whole module."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__}: MaxBatchProbe cannot predict the memory of a module that is"
            " divided between processes: choose a single device, DDP or FederatedStrategy."
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
