"""Reasons why clients cannot be vectorized, found before training or in the first vectorized steps."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_fedscale.core.executors.fast_step import is_patched, reason_for_lightning_step
from lightning_fedscale.core.executors.vectorized.optimizer import ELEMENTWISE
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable
from lightning_fedscale.core.lightning.hooks import PER_LOCAL_BATCH
from lightning_fedscale.utils import randomness

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def reason_not_vectorizable(trainer: pl.Trainer) -> str | None:
    """Return why clients of this Trainer cannot be vectorized; None if only a trial can show a reason."""
    module, callbacks = trainer.lightning_module, trainer.callbacks  # type: ignore[attr-defined]
    if (reason := reason_for_lightning_step(trainer)) is not None:
        return reason
    if len(trainer.optimizers) > 1:
        return "there are several optimizers"
    optimizer: Any = trainer.optimizers[0]
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is not one of torch's elementwise optimizers, such as SGD and AdamW"
    if is_patched(optimizer):
        return f"this {type(optimizer).__name__} has a patched step or zero_grad"
    if any((optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *_GLOBAL_HOOKS)):
        return "the optimizer has step hooks"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    for name, parameter in module.named_parameters():
        hooked: Any = parameter
        if hooked._backward_hooks or hooked._post_accumulate_grad_hooks:
            return f"a hook is registered on the gradient of {name!r}"
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            return f"the gradient of {name!r} is sparse"
    if hook := next((hook for hook in PER_LOCAL_BATCH if is_overridden(hook, module)), None):
        return f"the module overrides {hook}"
    if type(module).log is not pl.LightningModule.log:
        return "the module overrides log"
    for callback in callbacks:
        if hasattr(callback, "on_client_start"):
            return f"{type(callback).__name__}.on_client_start must be called when a client starts"
    return None


class Surroundings:
    """State outside of the clients that vectorized training must not change, since all clients would share it.

    Args:
        module: the user's module.
        device: where it trains.
    """

    def __init__(self, module: pl.LightningModule, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._generators: randomness.GlobalState | None = None
        self._environment: dict[str, str] = {}
        self._versions: list[int] = []

    def note(self) -> None:
        """Record the present state before the user's code runs."""
        if self._generators is None:
            self._generators, self._environment = randomness.capture(self._device), dict(os.environ)
        self._versions = self._versions_now()

    def check(self) -> None:
        """Check the state after the user's code ran.

        Raises:
            NotVectorizable: if the state changed, so that these clients must train sequentially.
        """
        if self._generators is None:
            return
        if self._versions_now() != self._versions:
            raise NotVectorizable("training_step writes to tensors that all clients share")
        if os.environ != self._environment:
            raise NotVectorizable("training_step changes environment variables")
        now = randomness.capture(self._device)
        if not all(map(_is_same_generator, now, self._generators)):
            raise NotVectorizable("training_step draws Python's or numpy's random numbers; use torch's instead")

    def restore(self) -> None:
        """Restore the global generators and the environment variables."""
        if self._generators is None:
            return
        randomness.restore(self._generators, self._device)
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)

    def _versions_now(self) -> list[int]:
        tensors = (*self._module.parameters(), *self._module.buffers())
        return [tensor._version for tensor in tensors]


def _is_same_generator(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return torch.equal(mine, theirs)
    # numpy's state holds an array.
    return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)) if mine is not None else theirs is None


def explained(error: Exception) -> str:
    """Describe an error in one line, with the last line of the user's own code in its traceback."""
    if isinstance(error, NotVectorizable):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}{where}"


_LIBRARIES = (
    *(str(Path(str(package.__file__)).parent) for package in (torch, pl, torchmetrics)),
    str(Path(__file__).parents[3]),
)


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES) or filename.startswith("<")
