"""What keeps clients from training side by side: seen beforehand, or noticed when they first do."""

from __future__ import annotations

import random
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_fedscale.executors.hooks import PER_LOCAL_BATCH
from lightning_fedscale.executors.lean import is_patched, why_not_lean
from lightning_fedscale.executors.python_state import PythonState
from lightning_fedscale.executors.side_by_side import Obstacle
from lightning_fedscale.executors.stacked_optimizer import ELEMENTWISE

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def why_not(trainer: pl.Trainer) -> str | None:
    """Why clients of this Trainer's module cannot train side by side, as far as can be seen without trying."""
    module, callbacks = trainer.lightning_module, trainer.callbacks  # type: ignore[attr-defined]
    if (obstacle := why_not_lean(trainer)) is not None:
        return obstacle
    if len(trainer.optimizers) > 1:
        return "there are several optimizers"
    optimizer: Any = trainer.optimizers[0]
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is none of torch's optimizers that treat every element alone"
    if is_patched(optimizer):
        return f"the step of this {type(optimizer).__name__} is not that of its class"
    if any((optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *_GLOBAL_HOOKS)):
        return "the optimizer has step hooks"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    for name, parameter in module.named_parameters():
        hooked: Any = parameter
        if hooked._backward_hooks or hooked._post_accumulate_grad_hooks:
            return f"there is a hook on the gradient of {name!r}"
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            return f"the gradient of {name!r} is sparse"
    if hook := next((hook for hook in PER_LOCAL_BATCH if is_overridden(hook, module)), None):
        return f"the module has its own {hook}"
    if type(module).log is not pl.LightningModule.log:
        return "the module has its own log"
    for callback in callbacks:
        if hasattr(callback, "on_client_start"):
            return f"{type(callback).__name__} wants to know when a client starts"
    return None


class SharedState:
    """Looks for what a module does beside its tensors, which would be shared by clients that train side by side."""

    def __init__(self, module: pl.LightningModule, state: PythonState) -> None:
        self._module = module
        self._state = state
        self._draws = _draws()
        self._versions = self._versions_now()

    def check(self) -> None:
        """After a step.

        Raises:
            Obstacle: if these clients must train one after the other.
        """
        if self._versions_now() != self._versions:
            raise Obstacle("training_step writes to tensors that all clients share")
        if _draws() != self._draws:
            raise Obstacle("training_step draws from Python's or numpy's random numbers")
        if PythonState(self._module) != self._state:
            raise Obstacle("training_step changes attributes of the module")

    def _versions_now(self) -> list[int]:
        tensors = (*self._module.parameters(), *self._module.buffers())
        return [tensor._version for tensor in tensors]


def _draws() -> tuple[Any, bytes, Any]:
    """The state of Python's and numpy's global generators."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["key"].tobytes(), (numpy["state"]["pos"], numpy["has_gauss"])


def explained(error: Exception) -> str:
    """An error in one line, with the last line of the user's own code that led to it."""
    if isinstance(error, Obstacle):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}{where}"


_LIBRARIES = (
    *(str(Path(str(package.__file__)).parent) for package in (torch, pl, torchmetrics)),
    str(Path(__file__).parents[1]),
)


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES) or filename.startswith("<")
