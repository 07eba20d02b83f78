"""``self.log`` in every form: epoch values are those of all local batches of the epoch's rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential

PER_ROUND, ROUNDS_PER_EPOCH, EPOCHS = 3, 2, 3


class Logs(pl.LightningModule):
    """Logs the batch mean of the inputs, which does not depend on the weights, from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        mean = batch[0].mean()
        self.log("default", mean)
        self.log("per_step", mean, on_step=True, on_epoch=False)
        self.log("per_epoch", mean, on_step=False, on_epoch=True)
        self.log("both", mean, on_step=True, on_epoch=True)
        self.log("bar", mean, on_step=True, on_epoch=True, prog_bar=True, logger=False)
        self.log("synced", mean, on_step=True, on_epoch=True, sync_dist=True)
        self.log("unweighted", mean, on_step=False, on_epoch=True, batch_size=1)
        self.log("squares", mean, on_step=False, on_epoch=True, batch_size=len(batch[0]) ** 2)
        self.log("min", mean, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("max", mean, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("sum", mean, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("count", 1, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("python", float(mean), on_step=False, on_epoch=True)
        self.log("rank_zero", mean, on_step=False, on_epoch=True, rank_zero_only=True)
        self.log_dict({"dict/one": mean, "dict/two": 2 * mean}, on_step=False, on_epoch=True)
        self.batch_mean = mean
        return self.scale * mean

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("hooks/zero_grad", self.batch_mean, on_step=False, on_epoch=True)

    def on_after_backward(self) -> None:
        assert self.scale.grad is not None
        self.log("hooks/backward", self.scale.grad, on_step=False, on_epoch=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.scale.grad is not None
        self.log_dict({"hooks/gradient": self.scale.grad}, on_step=False, on_epoch=True)

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("hooks/start", batch[0].mean(), on_step=True, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.log("hooks/end", batch[0].mean(), on_step=True, on_epoch=True)

    def on_train_epoch_start(self) -> None:
        self.log("hooks/epoch_start", 10.0 + self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.log("hooks/epoch_end", 20.0 + self.current_epoch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", batch[0].mean(), prog_bar=True)
        self.log("val_sum", batch[0].sum(), reduce_fx="sum", sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", 30.0 + self.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Collect(pl.Callback):
    """The callback metrics of every epoch; it also logs on the server's side, once a round."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.bars: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        log: Any = self.log  # type: ignore[attr-defined]  # the Trainer puts it there
        log("callback/round", float(trainer.global_step), on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bars.append({name: float(value) for name, value in trainer.progress_bar_metrics.items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._collect(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._collect(trainer)

    def _collect(self, trainer: pl.Trainer) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def hand_computed(epoch: int) -> dict[str, float]:
    """What the epoch's values must be, from the batches' means and sizes alone, in float64."""
    clients, inputs = reference_loop.partition(), reference_loop.data().tensors[0].double()
    rounds = range(epoch * ROUNDS_PER_EPOCH, (epoch + 1) * ROUNDS_PER_EPOCH)
    batches = reference_loop.seen(rounds, clients, reference_loop.passes(clients), PER_ROUND)
    means = torch.stack([inputs[batch].mean() for batch in batches])
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    assert len(set(sizes.tolist())) > 2
    mean, last = float((means * sizes).sum() / sizes.sum()), float(means[-1])
    forms = ("both", "bar", "synced", "hooks/start", "hooks/end")
    only = ("per_epoch", "python", "rank_zero", "dict/one", "hooks/zero_grad", "hooks/backward", "hooks/gradient")
    return {
        "default": last,
        "per_step": last,
        **{f"{name}_step": last for name in forms},
        **{f"{name}_epoch": mean for name in forms},
        **dict.fromkeys((*forms, *only), mean),
        "dict/two": 2 * mean,
        "unweighted": float(means.mean()),
        "squares": float((means * sizes**2).sum() / (sizes**2).sum()),
        "min": float(means.min()),
        "max": float(means.max()),
        "sum": float(means.sum()),
        "count": float(len(batches)),
        "hooks/epoch_start": 10.0 + epoch,
        "hooks/epoch_end": 20.0 + epoch,
        "val": float(inputs.mean()),
        "val_sum": float(inputs.sum()),
        "val_end": 30.0 + epoch,
        "callback/round": sum(round + 1 for round in rounds) / len(rounds),
    }


@pytest.fixture
def run(tmp_path: Path) -> tuple[pl.Trainer, Collect]:
    collect = Collect()
    strategy = sequential(
        partitioner=reference_loop.partition(), clients_per_round=PER_ROUND, rounds_per_epoch=ROUNDS_PER_EPOCH
    )
    trainer = reference.quiet_trainer(
        strategy=strategy, max_epochs=EPOCHS, callbacks=[collect], logger=CSVLogger(tmp_path, name="", version="")
    )
    loader = reference.loader(reference_loop.data())
    trainer.fit(Logs(), loader, DataLoader(reference_loop.data(), batch_size=7))
    return trainer, collect


def test_epoch_values(run: tuple[pl.Trainer, Collect]) -> None:
    _, collect = run
    assert len(collect.epochs) == EPOCHS
    for epoch, got in enumerate(collect.epochs):
        expected = hand_computed(epoch)
        assert {name for name in got if not name.startswith("round/")} == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (epoch, name)


def test_progress_bar_values(run: tuple[pl.Trainer, Collect]) -> None:
    _, collect = run
    for epoch, bar in enumerate(collect.bars):
        expected = hand_computed(epoch)
        # At the end of an epoch only its steps are known; the epoch's own value is that of the epoch before.
        assert bar["bar_step"] == pytest.approx(expected["bar_step"], rel=1e-5)
        assert bar["val"] == pytest.approx(expected["val"], rel=1e-5, abs=1e-6)
        assert not any(name.startswith(("both", "per_")) for name in bar)


def test_logged_values(run: tuple[pl.Trainer, Collect], tmp_path: Path) -> None:
    """A round's step value is that of its last local batch; epoch values come once an epoch, at its last round."""
    table = pd.read_csv(tmp_path / "metrics.csv")
    clients, inputs = reference_loop.partition(), reference_loop.data().tensors[0].double()
    batches = reference_loop.passes(clients)
    for name in ("default", "per_step", "both_step", "synced_step", "hooks/start_step", "hooks/end_step"):
        rows = table[table[name].notna()]
        # Every second round, as there are two in an epoch: log_every_n_steps is never more than that.
        assert rows["step"].tolist() == [1, 3, 5], name
        for round, value in zip(rows["step"], rows[name], strict=True):
            last = reference_loop.seen(range(round, round + 1), clients, batches, PER_ROUND)[-1]
            assert value == pytest.approx(float(inputs[last].mean()), rel=1e-5)
    for name in ("per_epoch", "both_epoch", "sum", "count", "hooks/epoch_end", "hooks/gradient"):
        rows = table[table[name].notna()]
        assert rows["epoch"].tolist() == [0, 1, 2]
        assert rows[name].tolist() == pytest.approx([hand_computed(e)[name] for e in range(3)], rel=1e-5)
    assert not any(column.startswith("bar") for column in table.columns)


def test_one_client_logs_what_the_plain_trainer_logs() -> None:
    collected = []
    for strategy in ("auto", sequential(num_clients=1, client_optimizer="keep")):
        collect = Collect()
        trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2, callbacks=[collect])
        loader = reference.loader(reference_loop.data(), shuffle=False)
        trainer.fit(Logs(), loader, DataLoader(reference_loop.data(), batch_size=7))
        kept = [
            {k: v for k, v in epoch.items() if not k.startswith("round/") and k != "callback/round"}
            for epoch in collect.epochs
        ]
        collected.append(kept)
    assert collected[0] == collected[1]


class Losses(reference.Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


def test_round_loss_is_the_epoch_mean_of_the_loss() -> None:
    """Two ways to one number: the record's, and Lightning's own reduction of what training_step logged."""
    module = reference.make_module()
    module.__class__ = Losses
    pairs: list[tuple[float, float]] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch:
                pairs.append(tuple(float(trainer.callback_metrics[n]) for n in ("train_loss", "round/loss")))  # type: ignore[arg-type]

    strategy = sequential(partitioner=reference_loop.partition(), clients_per_round=2)
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=5, callbacks=[Watch()])
    trainer.fit(module, reference.loader(reference_loop.data()))
    assert len(pairs) == 4
    for logged, recorded in pairs:
        assert logged == pytest.approx(recorded, rel=1e-6)
