"""Gradients of an optimizer for `CriticalPhase`: their norms, and a hook after they are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_fedscale.utils import collectives

_PATIENCE = 25
"""Number of batches without a gradient after which there is a warning."""

SPARSE = (
    "action='noise': a gradient is sparse, and noise would make it dense: pass sparse=False to nn.Embedding, or choose"
    " action='observe' or 'scale'."
)


class GradientsExpected:
    """Warns once if no gradients are seen for many batches."""

    def __init__(self) -> None:
        self._missing = 0  # batches since the last gradient
        self._warned = False

    def seen(self) -> None:
        """Record a gradient."""
        self._missing = 0

    def missing(self, batches: int, trainer: pl.Trainer, critical: bool) -> None:
        """Count batches since the last gradient, and warn once if there are too many."""
        self._missing += batches
        if self._missing >= _PATIENCE * trainer.accumulate_grad_batches and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"CriticalPhase: no gradients were seen in {self._missing} batches, so the phase stays"
                f" critical={critical}. If the module trains, step the optimizers of configure_optimizers; those from"
                " self.optimizers(use_pl_optimizer=False) must step without a closure."
            )


def gradients_of(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return the existing gradients, by the position of their parameter in the optimizer."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {place: parameter.grad for place, parameter in enumerate(parameters) if parameter.grad is not None}


def learning_rate(*optimizers: Optimizer) -> float:
    """Return the sum of all parameter groups' learning rates, which falls if one falls; NaN if there is none."""
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]
    return math.fsum(rates) if rates else math.nan


def layer_norms(trainer: pl.Trainer, optimizer: Optimizer, gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of each gradient, on their device, in float64."""
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norms = torch.stack([_whole(norm) for norm in torch._foreach_norm(values)]).double()
    if isinstance(trainer.strategy, FSDPStrategy):  # every rank holds a part of each gradient
        norms = collectives.sum_over_ranks(norms.square()).sqrt()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norms = norms / scaler._scale  # fused optimizers unscale them only in their step
    return norms


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class AfterClipping:
    """Replaces a module's ``configure_gradient_clipping``, and calls a function after it."""

    def __init__(self, hook: Callable[..., Any], then: Callable[[Optimizer], None]) -> None:
        self.__wrapped__ = hook
        self._then = then

    def __call__(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip as the module does, then call the function."""
        self.__wrapped__(optimizer, *args, **kwargs)
        self._then(optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or pickle of the module, made during `fit`, gets the original hook.
        return _as_it_was, (self.__wrapped__,)


def _as_it_was(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook
