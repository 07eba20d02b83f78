"""Snapshots for dry runs of clients: metric states, and the memory saved for backward."""

from __future__ import annotations

from collections.abc import Callable

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
