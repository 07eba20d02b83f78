"""Learning-rate schedules count rounds, and every client trains with the round's learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference

BATCHES = 7
"""Local batches of a round in which all four clients take part: 1 + 1 + 2 + 3."""


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)


class Scheduled(reference.Classifier):
    """Notes the learning rate and the momentum of every local batch."""

    def __init__(self, schedule: Callable[[Optimizer, Any], dict[str, Any]]) -> None:
        super().__init__(dropout=0.0)
        self.schedule = schedule
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        group = self.optimizers().param_groups[0]  # type: ignore[union-attr]
        self.rates.append(group["lr"])
        self.momenta.append(group["momentum"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = sgd(self)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, self)}


def plain(make: Callable[[Optimizer], Any], rounds: int, every: int = 1) -> tuple[list[float], list[float]]:
    """The schedule as torch alone runs it, one step for every ``every`` rounds."""
    optimizer = sgd(nn.Linear(1, 1))
    scheduler = make(optimizer)
    rates, momenta = [], []
    for round in range(rounds):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if (round + 1) % every == 0:
            scheduler.step()
    return rates, momenta


def repeated(values: list[float], times: int = BATCHES) -> list[float]:
    return [value for value in values for _ in range(times)]


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_epoch_schedule_and_its_weights(client_optimizer: str) -> None:
    module = local_loops.make(Scheduled, schedule=lambda o, m: {"scheduler": lr_scheduler.StepLR(o, 2, 0.3)})
    local_loops.fit(module, 5, strategy={"client_optimizer": client_optimizer})
    rates, _ = plain(lambda o: lr_scheduler.StepLR(o, 2, 0.3), 5)
    assert rates == pytest.approx([0.1, 0.1, 0.03, 0.03, 0.009])
    assert module.rates == repeated(rates)

    by_loop = local_loops.make(Scheduled, schedule=None)
    kept: dict[int, Any] = {}

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = sgd(by_loop)
        if client in kept:
            optimizer.load_state_dict(kept[client])
        optimizer.param_groups[0]["lr"] = rates[round]
        local_loops.train(by_loop, batches, optimizer)
        if client_optimizer == "keep":
            kept[client] = optimizer.state_dict()

    assert reference.difference(module.state_dict(), local_loops.rounds(by_loop, local, 5)[-1]) == 0.0


def test_epoch_schedule_steps_once_for_all_rounds_of_an_epoch() -> None:
    module = local_loops.make(Scheduled, schedule=lambda o, m: {"scheduler": lr_scheduler.StepLR(o, 1, 0.3)})
    local_loops.fit(module, 3, rounds_per_epoch=2)
    assert module.rates == repeated(plain(lambda o: lr_scheduler.StepLR(o, 1, 0.3), 6, every=2)[0])


def test_step_schedule_steps_every_round() -> None:
    def schedule(optimizer: Optimizer, module: Any) -> dict[str, Any]:
        return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}

    module = local_loops.make(Scheduled, schedule=schedule)
    local_loops.fit(module, 3, rounds_per_epoch=2, accumulate_grad_batches=2)
    assert module.rates == repeated(plain(lambda o: lr_scheduler.ExponentialLR(o, 0.8), 6)[0])


@pytest.mark.parametrize(("interval", "rounds_per_epoch"), [("epoch", 1), ("step", 4)])
def test_frequency(interval: str, rounds_per_epoch: int) -> None:
    """Lightning counts steps anew in every epoch, so a frequency of steps needs that many rounds in one."""

    def schedule(optimizer: Optimizer, module: Any) -> dict[str, Any]:
        return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": interval, "frequency": 2}

    module = local_loops.make(Scheduled, schedule=schedule)
    local_loops.fit(module, 8 // rounds_per_epoch, rounds_per_epoch=rounds_per_epoch)
    assert module.rates == repeated(plain(lambda o: lr_scheduler.ExponentialLR(o, 0.8), 8, every=2)[0])


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_cycle_over_the_estimated_stepping_batches(accumulate: int, client_optimizer: str) -> None:
    """Rounds, not local batches: also with accumulation; the momentum cycles too."""
    totals: list[int] = []

    def schedule(optimizer: Optimizer, module: Any) -> dict[str, Any]:
        totals.append(module.trainer.estimated_stepping_batches)
        cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=totals[-1])
        return {"scheduler": cycle, "interval": "step"}

    module = local_loops.make(Scheduled, schedule=schedule)
    strategy: dict[str, object] = {"client_optimizer": client_optimizer}
    local_loops.fit(module, 4, rounds_per_epoch=3, accumulate_grad_batches=accumulate, strategy=strategy)
    assert totals == [12]
    optimizer = sgd(nn.Linear(1, 1))
    cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=12)
    rates, momenta = [], []
    for round in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if round < 11:
            cycle.step()
    assert module.rates == repeated(rates)
    assert module.momenta == repeated(momenta)
    assert len(set(momenta)) > 5


SCRIPT = [3.0, 2.0, 2.5, 2.4, 1.9, 2.2, 2.1, 2.0]


def plateau(values: list[float], **options: Any) -> list[float]:
    """The learning rate of every round when torch alone sees ``values`` one after the other."""
    optimizer = sgd(nn.Linear(1, 1))
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, **options)
    rates = []
    for value in values:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(value)
    return rates


class Validated(Scheduled):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_score", SCRIPT[self.current_epoch])


def test_plateau_on_a_validation_metric() -> None:
    def schedule(optimizer: Optimizer, module: Any) -> dict[str, Any]:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"scheduler": scheduler, "monitor": "val_score"}

    module = local_loops.make(Validated, schedule=schedule)
    local_loops.fit(module, len(SCRIPT), val=DataLoader(reference_loop.data(), batch_size=16))
    rates = plateau(SCRIPT)
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.025, 0.025, 0.0125, 0.00625]
    assert module.rates == repeated(rates)


class ScriptedLoss(Scheduled):
    """Round r has the loss SCRIPT[r], whatever the weights."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0 + SCRIPT[self.trainer.global_step]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_plateau_on_the_round_loss(interval: str) -> None:
    def schedule(optimizer: Optimizer, module: Any) -> dict[str, Any]:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"scheduler": scheduler, "monitor": "round/loss", "interval": interval}

    module = local_loops.make(ScriptedLoss, schedule=schedule)
    local_loops.fit(module, len(SCRIPT) // 2, rounds_per_epoch=2)
    # Once an epoch, it sees the last round's loss.
    rates = plateau(SCRIPT) if interval == "step" else repeated(plateau(SCRIPT[1::2]), 2)
    assert len(set(rates)) > 1
    assert module.rates == repeated(rates)
