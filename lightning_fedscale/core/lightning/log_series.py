"""The values that clients log under one name, until Lightning's own result takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _get_default_dtype, _ResultMetric
from torch import Tensor
from torchmetrics import Metric

from lightning_fedscale.types import FloatArray


class LogSeries:
    """Collects the values of one name from one hook until they are passed to Lightning's result.

    Lightning: a `_ResultMetric` adds up `value`; its `_forward_cache`, `_update_count` and `_computed` are the step
    value, the number of updates and the reduced value, in the precision of `_get_default_dtype`. No public function
    adds several values at once.
    Upgrade: `_ResultMetric` in `trainer/connectors/logger_connector/result.py`.

    Args:
        result: Lightning's result, as made at the first value.

    Attributes:
        latest: number of the local batch within the round whose value is the step value; -1 if there is none.
    """

    def __init__(self, result: _ResultMetric) -> None:
        meta = result.meta
        self.result = result
        self.hook, self.name = meta.fx, meta.name
        self.is_mean = result.is_tensor and meta.on_epoch and meta.is_mean_reduction
        self.is_step = meta.on_step and meta.logger
        self._fold = np.maximum if meta.is_max_reduction else np.minimum if meta.is_min_reduction else np.add
        self._wide = False  # whether a value was float64
        self.latest = -1
        self.drop()

    def drop(self) -> None:
        """Forget the waiting values."""
        self.positions: list[int] = []
        self.values: list[Tensor | float] = []  # each a number, or a vector of values at several positions
        self._sizes: list[int] = []

    def add(self, position: int, value: Tensor | float, size: int) -> None:
        """Add one waiting value."""
        if not self.result.meta.on_epoch and len(self.positions) == 1 and self.positions[0] < position:
            self.drop()  # only the last one is ever shown
        self.positions.append(position)
        self.values.append(value)
        self._sizes.append(size)
        self._widen(value)

    def add_many(self, positions: list[int], values: Tensor, sizes: list[int]) -> None:
        """Add the waiting values of several positions."""
        self.positions += positions
        self.values.append(values)
        self._sizes += sizes
        self._widen(values)

    def show(self, metric: Metric, position: int) -> None:
        """Set a torchmetrics object, which reduces itself when Lightning calls it."""
        self.latest = position
        self.result.value, self.result._forward_cache = metric, metric._forward_cache
        self._updated(1)

    def hand_over(self, start: FloatArray, numbers: FloatArray, device: torch.device) -> None:
        """Reduce the waiting values in Lightning's order, in the precision of its results.

        Args:
            start: Lightning's result so far, one number.
            numbers: the waiting values.
            device: the device of the result.
        """
        result, kind = self.result, np.float64 if self._wide else np.float32
        order = np.argsort(self.positions, kind="stable")
        values: Any = numbers.astype(kind)[order]
        if result.meta.on_step and (last := self.positions[order[-1]]) >= self.latest:
            self.latest, result._forward_cache = last, torch.tensor(values[-1], device=device)
        if self.is_mean:
            values = values * np.array(self._sizes, kind)[order]
            result.cumulated_batch_size = result.cumulated_batch_size.to(device) + sum(self._sizes)
        if result.meta.on_epoch:
            wide = self._wide or result.value.dtype is torch.float64
            start = start.astype(np.float64 if wide else np.float32)
            total = self._fold.accumulate(np.concatenate([start, values]))[-1]
            result.value = torch.tensor(total, device=device)
        else:
            result.value = result._forward_cache
        self._updated(len(values))
        self.drop()

    def _widen(self, value: Tensor | float) -> None:
        dtype = value.dtype if isinstance(value, Tensor) else None
        if dtype is not torch.float32 and torch.float64 in (dtype, _get_default_dtype()):
            self._wide = True

    def _updated(self, times: int) -> None:
        self.result._computed = None
        self.result._update_count += times
        self.result.has_reset = False


def is_single(value: Any) -> bool:
    """Return whether a value is one number, or a torchmetrics object."""
    return not isinstance(value, Tensor) or value.numel() == 1


def read_numbers(values: list[Any], device: torch.device) -> FloatArray:
    """Flatten tensors and plain numbers into one array; all tensors are read from the device at once."""
    tensors = [value.reshape(-1).to(device) for value in values if isinstance(value, Tensor)]
    # `cat` uses the widest floating-point type, but would convert integers to that type with a loss of precision.
    tensors = [tensor if tensor.is_floating_point() else tensor.double() for tensor in tensors]
    read: FloatArray = torch.cat(tensors or [torch.empty(0)]).double().cpu().numpy()
    if len(tensors) == len(values):
        return read
    was_tensor = np.repeat(
        [isinstance(value, Tensor) for value in values],
        [value.numel() if isinstance(value, Tensor) else 1 for value in values],
    )
    numbers = np.empty(len(was_tensor))
    numbers[was_tensor] = read
    numbers[~was_tensor] = [value for value in values if not isinstance(value, Tensor)]
    return numbers


def step_value(value: Any) -> Tensor | float | None:
    """Return a logged value as one number that later changes do not reach; None if it is none.

    Lightning: `_forward_cache` of a torchmetrics object is its value for the last batch, which `forward` returns only
    to its caller.
    Upgrade: `Metric.forward` of torchmetrics in `metric.py`.
    """
    value = value._forward_cache if isinstance(value, Metric) else value
    if value is None or not is_single(value):
        return None
    return value.detach().clone() if isinstance(value, Tensor) else float(value)
