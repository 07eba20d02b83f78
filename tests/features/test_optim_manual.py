"""Manual optimization: the user's own loop inside every client, still one Trainer step a round."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from tests.features import local_loops
from tests.features.local_loops import Batches
from tests.laws import reference


class Manual(reference.Classifier):
    def __init__(self, accumulate: int = 1, clip: float | None = None) -> None:
        super().__init__(dropout=0.3)
        self.automatic_optimization = False
        self.accumulate, self.clip = accumulate, clip
        self.outputs: list[object] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            if self.clip is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
        return loss


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_one_optimizer(client_optimizer: str) -> None:
    by_loop = local_loops.make(Manual)
    kept: dict[int, Any] = {}

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = by_loop.configure_optimizers()
        if client in kept:
            optimizer.load_state_dict(kept[client])
        local_loops.train(by_loop, batches, optimizer, clip=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1))
        if client_optimizer == "keep":
            kept[client] = optimizer.state_dict()

    expected = local_loops.rounds(by_loop, local, 4, per_round=2)[-1]
    module = local_loops.make(Manual, clip=0.1)
    strategy = {"client_optimizer": client_optimizer, "clients_per_round": 2}
    trainer = local_loops.fit(module, 2, rounds_per_epoch=2, strategy=strategy)
    assert reference.difference(module.state_dict(), expected) == 0.0
    assert trainer.global_step == 4
    # Two clients a round: their losses are the round's, though the Trainer never saw them.
    assert trainer.callback_metrics["round/loss"].isfinite()


def test_accumulation_written_by_the_user() -> None:
    """Gradients that a client leaves behind are not the next client's."""
    by_loop = local_loops.make(Manual)

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = by_loop.configure_optimizers()
        for first, second in zip(batches[::2], batches[1::2], strict=False):
            optimizer.zero_grad()
            (local_loops.loss_of(by_loop, first) / 2).backward()
            (local_loops.loss_of(by_loop, second) / 2).backward()
            optimizer.step()
        if len(batches) % 2:
            # The last batch is seen, and draws for dropout, but its gradient is never used.
            local_loops.loss_of(by_loop, batches[-1])

    module = local_loops.make(Manual, accumulate=2)
    local_loops.fit(module, 3)
    assert reference.difference(module.state_dict(), local_loops.rounds(by_loop, local, 3)[-1]) == 0.0


class Gan(pl.LightningModule):
    """Two optimizers, each with its own part of the model, as in Lightning's own GAN example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 12))
        self.discriminator = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
        self.orders: list[list[bool]] = []

    def generator_loss(self, real: Tensor) -> Tensor:
        score = self.discriminator(self.generator(torch.randn(len(real), 3)))
        return nn.functional.binary_cross_entropy_with_logits(score, torch.ones_like(score))

    def discriminator_loss(self, real: Tensor) -> Tensor:
        score = self.discriminator(real)
        fake = self.discriminator(self.generator(torch.randn(len(real), 3)).detach())
        bce = nn.functional.binary_cross_entropy_with_logits
        return (bce(score, torch.ones_like(score)) + bce(fake, torch.zeros_like(fake))) / 2

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers()  # type: ignore[attr-defined]
        for optimizer, loss_of in ((generator, self.generator_loss), (discriminator, self.discriminator_loss)):
            self.toggle_optimizer(optimizer)
            loss = loss_of(batch[0])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.01, betas=(0.5, 0.9)),
        ]


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_two_optimizers(client_optimizer: str) -> None:
    by_loop = local_loops.make(Gan)
    kept: dict[int, list[Any]] = {}

    def local(round: int, client: int, batches: Batches) -> None:
        optimizers = by_loop.configure_optimizers()
        for optimizer, state in zip(optimizers, kept.get(client, []), strict=False):
            optimizer.load_state_dict(state)
        parts = [list(by_loop.generator.parameters()), list(by_loop.discriminator.parameters())]
        for batch in batches:
            for optimizer, loss_of, part in zip(
                optimizers, (by_loop.generator_loss, by_loop.discriminator_loss), parts, strict=True
            ):
                gradients = torch.autograd.grad(loss_of(batch[0]), part)
                for parameter, gradient in zip(part, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        if client_optimizer == "keep":
            kept[client] = [optimizer.state_dict() for optimizer in optimizers]

    expected = local_loops.rounds(by_loop, local, 4, per_round=2)[-1]
    module = local_loops.make(Gan)
    strategy = {"client_optimizer": client_optimizer, "clients_per_round": 2}
    trainer = local_loops.fit(module, 4, strategy=strategy)
    assert reference.difference(module.state_dict(), expected) == 0.0
    assert trainer.global_step == 4
    assert all(parameter.requires_grad for parameter in module.parameters())
    # training_step returned nothing, so nobody knows the loss.
    assert "round/loss" not in trainer.callback_metrics
    assert trainer.strategy.last_round.loss != trainer.strategy.last_round.loss  # type: ignore[attr-defined]


class Scheduled(Manual):
    """Steps its schedule in every local batch, at the end of the epoch, or both."""

    def __init__(self, per_batch: bool, per_epoch: bool) -> None:
        super().__init__()
        self.per_batch, self.per_epoch = per_batch, per_epoch
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        loss = super().training_step(batch, batch_idx)
        if self.per_batch:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return loss

    def on_train_epoch_end(self) -> None:
        if self.per_epoch:
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:  # type: ignore[override]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.parametrize(("per_batch", "per_epoch"), [(True, False), (False, True), (True, True)])
def test_schedules_stepped_by_the_user(per_batch: bool, per_epoch: bool, client_optimizer: str) -> None:
    """Every client starts from the round's schedule, wherever the client before it took its own."""
    module = local_loops.make(Scheduled, per_batch=per_batch, per_epoch=per_epoch)
    trainer = local_loops.fit(module, 3, strategy={"client_optimizer": client_optimizer})
    lengths = [1, 1, 2, 3]

    def rate(round: int, index: int) -> float:
        return 0.1 * 0.5 ** (round * per_epoch + index * per_batch)

    expected = [rate(round, index) for round in range(3) for length in lengths for index in range(length)]
    assert module.rates == pytest.approx(expected, rel=1e-12)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3 * per_epoch
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate(3, 0))

    by_loop = local_loops.make(Scheduled, per_batch=per_batch, per_epoch=per_epoch)

    def local(round: int, client: int, batches: Batches) -> None:
        for index, batch in enumerate(batches):
            optimizer = torch.optim.SGD(by_loop.parameters(), lr=rate(round, index))
            local_loops.train(by_loop, [batch], optimizer)

    assert reference.difference(module.state_dict(), local_loops.rounds(by_loop, local, 3)[-1]) < 1e-7


class Interrupted(Scheduled):
    """Dies in round 1, in the second batch of client 2, whose first one has moved the schedule."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(self.rates) == 10:
            raise KeyError("out of a client")
        return super().training_step(batch, batch_idx)


def test_a_round_that_fails_leaves_the_schedule_where_it_was() -> None:
    module = local_loops.make(Interrupted, per_batch=True, per_epoch=True)
    found: dict[str, Any] = {}

    class Watch(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            found["epoch"] = trainer.lr_scheduler_configs[0].scheduler.last_epoch
            found["lr"] = trainer.optimizers[0].param_groups[0]["lr"]

    with pytest.raises(KeyError, match="out of a client"):
        local_loops.fit(module, 3, callbacks=[Watch()])
    assert found == {"epoch": 1, "lr": 0.05}
