"""Metric objects count over all clients of the epoch, and are never exchanged between clients."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from tests.features import local_loops, reference_loop
from tests.laws import reference


def labels_of(inputs: Tensor) -> Tensor:
    """Predictions that do not depend on the weights: right for some samples, wrong for others."""
    return (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()


class Measured(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.mean = MeanMetric()
        self.many = MetricCollection(
            {
                "macro": MulticlassAccuracy(4),
                "f1": MulticlassF1Score(4),
                "micro": MulticlassAccuracy(4, average="micro"),
            },
            prefix="many/",
        )
        self.by_hand_total = SumMetric()
        self.confusion = MulticlassConfusionMatrix(4)
        self.val_accuracy = MulticlassAccuracy(4, average="micro")
        self.totals: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        guesses = labels_of(inputs)
        self.accuracy(guesses, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.mean.update(inputs.mean(1))
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.many.update(guesses, labels)
        self.log_dict(self.many, on_step=False, on_epoch=True)
        self.by_hand_total.update(len(labels))
        self.confusion.update(guesses, labels)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("diagonal", self.confusion.compute().diagonal().sum().float())
        self.confusion.reset()
        self.totals.append(float(self.by_hand_total.compute()))
        self.by_hand_total.reset()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.val_accuracy.update(labels_of(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy)


def right(positions: list[int]) -> Tensor:
    inputs, labels = reference_loop.data().tensors
    return (labels_of(inputs[positions]) == labels[positions]).double()


def test_metrics_count_every_local_batch_of_the_epochs_rounds() -> None:
    epochs: list[dict[str, float]] = []

    class Collect(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})

        on_train_end = on_train_epoch_start

    module = local_loops.make(Measured)
    local_loops.fit(
        module,
        3,
        rounds_per_epoch=2,
        strategy={"clients_per_round": 3},
        val=DataLoader(reference_loop.data(), batch_size=10),
        callbacks=[Collect()],
    )
    clients = reference_loop.partition()
    inputs, labels = reference_loop.data().tensors
    for epoch, got in enumerate(epochs[1:]):
        rounds = range(2 * epoch, 2 * epoch + 2)
        batches = reference_loop.seen(rounds, clients, reference_loop.passes(clients, shuffle=False), 3)
        seen = [position for batch in batches for position in batch]
        assert len(seen) > 45
        assert got["accuracy_epoch"] == pytest.approx(float(right(seen).mean()))
        assert got["accuracy_step"] == pytest.approx(float(right(batches[-1]).mean()))
        assert got["many/micro"] == pytest.approx(float(right(seen).mean()))
        assert got["mean"] == pytest.approx(float(inputs[seen].double().mean()), rel=1e-5, abs=1e-6)
        guesses, truth = labels_of(inputs[seen]), labels[seen]
        recalls = [float((guesses[truth == label] == label).double().mean()) for label in range(4)]
        assert got["many/macro"] == pytest.approx(sum(recalls) / 4)
        hits = [float(((guesses == label) & (truth == label)).sum()) for label in range(4)]
        sizes = [float((guesses == label).sum() + (truth == label).sum()) for label in range(4)]
        assert got["many/f1"] == pytest.approx(sum(2 * h / n for h, n in zip(hits, sizes, strict=True)) / 4)
        assert got["diagonal"] == float(right(seen).sum())
        assert got["val_accuracy"] == pytest.approx(float(right(list(range(45))).mean()))
        assert module.totals[epoch] == len(seen)


def test_metrics_change_nothing_about_training() -> None:
    plain, measured = local_loops.make(reference.Classifier, dropout=0.0), local_loops.make(Measured)
    bytes_sent = []
    for module in (plain, measured):
        trainer = local_loops.fit(module, 3)
        bytes_sent.append(trainer.strategy.last_round.upload_bytes)  # type: ignore[attr-defined]
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value)
    assert bytes_sent[0] == bytes_sent[1]


class Distance(Metric):
    """Holds a network with a buffer that its forward pass moves, and a counter that it saves."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum", persistent=True)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def update(self, inputs: Tensor) -> None:
        self.total += self.features(inputs).square().sum()
        self.count += len(inputs)

    def compute(self) -> Tensor:
        return self.total / self.count


class WithNetwork(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.distance = Distance()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.distance.update(batch[0])
        self.log("distance", self.distance, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_a_metric_that_holds_a_network() -> None:
    """Its network is neither averaged nor reset for the next client: it sees all batches in a row."""
    module = local_loops.make(WithNetwork)
    twin = local_loops.make(WithNetwork)
    trainer = local_loops.fit(module, 2)

    clients, inputs = reference_loop.partition(), reference_loop.data().tensors[0]
    batches = reference_loop.seen(range(2), clients, reference_loop.passes(clients, shuffle=False))
    twin.distance.train()
    for batch in batches[:7]:
        twin.distance.update(inputs[batch])
    twin.distance.reset()
    for batch in batches[7:]:
        twin.distance.update(inputs[batch])
    assert float(trainer.callback_metrics["distance"]) == pytest.approx(float(twin.distance.compute()), rel=1e-6)
    for name, value in twin.distance.features.state_dict().items():
        assert torch.equal(module.distance.features.state_dict()[name], value), name
    assert int(module.distance.features[1].num_batches_tracked) == 14
    numbers: Any = sum(value.numel() for name, value in module.state_dict().items() if name.startswith("net."))
    assert trainer.strategy.last_round.upload_bytes == 4 * 4 * numbers  # type: ignore[attr-defined]
