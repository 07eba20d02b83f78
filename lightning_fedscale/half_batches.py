"""The gradients of both halves of a batch, at the module's present weights, without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_fedscale.devices.batches import samples_in
from lightning_fedscale.devices.rehearsal import copied
from lightning_fedscale.devices.stubs import silence
from lightning_fedscale.randomness import untouched


class Halves(NamedTuple):
    """The gradients of both halves of a batch.

    Attributes:
        gradients: of each half, one tensor for each trainable parameter; zeros where it takes no part.
        samples: in each half.
    """

    gradients: tuple[list[Tensor], list[Tensor]]
    samples: tuple[int, int]

    def difference_square(self) -> Tensor:
        """Squared norm of the difference."""
        return squared_norm(torch._foreach_sub(*self.gradients))

    def mean(self) -> list[Tensor]:
        """The gradient of the whole batch, if the loss is a mean over its samples."""
        (first, second), (m, n) = self.gradients, self.samples
        return [a * (m / (m + n)) + b * (n / (m + n)) for a, b in zip(first, second, strict=True)]


def half_gradients(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int = 0) -> Halves | None:
    """The gradients of both halves of a batch, by the module's own ``training_step``.

    It runs on a copy of the module, under the Trainer's precision: nothing is logged, metrics and buffers stay as they
    are, gradients too, and no generator moves. Costs one forward and backward pass and a copy of the module's memory.

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
    samples = samples_in(batch)
    if samples < 2:
        return None
    with untouched():
        twin = copied(module)
        twin.train()
        silence(twin, trainer)
        parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        places = batch_idx if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else None
        middle, gradients = samples // 2, list[list[Tensor]]()
        for part in (slice(None, middle), slice(middle, None)):
            half = _cut(batch, part)
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                output = twin.training_step(*((half,) if places is None else (half, places)))
            loss = output["loss"] if isinstance(output, dict) else output
            if loss is None:
                return None
            loss.backward()
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters])
            for parameter in parameters:
                parameter.grad = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (hook := getattr(callback, "on_probe", None)) is not None:
            hook(trainer, batch)
    return Halves((gradients[0], gradients[1]), (middle, samples - middle))


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements together, as a number on their device."""
    norms: Sequence[Tensor] = torch._foreach_norm(list(tensors), dtype=torch.float64)
    return torch.stack(list(norms)).square().sum()


def _cut(batch: Any, part: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[part] if tensor.ndim else tensor, batch)
