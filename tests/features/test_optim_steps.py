"""What a module or a callback overrides around a local step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale import FederatedStrategy
from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference

INDICES = [0, 0, 0, 1, 0, 1, 2]
"""``batch_idx`` of a round's local batches: four clients with 1, 1, 2 and 3 of them."""


class Module(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


def loop(rounds: int, step: Callable[[Any, Optimizer, list[Tensor], int], None]) -> reference_loop.State:
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


# ---- optimizers that do not do what they are for


class Forgetful(torch.optim.SGD):
    """Steps without asking for gradients."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


class Sometimes(torch.optim.SGD):
    """Asks for gradients in the first two steps only."""

    asked = 0

    def step(self, closure: Any = None) -> Any:
        self.asked += 1
        return super().step(closure if self.asked < 3 else None)


def patched(parameters: Any, lr: float) -> Optimizer:
    optimizer = torch.optim.SGD(parameters, lr)
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    return optimizer


class Stepping(reference.Classifier):
    """Its own ``optimizer_step`` leaves out the closure."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step = lambda closure=None: None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("executor", ["sequential", "vectorized", "auto"])
@pytest.mark.parametrize("make", [Forgetful, Sometimes, patched, "module"])
def test_a_step_that_does_not_run_the_closure_is_an_error(make: Any, executor: str, accumulate: int) -> None:
    """As in the plain Trainer: nothing would be learnt, and nobody would know."""
    module = local_loops.make(reference.Classifier if make != "module" else Stepping)
    if make != "module":
        module.configure_optimizers = lambda: make(module.parameters(), lr=0.1)
    before = reference_loop.state_of(module)
    for strategy in ("auto", FederatedStrategy(num_clients=2, executor=executor)):  # type: ignore[arg-type]
        trainer = reference.quiet_trainer(max_epochs=1, strategy=strategy, accumulate_grad_batches=accumulate)
        with pytest.raises(MisconfigurationException, match="closure hasn't been executed"):
            trainer.fit(module, reference.loader(reference_loop.data()))
        if strategy == "auto":
            module.load_state_dict(before)
    assert reference_loop.same(reference_loop.state_of(module), before)
