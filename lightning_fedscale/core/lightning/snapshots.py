"""Snapshots for dry runs of clients: metric states, and the memory saved for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torchmetrics import Metric


class MetricStates:
    """The module's metrics as they are now.

    Lightning: `_copy_state_dict`, `_update_count`, `_forward_cache` and `_computed` of a torchmetrics object are all
    that an update changes. `state_dict()` has only what is persistent, which by default is nothing.
    Upgrade: `Metric.forward` and `Metric.reset` of torchmetrics in `metric.py`.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._states = [
            (part, part._copy_state_dict(), part._update_count, part._forward_cache)
            for part in module.modules()
            if isinstance(part, Metric)
        ]
        # Of networks inside them.
        self._buffers = [(buffer, buffer.clone()) for metric, *_ in self._states for buffer in metric.buffers()]

    def restore(self) -> None:
        """Restore the metrics."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for metric, state, count, cache in self._states:
            for name, before in state.items():
                setattr(metric, name, before)
            metric._update_count, metric._forward_cache, metric._computed = count, cache, None

    def agree(self, other: MetricStates, close: Callable[[Tensor, Tensor], bool]) -> bool:
        """Return whether the metrics have the same number of updates and close values."""
        for (_, mine, count, _), (_, theirs, other_count, _) in zip(self._states, other._states, strict=True):
            if count != other_count:
                return False
            for name, value in mine.items():
                pairs = value, theirs[name]
                left, right = ([each] if isinstance(each, Tensor) else list(each) for each in pairs)
                if len(left) != len(right) or not all(map(close, left, right)):
                    return False
        return True


class ResultsBefore:
    """Lightning's results of logged values as they are now.

    Lightning: a result replaces its `value`, `cumulated_batch_size`, `_forward_cache`, `_update_count` and
    `_computed` with each value, and `has_reset` says whether the values are of an earlier epoch.
    Upgrade: `_ResultMetric` in `trainer/connectors/logger_connector/result.py`.

    Args:
        results: of the training loop, by their keys.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results
        self._kept = {
            key: {n: vars(result)[n] for n in _OF_RESULT if n in vars(result)} for key, result in results.items()
        }

    def restore(self) -> list[str]:
        """Restore the results; return the keys of those that are new, which are removed."""
        for key, values in self._kept.items():
            vars(self._results[key]).update(values)
        new = [key for key in self._results if key not in self._kept]
        for key in new:
            del self._results[key]
        return new


_OF_RESULT = ("value", "cumulated_batch_size", "_forward_cache", "_update_count", "_computed", "has_reset")


class SavedBytes(saved_tensors_hooks):
    """Counts, inside the context, the bytes saved for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._seen.setdefault(tensor.data_ptr(), tensor) is tensor:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor
