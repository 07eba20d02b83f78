"""What a module or a callback overrides around a local step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.features import by_hand, local_loops
from tests.features.local_loops import Batches
from tests.laws import reference

INDICES = [0, 0, 0, 1, 0, 1, 2]
"""``batch_idx`` of a round's local batches: four clients with 1, 1, 2 and 3 of them."""


class Module(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


def loop(rounds: int, step: Callable[[Any, Optimizer, list[Tensor], int], None]) -> by_hand.State:
    module = local_loops.make(Module)

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = module.configure_optimizers()
        for index, batch in enumerate(batches):
            step(module, optimizer, batch, index)

    return local_loops.rounds(module, local, rounds)[-1]


class Overrides(Module):
    """Everything around the step is the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.before_zero: list[bool] = []
        self.clipped: list[float | None] = []

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        self.steps.append((epoch, batch_idx))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (batch_idx + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.zeroed.append((epoch, batch_idx))
        optimizer.zero_grad(set_to_none=False)

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.before_zero.append(all(p.grad is None for p in self.parameters()))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clipped.append(gradient_clip_val)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def test_overrides_are_called_per_local_batch() -> None:
    """A learning rate that a client sets for itself is gone with the client."""
    module = local_loops.make(Overrides)
    local_loops.fit(module, 2, gradient_clip_val=7.0)
    assert module.steps == [(epoch, index) for epoch in (0, 1) for index in INDICES]
    assert module.zeroed == module.steps
    # A client never finds gradients of another one.
    assert module.before_zero == [index == 0 for index in INDICES] * 2
    assert module.clipped == [7.0] * 14

    def step(by_loop: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / (index + 1)
        optimizer.zero_grad(set_to_none=False)
        local_loops.loss_of(by_loop, batch).backward()
        torch.nn.utils.clip_grad_norm_(by_loop.parameters(), 0.1)
        optimizer.step()

    assert reference.difference(module.state_dict(), loop(2, step)) == 0.0


class Skipping(Module):
    """Computes every gradient, but steps on even batches only."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        assert optimizer_closure is not None
        if batch_idx % 2 == 0:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()


def test_skipped_steps() -> None:
    module = local_loops.make(Skipping)
    trainer = local_loops.fit(module, 3)

    def step(by_loop: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
        optimizer.zero_grad()
        local_loops.loss_of(by_loop, batch).backward()
        if index % 2 == 0:
            optimizer.step()

    assert reference.difference(module.state_dict(), loop(3, step)) == 0.0
    assert trainer.global_step == 3


class Backward(Module):
    """Scales its gradients in hooks and in ``backward``."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 2).backward()

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.25)  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(3.0)  # type: ignore[union-attr]


class Halving(pl.Callback):
    """A callback that touches gradients works on the client."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)  # type: ignore[union-attr]


def test_backward_hooks() -> None:
    module = local_loops.make(Backward)
    local_loops.fit(module, 2, callbacks=[Halving()])

    def step(by_loop: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
        optimizer.zero_grad()
        local_loops.loss_of(by_loop, batch).backward()
        for parameter in by_loop.parameters():
            parameter.grad.mul_(2 * 0.25 * 0.5 * 3.0)
        optimizer.step()

    assert reference.difference(module.state_dict(), loop(2, step)) < 1e-7
