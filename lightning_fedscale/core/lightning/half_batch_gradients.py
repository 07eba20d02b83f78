"""Gradients of both halves of a batch at the module's present weights, without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_fedscale.core.lightning.hooks import announce_probe
from lightning_fedscale.core.lightning.module_state import attached_trainer
from lightning_fedscale.devices.profiling.batches import changed, samples_in
from lightning_fedscale.devices.profiling.copies import copied
from lightning_fedscale.devices.profiling.stubs import TrainerView, silence
from lightning_fedscale.utils.randomness import untouched


class HalfBatchGradients(NamedTuple):
    """The gradients of both halves of a batch.

    Attributes:
        gradients: of each half, one tensor for each trainable parameter; zeros for unused parameters.
        samples: in each half.
    """

    gradients: tuple[list[Tensor], list[Tensor]]
    samples: tuple[int, int]

    def difference_square(self) -> Tensor:
        """Return the squared norm of the difference."""
        return squared_norm(torch._foreach_sub(*self.gradients))

    def mean(self) -> list[Tensor]:
        """Return the gradient of the whole batch, if the loss is a mean over its samples."""
        (first, second), (m, n) = self.gradients, self.samples
        return [a * (m / (m + n)) + b * (n / (m + n)) for a, b in zip(first, second, strict=True)]


def half_batch_gradients(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int = 0
) -> HalfBatchGradients | None:
    """Return the gradients of both halves of a batch, computed by the module's own ``training_step``.

    The step runs on a copy of the module, in the Trainer's precision. It logs nothing and does not change metrics,
    buffers, gradients or random generators. It costs one forward and backward pass and a copy of the module's memory.

    Args:
        trainer: the Trainer.
        module: holds the weights.
        batch: on the module's device; the loss must be a mean over its samples.
        batch_idx: number of the batch.

    Returns:
        None for a batch of a single sample, or if ``training_step`` returns no loss.

    Raises:
        ValueError: for a batch that cannot be cut.
        Exception: whatever the module raises.
    """
    samples = samples_in(batch, remedy="")
    if samples < 2:
        return None
    middle, gradients = samples // 2, list[list[Tensor]]()
    with untouched():
        copy = _ModuleCopy(trainer, module)
        for part in (slice(None, middle), slice(middle, None)):
            found = copy.gradient(_cut(batch, part), batch_idx)
            if found is None:
                return None
            gradients.append(list(found.values()))
    announce_probe(trainer, batch)
    return HalfBatchGradients((gradients[0], gradients[1]), (middle, samples - middle))


def mean_gradient(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: Iterable[tuple[Any, int]],
    metered: Callable[[Any, int], AbstractContextManager[Any]] = lambda batch, samples: nullcontext(),
) -> dict[str, Tensor]:
    """Return the mean gradient of some batches, weighted by their samples, without side effects.

    Args:
        trainer: the Trainer.
        module: holds the weights.
        batches: on the module's device, each with its number of samples.
        metered: returns, for each batch, a context in which its gradient is computed.

    Returns:
        The mean gradient of each trainable parameter, by name; zeros for unused parameters.
    """
    total: dict[str, Tensor] = {}
    samples = 0
    with untouched():
        copy = _ModuleCopy(trainer, module)
        for batch_idx, (batch, size) in enumerate(batches):
            with metered(batch, size):
                found = copy.gradient(batch, batch_idx) or {}
            for name, gradient in found.items():
                total[name] = gradient * size if name not in total else total[name].add_(gradient, alpha=size)
            samples += size
    return {n: total[n] / samples if n in total else torch.zeros_like(p) for n, p in copy.parameters.items()}


class _ModuleCopy:
    """A copy of the module that logs nothing and has no side effects."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._precision = trainer.precision_plugin
        self._module = copied(module, TrainerView(attached_trainer(module)))
        self._module.train()
        silence(self._module, trainer)
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self.parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}

    def gradient(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Return the gradients by name; None if there is no loss."""
        with torch.enable_grad(), self._precision.train_step_context():
            output = self._module.training_step(*((batch, batch_idx) if self._takes_index else (batch,)))
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            return None
        loss.backward()
        found = {name: _dense(parameter) for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found


def _dense(parameter: Tensor) -> Tensor:
    """Return a parameter's dense gradient; zeros if it has none."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.detach().to_dense()


def no_halves(error: Exception) -> str:
    """Return a message for a user whose module or batches cannot be evaluated on half batches."""
    return (
        "CriticalPhase: the noise of single samples is not measured, since a copy of the module cannot run on half a"
        f" batch ({type(error).__name__}: {error}): pass noise_every=None to silence this warning."
    )


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all elements together, as a scalar on their device."""
    norms: Sequence[Tensor] = torch._foreach_norm(list(tensors), dtype=torch.float64)
    return torch.stack(list(norms)).square().sum()


def _cut(batch: Any, part: slice) -> Any:
    return changed(batch, lambda tensor: tensor[part] if tensor.ndim else tensor)
