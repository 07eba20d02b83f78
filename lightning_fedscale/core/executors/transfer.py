"""Transfer of local batches to the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_fedscale.core.lightning.module_state import moved_by_hooks

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Transfer:
    """Moves local batches to the device, converts them to the Trainer's precision, and calls the user's hooks.

    Args:
        trainer: the Trainer, about to fit.

    Attributes:
        has_hooks: whether the user's module or data module has transfer hooks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._device = trainer.strategy.root_device
        owners = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
        self.has_hooks = any(owner is not None and is_overridden(hook, owner) for owner in owners for hook in _HOOKS)

    def __call__(self, batch: Any) -> Any:
        """Return the batch on the device."""
        trainer = self._trainer
        batch = trainer.precision_plugin.convert_input(batch)
        if self.has_hooks:
            return moved_by_hooks(trainer, batch)
        return batch if _is_on(batch, self._device) else move_data_to_device(batch, self._device)

    def ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the same batches; the next one is copied to a CUDA device while the present one is used.

        With transfer hooks nothing is copied ahead, since they may draw random numbers.
        """
        if self._device.type != "cuda" or self.has_hooks:
            return batches
        return _ahead(batches, self._device)


def _ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: list[tuple[Any, Any]] = []
    for batch in batches:
        # This copy may reuse the memory of an earlier batch, which Python has dropped but whose step may still read it.
        # Tensor.record_stream does not help, since the tensors of a batch of an arbitrary type cannot be found.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            moved = move_data_to_device(pin_memory(batch), device)  # type: ignore[no-untyped-call]
            waiting.append((moved, side.record_event()))
        if len(waiting) > 1:
            yield _arrived(*waiting.pop(0), device)
    if waiting:
        yield _arrived(*waiting.pop(0), device)


def _arrived(batch: Any, event: Any, device: torch.device) -> Any:
    torch.cuda.current_stream(device).wait_event(event)
    return batch


def _is_on(batch: Any, device: torch.device) -> bool:
    """Return whether a batch of a usual type is on the device; False for other types, which can move themselves."""
    if isinstance(batch, dict):
        batch = tuple(batch.values())
    tensors = batch if type(batch) in (list, tuple) else (batch,)
    return all(type(tensor) is Tensor and tensor.device == device for tensor in tensors)
