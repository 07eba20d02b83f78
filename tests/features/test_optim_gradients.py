"""Clipping and accumulation happen inside every client."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference


class Module(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


def loop(rounds: int, **options: Any) -> list[reference_loop.State]:
    module = local_loops.make(Module)

    def local(round: int, client: int, batches: Batches) -> None:
        settings = {name: value(round) if name == "accumulate" else value for name, value in options.items()}
        local_loops.train(module, batches, module.configure_optimizers(), **settings)

    return local_loops.rounds(module, local, rounds)


def by_norm(module: nn.Module) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), 0.05)


def by_value(module: nn.Module) -> None:
    nn.utils.clip_grad_value_(module.parameters(), 0.01)


def signs(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = parameter.grad.sign() * 0.01  # type: ignore[union-attr]


class Signs(Module):
    """Clips its own way."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        assert gradient_clip_val == 0.7
        signs(self)


class Reclipped(Module):
    """Replaces the Trainer's value."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


@pytest.mark.parametrize(
    ("kind", "options", "clip"),
    [
        (Module, {"gradient_clip_val": 0.05}, by_norm),
        (Module, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, by_value),
        (Signs, {"gradient_clip_val": 0.7}, signs),
        (Reclipped, {}, by_norm),
    ],
)
def test_clipping(kind: type[Module], options: dict[str, Any], clip: Any) -> None:
    module = local_loops.make(kind)
    local_loops.fit(module, 3, **options)
    assert reference.difference(module.state_dict(), loop(3, clip=clip)[-1]) == 0.0
    assert reference.difference(module.state_dict(), loop(3)[-1]) > 1e-3


@pytest.mark.parametrize("accumulate", [2, 3, 50])
@pytest.mark.parametrize("rounds_per_epoch", [1, 2])
def test_accumulation_counts_within_the_client(accumulate: int, rounds_per_epoch: int) -> None:
    """Never across clients; what is left over at the client's last batch is used."""
    module = local_loops.make(Module)
    trainer = local_loops.fit(
        module, 2, rounds_per_epoch=rounds_per_epoch, accumulate_grad_batches=accumulate, gradient_clip_val=0.05
    )
    expected = loop(2 * rounds_per_epoch, accumulate=lambda round: accumulate, clip=by_norm)[-1]
    assert reference.difference(module.state_dict(), expected) == 0.0
    assert trainer.global_step == 2 * rounds_per_epoch
    assert trainer.accumulate_grad_batches == accumulate


def test_accumulation_schedule() -> None:
    module, snapshots = local_loops.make(Module), reference_loop.Snapshots()
    local_loops.fit(module, 4, callbacks=[GradientAccumulationScheduler({0: 1, 2: 3}), snapshots])
    expected = loop(4, accumulate=lambda round: 3 if round >= 2 else 1)
    for got, right in zip(snapshots.after_round, expected[1:], strict=True):
        assert reference.difference(got, right) == 0.0
    assert reference.difference(expected[-1], loop(4)[-1]) > 1e-4


class Doubling(pl.Callback):
    """A project's own schedule, set where Lightning reads it."""

    def __init__(self, hook: str, epochs: dict[int, int]) -> None:
        setattr(self, hook, lambda trainer, *_: self.choose(trainer))
        self.epochs = epochs

    def choose(self, trainer: pl.Trainer) -> None:
        if trainer.current_epoch in self.epochs:
            trainer.accumulate_grad_batches = self.epochs[trainer.current_epoch]


@pytest.mark.parametrize(
    "hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"]
)
def test_accumulation_set_by_a_callback_of_the_projects_own(hook: str) -> None:
    """Also back to 1, which is what the Trainer has for rounds."""
    module, snapshots = local_loops.make(Module), reference_loop.Snapshots()
    chosen = Doubling(hook, {0: 2, 2: 1} if hook != "on_train_start" else {0: 2})
    local_loops.fit(module, 4, callbacks=[chosen, snapshots], accumulate_grad_batches=3)
    every = {"on_train_start": [2] * 4, "on_train_epoch_end": [3, 2, 2, 1]}.get(hook, [2, 2, 1, 1])
    expected = loop(4, accumulate=lambda round: every[round])
    for got, right in zip(snapshots.after_round, expected[1:], strict=True):
        assert reference.difference(got, right) == 0.0


@pytest.mark.parametrize("kind", [GradientAccumulationScheduler, type("Own", (GradientAccumulationScheduler,), {})])
def test_accumulation_asked_for_in_two_places_is_refused(kind: type[GradientAccumulationScheduler]) -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2\) and the callback GradientAccumulationScheduler"):
        local_loops.fit(local_loops.make(Module), 1, callbacks=[kind({0: 4})], accumulate_grad_batches=2)


def test_losses_are_reported_whole_under_accumulation() -> None:
    """Lightning divides the loss by the number of accumulated batches; reports do not."""
    outputs: list[float] = []

    class Spy(Module):
        def on_train_batch_end(self, outputs_: Any, batch: list[Tensor], batch_idx: int) -> None:
            outputs.append(float(outputs_["loss"]))

    logged: list[float] = []
    for accumulate in (1, 50):
        module = local_loops.make(Spy)
        module.net[2].p = 0.0
        trainer = local_loops.fit(module, 1, accumulate_grad_batches=accumulate)
        logged.append(float(trainer.callback_metrics["round/loss"]))
    # The first batch of each client sees the same weights in both runs, and clients 0 and 1 have no other.
    assert outputs[:2] == outputs[7:9]
    clients = reference_loop.partition()
    start = local_loops.make(Module)
    data = reference_loop.data().tensors
    total = 0.0
    for client in range(4):
        indices = torch.tensor(sorted(clients.client(client).tolist()))
        loss = nn.functional.cross_entropy(start.net.eval()(data[0][indices]), data[1][indices])
        total += loss.item() * len(indices)
    assert logged[1] == pytest.approx(total / 45, rel=1e-6)
