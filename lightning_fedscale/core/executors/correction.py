"""Terms that a local rule adds to the gradients, for one client and for vectorized clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.local_rules import Correction
from lightning_fedscale.utils.flat_view import as_real


class ClientCorrection:
    """Corrects the gradients of the client that trains in the module."""

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._anchors: list[Tensor] = []
        self._shifts: list[Tensor] = []
        self._proximal = 0.0

    @torch.no_grad()
    def begin(self, shared: SharedTensors, correction: Correction) -> None:
        """Set the next client's correction; the module holds the model from which the client starts."""
        self._parameters, self._proximal = shared.trainable_shared, correction.proximal
        own = [as_real(parameter) for parameter in self._parameters]
        views = [] if correction.shift is None else shared.trainable_views(correction.shift)
        self._shifts = [view.to(tensor.dtype) for view, tensor in zip(views, own, strict=False)]
        self._anchors = [tensor.clone() for tensor in own] if self._proximal else []

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer) -> None:
        """Correct the gradients that this optimizer is about to use."""
        if not (self._shifts or self._proximal):
            return
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # A parameter without a gradient is not stepped.
        chosen = [i for i, p in enumerate(self._parameters) if p.grad is not None and id(p) in own]
        sparse = {i: _fill(self._parameters[i]) for i in chosen if self._parameters[i].grad.is_sparse}  # type: ignore[union-attr]
        gradients = [as_real(self._parameters[i].grad) for i in chosen]  # type: ignore[arg-type]
        self._add(chosen, gradients)
        for i, dimensions in sparse.items():  # for optimizers such as SparseAdam
            self._parameters[i].grad = self._parameters[i].grad.to_sparse(dimensions)  # type: ignore[union-attr]

    def _add(self, chosen: list[int], gradients: list[Tensor]) -> None:
        if gradients and self._shifts:
            torch._foreach_add_(gradients, [self._shifts[i] for i in chosen])
        if gradients and self._proximal:
            moved = [as_real(self._parameters[i]) for i in chosen]
            drift = torch._foreach_sub(moved, [self._anchors[i] for i in chosen])
            torch._foreach_add_(gradients, drift, alpha=self._proximal)

    @contextmanager
    def within(self, trainer: pl.Trainer) -> Iterator[None]:
        """Apply the correction in Lightning's own loops, after gradients are unscaled and before they are clipped."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        hook = _Hook(self)
        callbacks.insert(0, hook)
        try:
            yield
        finally:
            callbacks.remove(hook)


def _fill(parameter: Tensor) -> int:
    """Make a sparse gradient dense, since a correction is dense; return its number of sparse dimensions."""
    sparse = parameter.grad
    assert sparse is not None
    parameter.grad = sparse.to_dense()
    return sparse.sparse_dim()


class _Hook(pl.Callback):
    def __init__(self, correction: ClientCorrection) -> None:
        self._correction = correction

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._correction(optimizer)


class WaveCorrection:
    """Corrects the stacked gradients of vectorized clients, each as `ClientCorrection` does.

    Args:
        shared: the module's tensors.
        stacks: the shared, trainable parameters from which the clients start, stacked with one row for each client.
        corrections: the correction of each client.
    """

    @torch.no_grad()
    def __init__(self, shared: SharedTensors, stacks: Sequence[Tensor], corrections: Sequence[Correction]) -> None:
        proximal = [correction.proximal for correction in corrections]
        self._anchors = [stack.clone() for stack in stacks] if any(proximal) else []
        device = stacks[0].device if stacks else None
        self._proximal = torch.tensor(proximal, dtype=torch.float64, device=device)
        self._shifts: list[Tensor] = []
        if any(correction.shift is not None for correction in corrections):
            self._shifts = [torch.zeros_like(stack) for stack in stacks]
            for row, correction in enumerate(corrections):
                if correction.shift is not None:
                    for stack, view in zip(self._shifts, shared.trainable_views(correction.shift), strict=True):
                        as_real(stack)[row].copy_(view)

    @torch.no_grad()
    def __call__(
        self, rows: Rows, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the corrected gradients of some clients; those of personal parameters are unchanged."""
        corrected = list(gradients)
        factors: dict[torch.dtype, Tensor] = {}
        for i in range(max(len(self._shifts), len(self._anchors))):
            if (gradient := corrected[i]) is None:
                continue
            if self._shifts:
                gradient = gradient + rows.of(self._shifts[i])
            if self._anchors:
                drift = as_real(parameters[i]) - as_real(rows.of(self._anchors[i]))
                if (factor := factors.get(drift.dtype)) is None:
                    factor = factors[drift.dtype] = rows.of(self._proximal).to(drift.dtype)
                # add(alpha=...) would take one number for all clients.
                gradient = gradient.clone()
                as_real(gradient).add_(drift * factor.view(-1, *[1] * (drift.dim() - 1)))
            corrected[i] = gradient
        return corrected
