"""The gradients of an optimizer as `CriticalPhase` needs them: their norms, and the moment when they are clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_fedscale import collectives

NOT_SEEN = (
    "CriticalPhase: no gradients were seen in {} batches, and the phase stays as it was, critical={}. If the module"
    " does train: step the optimizers of configure_optimizers, without a closure if by use_pl_optimizer=False."
)


def gradients_of(optimizer: Optimizer) -> dict[int, Tensor]:
    """Those that parameters have, by the parameter's place in the optimizer.

    Raises:
        ValueError: for a sparse one.
    """
    found = {}
    for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise ValueError(
                "CriticalPhase: a gradient is sparse, and its norm over steps is not that of a dense one: pass"
                " sparse=False to nn.Embedding."
            )
        found[place] = parameter.grad
    return found


def layer_norms(trainer: pl.Trainer, optimizer: Optimizer, gradients: list[Tensor]) -> Tensor:
    """The L2 norm of each, on their device, in float64."""
    norms = torch.stack([_whole(norm) for norm in torch._foreach_norm(gradients)]).double()
    if isinstance(trainer.strategy, FSDPStrategy):  # every rank holds a part of each
        norms = collectives.sum_over_ranks(norms.square()).sqrt()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norms = norms / scaler._scale  # fused optimizers unscale by themselves, later
    return norms


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class AfterClipping:
    """Stands in for a module's ``configure_gradient_clipping``, and does one thing more."""

    def __init__(self, hook: Callable[..., Any], then: Callable[[Optimizer], None]) -> None:
        self.__wrapped__ = hook
        self._then = then

    def __call__(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip as the module does, then go on."""
        self.__wrapped__(optimizer, *args, **kwargs)
        self._then(optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that is copied or pickled during `fit` has its own hook again.
        return _as_it_was, (self.__wrapped__,)


def _as_it_was(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook
