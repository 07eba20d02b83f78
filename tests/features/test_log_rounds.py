"""``round/*``: logged every round, true to the clients' deltas, and good for monitoring."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_fedscale.types import RoundRecord
from tests.features import local_loops, reference_loop
from tests.laws import reference

NAMES = {
    "round/loss",
    "round/clients",
    "round/rejected",
    "round/samples",
    "round/local_steps",
    "round/delta_norm",
    "round/drift",
    "round/upload_bytes",
    "round/download_bytes",
    "round/seconds",
    "round/padding",
    "round/idle",
}


class Records(pl.Callback):
    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        self.seen: list[dict[str, float]] = []

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
        self.records.append(record)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Norm(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.3, batch_norm=True)


@pytest.mark.parametrize("rounds_per_epoch", [1, 3])
@pytest.mark.parametrize("every", [None, 2])
def test_every_round_is_one_point_in_every_logger(tmp_path: Path, rounds_per_epoch: int, every: int | None) -> None:
    """Whatever log_every_n_steps says, which is for what the module logs."""
    boards = TensorBoardLogger(tmp_path, name="boards", version="")
    table = CSVLogger(tmp_path, name="table", version="")
    records, module = Records(), local_loops.make(Norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*log_every_n_steps.*")
        options: dict[str, Any] = {} if every is None else {"log_every_n_steps": every}
        trainer = local_loops.fit(
            module, 6 // rounds_per_epoch, rounds_per_epoch=rounds_per_epoch,
            logger=[boards, table], callbacks=[records], **options,
        )  # fmt: skip
    assert [record.round for record in records.records] == list(range(6))
    events = EventAccumulator(str(tmp_path / "boards"), size_guidance={"scalars": 0}).Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("round/")} == NAMES
    rows = pd.read_csv(tmp_path / "table" / "metrics.csv")
    for name in NAMES:
        expected = [record.metrics()[name] for record in records.records]
        points = events.Scalars(name)
        assert [point.step for point in points] == list(range(6))
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)
        written = rows[rows[name].notna()]
        assert written["step"].tolist() == list(range(6))
        assert written[name].tolist() == pytest.approx(expected, rel=1e-6)
        assert [seen[name] for seen in records.seen] == pytest.approx(expected, rel=1e-6)
        assert float(trainer.logged_metrics[name]) == pytest.approx(expected[-1], rel=1e-6)
    # What training_step logs with on_step follows log_every_n_steps, at most every epoch.
    steps = [point.step for point in events.Scalars("train_loss")]
    each = min(rounds_per_epoch, every or 50)
    assert steps == list(range(each - 1, 6, each))
    assert trainer.log_every_n_steps == (every or 50)  # type: ignore[attr-defined]


@pytest.mark.parametrize("aggregator", ["mean", "uniform"])
def test_values_follow_from_the_clients_deltas(aggregator: str) -> None:
    clients, records, module = local_loops.Clients(), Records(), local_loops.make(Norm)
    before = reference_loop.state_of(module)
    strategy = {"clients_per_round": 3, "aggregator": aggregator, "local_epochs": 2}
    trainer = local_loops.fit(module, 4, strategy=strategy, callbacks=[clients, records])
    trainable = sum(parameter.numel() for parameter in module.parameters())
    partition, batches_of = reference_loop.partition(), reference_loop.passes(reference_loop.partition(), shuffle=False)
    for round, (deltas, record) in enumerate(zip(clients.deltas, records.records, strict=True)):
        cohort = reference_loop.cohort(round, partition, 3)
        assert record.clients.tolist() == cohort == sorted(deltas)
        held = [len(partition.client(client)) for client in cohort]
        shares = [h / sum(held) for h in held] if aggregator == "mean" else [1 / 3] * 3
        assert record.weights.tolist() == pytest.approx(shares, rel=1e-14)
        assert record.samples.tolist() == [2 * h for h in held]
        assert record.local_steps.tolist() == [2 * len(batches_of(client, 0)) for client in cohort]
        moves = torch.stack([deltas[client][:trainable] for client in cohort])
        weights = torch.tensor(shares, dtype=torch.float64)
        mean = weights @ moves
        assert record.delta_norms.tolist() == pytest.approx(moves.norm(dim=1).tolist(), rel=1e-12)
        assert record.delta_norm == pytest.approx(float(mean.norm()), rel=1e-12)
        distance = math.sqrt(float(weights @ (moves - mean).square().sum(1)))
        assert record.drift == pytest.approx(distance / float(mean.norm()), rel=1e-9)
        assert record.drift > 0.1
        # float32 parameters and running statistics, and BatchNorm's counter of 8 bytes.
        message = 4 * (trainable + 2 * 16) + 8
        assert record.upload_bytes == record.download_bytes == 3 * message
        assert record.metrics() == {
            "round/loss": record.loss,
            "round/clients": 3.0,
            "round/rejected": 0.0,
            "round/samples": 2.0 * sum(held),
            "round/local_steps": float(record.local_steps.sum()),
            "round/delta_norm": record.delta_norm,
            "round/drift": record.drift,
            "round/upload_bytes": 3.0 * message,
            "round/download_bytes": 3.0 * message,
            "round/seconds": record.seconds,
            "round/padding": 0.0,
            "round/idle": 0.0,
        }
        assert record.ranks.tolist() == [0, 0, 0]
        assert record.rejected == ()
        assert record.seconds >= record.client_seconds.sum() > 0.0
    assert trainer.strategy.last_round is records.records[-1]  # type: ignore[attr-defined]
    # The aggregated moves add up to what became of the model: nothing else moved it.
    name, weight = next(iter(before.items()))
    moved = torch.zeros(weight.numel(), dtype=torch.float64)
    for deltas, record in zip(clients.deltas, records.records, strict=True):
        for share, client in zip(record.weights, record.clients.tolist(), strict=True):
            moved += share * deltas[client][: weight.numel()]
    got = (weight - module.state_dict()[name]).double().flatten()
    assert torch.allclose(got, moved, atol=1e-6)


def test_losses_of_clients_and_round() -> None:
    """Against the losses of the hand-written loop, weighted by samples."""
    module, records = local_loops.make(reference.Classifier), Records()
    by_loop = local_loops.make(reference.Classifier)
    losses: dict[tuple[int, int], list[float]] = {}

    def local(round: int, client: int, batches: local_loops.Batches) -> None:
        optimizer = by_loop.configure_optimizers()
        for batch in batches:
            optimizer.zero_grad()
            loss = local_loops.loss_of(by_loop, batch)
            loss.backward()
            optimizer.step()
            losses.setdefault((round, client), []).extend([loss.item()] * len(batch[0]))

    local_loops.rounds(by_loop, local, 3)
    local_loops.fit(module, 3, callbacks=[records])
    for round, record in enumerate(records.records):
        means = [sum(losses[round, client]) / len(losses[round, client]) for client in range(4)]
        assert record.losses.tolist() == pytest.approx(means, rel=1e-6)
        everything = [loss for client in range(4) for loss in losses[round, client]]
        assert record.loss == pytest.approx(sum(everything) / len(everything), rel=1e-6)


SCRIPT = [5.0, 4.0, 6.0, 3.0, 3.5, 3.2, 3.1, 1.0]


class Scripted(pl.LightningModule):
    """Round r has the loss SCRIPT[r]; the weight counts the rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.weight - self.weight.detach() + SCRIPT[self.trainer.global_step]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("rounds_per_epoch", [1, 4])
def test_model_checkpoint_on_the_round_loss(tmp_path: Path, rounds_per_epoch: int) -> None:
    best = ModelCheckpoint(
        tmp_path, monitor="round/loss", save_top_k=2, every_n_train_steps=1, filename="{step}-{round/loss:.1f}",
        auto_insert_metric_name=False,
    )  # fmt: skip
    epochs = 8 // rounds_per_epoch - (rounds_per_epoch == 1)
    local_loops.fit(
        local_loops.make(Scripted), epochs, rounds_per_epoch=rounds_per_epoch,
        callbacks=[best], enable_checkpointing=True,
    )  # fmt: skip
    rounds = epochs * rounds_per_epoch
    lowest = sorted(range(rounds), key=SCRIPT.__getitem__)[:2]
    saved = sorted(float(value) for value in best.best_k_models.values())
    assert saved == pytest.approx([SCRIPT[round] for round in lowest])
    assert float(best.best_model_score) == pytest.approx(SCRIPT[lowest[0]])  # type: ignore[arg-type]
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert checkpoint["global_step"] == lowest[0] + 1
    # It holds the global model after that round; clients took 1, 1, 2 and 3 steps of -1.
    step = (3 * 1 + 8 * 1 + 13 * 2 + 21 * 3) / 45
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(-(lowest[0] + 1) * step, rel=1e-6)


def test_early_stopping_on_the_round_loss() -> None:
    """Best so far: 5, 4, 4, 3, then 3.5 and 3.2 and 3.1 are no better: three in a row stop after round 6."""
    stop = EarlyStopping("round/loss", patience=3)
    trainer = local_loops.fit(local_loops.make(Scripted), 8, callbacks=[stop])
    assert trainer.global_step == 7
    assert stop.stopped_epoch == 6
    assert float(stop.best_score) == 3.0


def test_early_stopping_by_threshold_with_several_rounds_an_epoch() -> None:
    stop = EarlyStopping("round/loss", stopping_threshold=3.3, patience=10)
    trainer = local_loops.fit(local_loops.make(Scripted), 4, rounds_per_epoch=2, callbacks=[stop])
    # The last rounds of the epochs have 4, 3, 3.2 and 1; the second epoch is the first below the threshold.
    assert trainer.global_step == 4
