"""Predict the largest batch within a memory budget, and confirm it by at most two real steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from lightning_fedscale.devices.classes import DeviceClass, usable_bytes
from lightning_fedscale.devices.profiling.search import UNLIMITED
from lightning_fedscale.utils.memory import format_bytes

if TYPE_CHECKING:
    from lightning_fedscale.devices.memory import MemoryModel
    from lightning_fedscale.devices.profiling.real_step import RealStep

Measure: TypeAlias = Callable[[int], "RealStep"]
"""A function that runs a real step with this many samples."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe. It has only numbers, texts and dicts of these, so that checkpoints can store it.

    Attributes:
        max_batch: largest batch for the budget, on every rank.
        budget: bytes.
        headroom: share of the budget that was left free.
        predicted_bytes: peak of the memory model at ``max_batch``.
        measured_bytes: peak of the last real step that fitted; None if none was run or its memory is unknown.
        measured_batch: batch of that step.
        parts: the predicted bytes by kind.
        limited_by: "memory", "samples" if more would fit than there are, or "search" if more would fit than the search
            covers without a number of samples.
        bytes_per_sample: growth of the predicted peak at ``max_batch``.
        predicted: predicted peaks by batch size, of all sizes with a dry run.
        real_steps: number of real steps that were run, at most two.
        out_of_memory: number of them that ran out of memory.
        verified: whether a real step confirmed ``max_batch``, or two steps confirmed the line that leads to it.
        fallback: why fake tensors could not be used; empty if they could.
        assumed: why a typical value is assumed for the libraries' memory; empty if it was measured or is zero.
        device_classes: largest batch by device class, 0 if not even one sample fits.
        seconds: duration of the probe.
        batch_size: batch size of training after `MaxBatchProbe` has set it; None if nothing was set.
        previous: batch size before; None if unknown.
    """

    max_batch: int
    budget: int
    headroom: float
    predicted_bytes: int
    measured_bytes: int | None
    measured_batch: int | None
    parts: dict[str, int]
    limited_by: str
    bytes_per_sample: float
    predicted: dict[int, int]
    real_steps: int
    out_of_memory: int
    verified: bool
    fallback: str
    device_classes: dict[str, int]
    seconds: float
    batch_size: int | None = None
    previous: int | None = None
    assumed: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; `ProbeResult(**state)` restores it."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return the logged numbers by their logged names, without unknown ones."""
        values: dict[str, float | None] = {
            "probe/max_batch": self.max_batch,
            "probe/budget_bytes": self.budget,
            "probe/predicted_bytes": self.predicted_bytes,
            "probe/measured_bytes": self.measured_bytes,
            "probe/bytes_per_sample": self.bytes_per_sample,
            "probe/real_steps": self.real_steps,
            "probe/seconds": self.seconds,
            "probe/batch_size": self.batch_size,
        }
        values |= {f"probe/max_batch/{name}": batch for name, batch in self.device_classes.items()}
        return {name: float(value) for name, value in values.items() if value is not None}


