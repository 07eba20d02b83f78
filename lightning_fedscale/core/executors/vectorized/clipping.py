"""Gradient clipping of vectorized clients, for each client separately."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor

Clip: TypeAlias = Callable[[list[Tensor | None]], list[Tensor | None]]
"""Clips stacked gradients, each row separately."""


def clip_of(trainer: pl.Trainer) -> Clip | None:
    """Return the Trainer's gradient clipping; None for no clipping."""
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm or "norm"
    if not value:
        return None
    return partial(_clip_by_value if algorithm == "value" else _clip_by_norm, bound=float(value))


def _clip_by_value(gradients: list[Tensor | None], bound: float) -> list[Tensor | None]:
    return [None if g is None else g.clamp(-bound, bound) for g in gradients]


def _clip_by_norm(gradients: list[Tensor | None], bound: float) -> list[Tensor | None]:
    # The same as torch.nn.utils.clip_grad_norm_, for every row.
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients if g is not None]
    if not norms:
        return gradients
    share = (bound / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * share.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for g in gradients]