def probe(
    model: MemoryModel,
    budget: int,
    *,
    headroom: float = 0.1,
    limit: int | None = None,
    measure: Measure | None = None,
    physical: int | None = None,
    device_classes: Sequence[DeviceClass] = (),
) -> ProbeResult:
    """Find the largest batch for a budget.

    Args:
        model: the memory model of `estimate_memory`.
        budget: bytes.
        headroom: share of the budget to leave free.
        limit: largest useful batch, such as the number of samples.
        measure: runs a real step with this many samples; None relies on the prediction.
        physical: most bytes that a real step may take here, if less than the budget.
        device_classes: device classes whose largest batch is predicted too.

    Raises:
        ValueError: if not even one sample fits the budget, or real steps contradict the prediction.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_fedscale.devices import estimate_memory
        >>> found = probe(estimate_memory(BoringModel(), torch.zeros(1, 32)), 100_000)
        >>> found.max_batch, found.limited_by, found.predicted_bytes <= 90_000
        (588, 'memory', True)
    """
    started = time.perf_counter()
    candidate = model.max_batch(budget, headroom, limit)
    check = _Confirmation(candidate, True)
    if measure is not None:
        check = _confirm(model, candidate, usable_bytes(budget, headroom), measure, limit, physical)
    batch = check.batch
    classes = {each.name: _of_class(model, each, headroom, limit) for each in device_classes}
    more = model.peak(batch + 1)
    return ProbeResult(
        max_batch=batch,
        budget=budget,
        headroom=headroom,
        predicted_bytes=model.peak(batch),
        measured_bytes=check.measured_bytes,
        measured_batch=check.measured_batch,
        parts=model.breakdown(batch),
        limited_by=_limit_of(batch, limit),
        bytes_per_sample=float(more - model.peak(batch)),
        predicted={size: model.peak(size) for size in model.sizes},
        real_steps=check.real_steps,
        out_of_memory=check.out_of_memory,
        verified=measure is not None and check.sound,
        fallback=model.fallback,
        assumed=model.assumed,
        device_classes=classes,
        seconds=time.perf_counter() - started,
    )


def _limit_of(batch: int, limit: int | None) -> str:
    if limit is None:
        return "search" if batch == UNLIMITED else "memory"
    return "samples" if batch == limit else "memory"


class _Confirmation(NamedTuple):
    batch: int
    sound: bool
    measured_bytes: int | None = None
    measured_batch: int | None = None
    real_steps: int = 0
    out_of_memory: int = 0


def _confirm(
    model: MemoryModel, candidate: int, usable: int, measure: Measure, limit: int | None, physical: int | None
) -> _Confirmation:
    """Run half the candidate to measure the error of the prediction, then the largest batch of the corrected one."""
    half = max(model.smallest, candidate // 2)
    first = measure(half)
    if not first.fits:
        quarter = max(model.smallest, half // 2)
        second = measure(quarter) if quarter < half else first
        if not second.fits:
            raise ValueError(
                f"budget={format_bytes(usable)}: a real step with {quarter} samples ran out of memory, although it is"
                f" predicted to take {format_bytes(model.peak(quarter))}: something else uses this memory. Free it, or"
                " pass a smaller budget."
            )
        return _Confirmation(quarter, True, second.peak_bytes, quarter, 2, 1)
    # A real step trains a copy, beside which nothing of the strategy is kept.
    besides = model.kept_besides
    predicted, taken = model.peak(half), (first.peak_bytes or 0) + besides
    physical = None if physical is None else physical + besides

    def within(amount: float) -> int:
        """Return the largest batch, from half the candidate to all of it, predicted to take at most this many bytes."""
        if amount <= predicted:
            return half
        return min(candidate, model.max_batch(int(amount), 0.0, limit))

    # Memory outside the model (workspaces, the allocator's fragments) is at best the same for every size ...
    wanted = within(usable - max(0, taken - predicted))
    tried = wanted if physical is None else min(wanted, within(physical - max(0, taken - predicted)))
    if tried == half:
        return _Confirmation(wanted, wanted == half, first.peak_bytes, half, 1, 0)
    second = measure(tried)
    if not second.fits:
        # ... and at worst in proportion to the predicted memory.
        careful = within(usable * predicted / max(taken, predicted))
        return _Confirmation(careful, careful == half, first.peak_bytes, half, 2, 1)
    grown = (second.peak_bytes or 0) + besides - taken
    if tried < wanted or taken + grown > usable:  # the line through both steps keeps the headroom
        slope = max(1.0, grown / max(1, model.peak(tried) - predicted))
        wanted = min(wanted, within(predicted + (usable - taken) / slope))
    return _Confirmation(wanted, True, second.peak_bytes, tried, 2, 0)


def _of_class(model: MemoryModel, device: DeviceClass, headroom: float, limit: int | None) -> int:
    usable = usable_bytes(device.memory, headroom)
    return 0 if model.peak(model.smallest) > usable else model.max_batch(device.memory, headroom, limit)
