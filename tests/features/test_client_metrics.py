"""`ClientMetrics` against loops written by hand over each client's own data."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe, RoundEvents
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.partitioners import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
)
from tests.laws import reference
from tests.strategies import sequential

CLIENTS = 5


class Module(pl.LightningModule):
    """Validates in every way that there is: numbers, metrics, collections, sums at the epoch's end, lists, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 4)
        self.f1 = MulticlassF1Score(4, average="macro")
        self.scores = MetricCollection([MulticlassAccuracy(4, average="micro"), MulticlassF1Score(4, average="micro")])
        self.own = MulticlassAccuracy(4, average="micro")
        self.kept: list[Tensor] = []
        self.validations = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits, labels = self(batch[0]), batch[1]
        self.f1(logits, labels)
        self.own.update(logits, labels)
        self.kept.append(logits.argmax(1) == labels)
        self.validations += 1
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True, on_step=True, on_epoch=True)
        self.log("f1", self.f1, sync_dist=True)
        self.scores(logits, labels)
        self.log_dict(self.scores)
        self.log("noise", torch.rand(()) + nn.functional.dropout(torch.ones(3), 0.5).sum())
        self.log("largest", logits.max(), reduce_fx="max")
        experiment: Any = getattr(self.logger, "experiment", None)
        if hasattr(experiment, "add_scalar"):
            experiment.add_scalar("mine", 1.0, self.validations)

    def on_validation_epoch_end(self) -> None:
        self.log("hits", torch.cat(self.kept).float().mean())
        self.kept.clear()
        self.log("own", self.own.compute())
        self.own.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def validation(samples: int = 120) -> TensorDataset:
    inputs, labels = reference.dataset(400).tensors
    return TensorDataset(inputs[-samples:], labels[-samples:])


def loaders(train: Dataset[Any] | None = None, val: Dataset[Any] | None = None, size: int = 16, **how: Any) -> Any:
    return (
        DataLoader(reference.dataset() if train is None else train, 8, shuffle=True),
        DataLoader(validation() if val is None else val, size, **how),
    )


def skewed() -> DirichletPartitioner:
    return DirichletPartitioner(CLIENTS, alpha=0.3, min_partition_size=5)


def fit(
    *callbacks: pl.Callback,
    rounds: int = 3,
    strategy: FederatedStrategy | None = None,
    data: Any = None,
    **options: Any,
) -> tuple[pl.Trainer, Module]:
    module = Module()
    strategy = sequential(partitioner=skewed()) if strategy is None else strategy
    ckpt_path = options.pop("ckpt_path", None)
    trainer = reference.quiet_trainer(
        **{"max_epochs": rounds, "strategy": strategy, "callbacks": list(callbacks), **options}
    )
    train, val = [*(data or loaders()), None][:2]
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer, module


def by_hand(module: Module, data: TensorDataset, indices: Any) -> dict[str, float]:
    module.eval()
    inputs, labels = (tensor[np.sort(indices)] for tensor in data.tensors)
    with torch.no_grad():
        logits = module(inputs)
    accuracy = float((logits.argmax(1) == labels).float().mean())
    return {
        "val_loss": float(nn.functional.cross_entropy(logits, labels)),
        "f1": float(multiclass_f1_score(logits, labels, 4, average="macro")),
        "MulticlassAccuracy": float(multiclass_accuracy(logits, labels, 4, average="micro")),
        "MulticlassF1Score": accuracy,
        "hits": accuracy,
        "own": accuracy,
        "largest": float(logits.max()),
    }


def assert_by_hand(watch: ClientMetrics, model_of: Callable[[int], Module], partition: Partition) -> None:
    last, data = watch.last, validation()
    assert last is not None
    assert set(last.values) == {*by_hand(model_of(0), data, [0]), "noise"}
    for row, client in enumerate(last.clients.tolist()):
        indices = partition.client(client)
        assert last.samples[row] == len(indices)
        for name, value in by_hand(model_of(client), data, indices).items():
            assert last.values[name][row] == pytest.approx(value, rel=1e-5), (name, client)


def test_values_are_those_of_a_loop_over_each_clients_own_data() -> None:
    watch = ClientMetrics()
    trainer, module = fit(watch)
    assert isinstance(trainer.strategy, FederatedStrategy)
    partition = trainer.strategy.divide_alike(validation())
    assert_by_hand(watch, lambda client: module, partition)
    assert watch.last is not None
    assert watch.last.round == 2
    assert len(set(watch.last.values["val_loss"].tolist())) == CLIENTS  # else nothing was told apart
    assert max(watch.last.samples) > 16  # more than a batch


def test_what_is_logged_is_the_spread_over_clients(tmp_path: Path) -> None:
    watch = ClientMetrics()
    trainer, _ = fit(watch, logger=CSVLogger(tmp_path))
    assert watch.last is not None
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, worst, best in (("val_loss", max, min), ("f1", min, max), ("hits", min, max)):
        values, weights = watch.last.values[name], watch.last.samples
        assert logged[f"clients/{name}/mean"] == pytest.approx(values.mean())
        assert logged[f"clients/{name}/weighted_mean"] == pytest.approx(np.average(values, weights=weights))
        assert logged[f"clients/{name}/worst10"] == worst(values)
        assert logged[f"clients/{name}/best10"] == best(values)
        assert logged[f"clients/{name}/std"] == pytest.approx(values.std())
        assert logged[f"clients/{name}/jain"] == pytest.approx(values.sum() ** 2 / (len(values) * (values**2).sum()))
    assert logged["clients/evaluated"] == CLIENTS
    # The mean weighted by samples is that of the whole validation set.
    assert logged["clients/val_loss/weighted_mean"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert watch.last.worst("hits", 2)[0][2] == min(watch.last.values["hits"])
    assert "clients/val_loss/worst10" in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]


def test_each_client_is_validated_on_the_classes_it_trains_on() -> None:
    class Shares(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for label in range(4):
                self.log(f"share {label}", (batch[1] == label).float().mean())

        def on_validation_epoch_end(self) -> None:
            pass

    labels = torch.arange(400) % 4
    data = loaders(
        TensorDataset(torch.rand(400, 12), labels), TensorDataset(torch.rand(2000, 12), torch.arange(2000) % 4)
    )
    strategy, watch = sequential(partitioner=DirichletPartitioner(6, alpha=0.2, seed=7)), ClientMetrics()
    reference.quiet_trainer(max_epochs=1, strategy=strategy, callbacks=[watch], limit_val_batches=0).fit(
        Shares(), *data
    )
    assert watch.last is not None
    assert strategy.partition is not None
    for client in range(6):
        held = labels[strategy.partition.client(client).copy()]
        for label in range(4):
            share = float((held == label).float().mean())
            assert watch.last.values[f"share {label}"][client] == pytest.approx(share, abs=0.03)
    assert max(watch.last.values["share 0"]) - min(watch.last.values["share 0"]) > 0.5


def test_where_clients_have_one_class_each_they_are_validated_on_it() -> None:
    watch = ClientMetrics()
    strategy = sequential(
        partitioner=PathologicalPartitioner(4, num_classes_per_partition=1, class_assignment_mode="deterministic")
    )
    fit(watch, rounds=1, strategy=strategy)
    assert watch.last is not None
    assert isinstance(watch._data, type(None))  # no worker or data is held after training
    train, held_out = reference.dataset().tensors[1], validation().tensors[1]
    assert strategy.partition is not None
    divided = strategy.divide_alike(validation())
    for client in range(4):
        assert set(held_out[divided.client(client)].tolist()) == set(train[strategy.partition.client(client)].tolist())


class Traces(pl.Callback):
    """All that an evaluation might disturb, at the end of every round and of every validation."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _look(self, trainer: pl.Trainer, module: Any) -> None:
        of_numpy = np.random.get_state(legacy=True)
        assert isinstance(of_numpy, tuple)
        drawn = torch.get_rng_state().tolist(), random.getstate(), of_numpy[1].tolist()
        metrics = [
            (
                name,
                {key: torch.as_tensor(value).tolist() for key, value in metric._copy_state_dict().items()},
                metric._update_count,
            )
            for name, metric in module.named_modules()
            if hasattr(metric, "_copy_state_dict")
        ]
        logged = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith(("clients/", "personal/", "round/seconds"))
        }
        modes = [part.training for part in module.modules()]
        state = [str(trainer.state.stage), len(module.kept), module.validations, trainer.should_stop]
        self.seen.append((drawn, metrics, logged, modes, state, {n: t.clone() for n, t in module.state_dict().items()}))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self._look(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._look(trainer, module)


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right or left != left


@pytest.mark.parametrize(
    "options",
    [
        {"executor": "sequential"},
        {"executor": "vectorized"},
        {"executor": "sequential", "client_optimizer": "keep", "clients_per_round": 3},
        {"executor": "sequential", "clients_per_round": 3, "personal": Ditto(0.5)},
        {"executor": "sequential", "personal": ["head.*"], "clients_per_round": 3},
    ],
)
def test_training_is_bit_for_bit_what_it_is_without(options: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for watches in ([], [ClientMetrics(), *([ClientMetrics(personal=True)] if options.get("personal") else [])]):
        traces = Traces()
        pl.seed_everything(5, verbose=False)
        trainer, module = fit(
            *watches, traces, strategy=FederatedStrategy(partitioner=skewed(), **options),
            num_sanity_val_steps=2, logger=TensorBoardLogger(tmp_path / str(bool(watches))),
        )  # fmt: skip
        runs.append((traces.seen, module.state_dict(), trainer.optimizers[0].state_dict()))
    assert len(runs[0][0]) == 7  # with the sanity check
    assert_equal(*runs)


def test_executors_agree() -> None:
    found = []
    for executor in ("sequential", "vectorized"):
        watch = ClientMetrics()
        fit(watch, strategy=FederatedStrategy(partitioner=skewed(), executor=executor))
        assert watch.last is not None
        found.append(watch.last.values)
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


# ---- personal models


def loaded(state: dict[str, Any] | None) -> Module:
    assert state is not None
    module = Module()
    module.load_state_dict(state)
    return module


def test_layers_that_stay_with_clients_are_theirs() -> None:
    watch = ClientMetrics()
    strategy = sequential(partitioner=skewed(), personal=["head.*", "body.1.*"], clients_per_round=2)
    trainer, module = fit(watch, rounds=2, strategy=strategy)
    partition = strategy.divide_alike(validation())
    assert_by_hand(watch, lambda client: loaded(strategy.personal_model(client)), partition)
    assert "personal/val_loss/mean" in trainer.callback_metrics
    heads = [loaded(strategy.personal_model(client)).head.weight for client in range(CLIENTS)]
    new = [torch.equal(head, module.head.weight) for head in heads]
    assert 0 < sum(new) < CLIENTS  # who never took part has the head as it was built
    for client in range(CLIENTS):
        body = loaded(strategy.personal_model(client)).body
        assert torch.equal(body.get_parameter("0.weight"), module.body.get_parameter("0.weight"))


def test_ditto_has_global_and_personal_models() -> None:
    both = ClientMetrics(), ClientMetrics(personal=True)
    strategy = sequential(partitioner=skewed(), personal=Ditto(0.1))
    trainer, module = fit(*both, strategy=strategy)
    partition = strategy.divide_alike(validation())
    assert_by_hand(both[0], lambda client: module, partition)
    assert_by_hand(both[1], lambda client: loaded(strategy.personal_model(client)), partition)
    found = trainer.callback_metrics
    # What it is for: where labels differ from client to client, a model of one's own serves better.
    assert found["personal/val_loss/mean"] < found["clients/val_loss/mean"]
    assert both[0].state_key != both[1].state_key


def test_personal_model_answers_or_says_why_not() -> None:
    with pytest.raises(ValueError, match=r"personal_model: .*FederatedStrategy\(personal="):
        sequential(2).personal_model(0)
    strategy = sequential(partitioner=skewed(), personal=["head.*"])
    with pytest.raises(RuntimeError, match="once fit has begun"):
        strategy.personal_model(0)
    with pytest.raises(RuntimeError, match="once fit has begun"):
        strategy.divide_alike([0, 1])
    fit(rounds=1, strategy=strategy)
    with pytest.raises(IndexError, match="client 5 does not exist"):
        strategy.personal_model(5)


# ---- which data, and how many


def test_one_loader_for_each_client() -> None:
    data = [TensorDataset(*(tensor[7 * i : 7 * i + 5 + i] for tensor in validation().tensors)) for i in range(CLIENTS)]
    watch = ClientMetrics(dataloaders=[DataLoader(one, 4, num_workers=i == 1) for i, one in enumerate(data)])
    _, module = fit(watch, data=loaders()[:1], rounds=1)
    assert watch.last is not None
    assert watch.last.samples.tolist() == [5, 6, 7, 8, 9]
    for client, one in enumerate(data):
        assert watch.last.values["hits"][client] == pytest.approx(by_hand(module, one, range(len(one)))["hits"])


@pytest.mark.parametrize(
    "partitioner", ["iid", IidPartitioner(CLIENTS), Partition.from_lists([[i] for i in range(CLIENTS)])]
)
def test_a_partitioner_of_the_validation_data(partitioner: Any) -> None:
    watch = ClientMetrics(partitioner=partitioner)
    fit(watch, rounds=1)
    assert watch.last is not None
    assert watch.last.samples.tolist() == [1 if isinstance(partitioner, Partition) else 24] * CLIENTS


class People(Dataset[Any]):
    def __init__(self, names: list[str]) -> None:
        self.who = names
        self.inputs, self.labels = reference.dataset(len(names)).tensors

    def __len__(self) -> int:
        return len(self.who)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


def test_natural_ids_find_their_own() -> None:
    watch = ClientMetrics()
    train, val = People(["ann"] * 30 + ["bob"] * 40 + ["eve"] * 10), People(["eve"] * 7 + ["zoe"] * 9 + ["ann"] * 5)
    fit(watch, strategy=sequential(partitioner=NaturalIdPartitioner("who")), data=loaders(train, val), rounds=1)
    assert watch.last is not None
    assert watch.last.clients.tolist() == [0, 2]  # bob has no validation sample, zoe does not train
    assert watch.last.samples.tolist() == [5, 7]


def test_the_strategys_own_partition_goes_by_labels() -> None:
    partitioner = PathologicalPartitioner(4, num_classes_per_partition=1, class_assignment_mode="deterministic")
    partitioner.dataset = reference.dataset()
    watch = ClientMetrics()
    fit(watch, strategy=sequential(partitioner=partitioner.partition), rounds=1)
    assert watch.last is not None
    counts = np.bincount(validation().tensors[1])
    assert sorted(watch.last.samples.tolist()) == sorted(counts.tolist())


def test_without_validation_of_the_trainers_own() -> None:
    watch = ClientMetrics()
    trainer, _ = fit(watch, limit_val_batches=0)
    assert watch.last is not None
    assert "val_loss" not in trainer.callback_metrics
    assert watch.last.samples.sum() == 120


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_drops_tails_and_has_workers(workers: int) -> None:
    watch = ClientMetrics()
    val = People(["x"] * 60)
    val.targets = val.labels  # type: ignore[attr-defined]
    fit(watch, data=loaders(val=val, size=32, drop_last=True, num_workers=workers, shuffle=True), rounds=2)
    assert watch.last is not None
    assert watch.last.samples.sum() == 60
    assert len(watch.last.clients) > 2


def test_a_sample_of_clients_is_another_every_time() -> None:
    class Chosen(RoundEvents):
        def __init__(self, watch: ClientMetrics) -> None:
            self.watch, self.seen = watch, list[Any]()

        def on_round_end(self, *_: Any) -> None:
            self.seen.append(
                None if self.watch.last is None else (self.watch.last.round, self.watch.last.clients.tolist())
            )

    for clients, count in ((2, 2), (0.5, 3), (0.01, 1)):
        again = []
        for _ in range(2):
            watch = ClientMetrics(every_n_rounds=2, clients=clients, seed=3)
            chosen = Chosen(watch)
            fit(watch, chosen, rounds=7)
            again.append(chosen.seen)
        assert again[0] == again[1]
        assert [number for number, _ in again[0]] == [0, 1, 1, 3, 3, 5, 5]
        assert all(len(chosen) == count for _, chosen in again[0])
        assert len({tuple(chosen) for _, chosen in again[0]}) > 1


# ---- interruption


def test_interruption_does_not_matter(tmp_path: Path) -> None:
    def strategy() -> FederatedStrategy:
        return sequential(partitioner=skewed(), personal=Ditto(0.3), clients_per_round=3)

    found = []
    for folder, resume in (("whole", None), ("again", tmp_path / "whole" / "epoch=2.ckpt")):
        saving = ModelCheckpoint(
            tmp_path / folder, "{epoch}", monitor="clients/hits/worst10", mode="max", save_top_k=-1, every_n_epochs=1,
            save_on_train_epoch_end=True,
        )  # fmt: skip
        # From its resume on, before there is a new evaluation, the last one is there to be monitored.
        watch, own = ClientMetrics(every_n_rounds=2, clients=4), ClientMetrics(personal=True)
        trainer, _ = fit(watch, own, saving, rounds=6, strategy=strategy(), enable_checkpointing=True, ckpt_path=resume)
        logged = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(("clients/", "personal/"))}
        assert watch.last is not None
        assert own.last is not None
        found.append((logged, watch.last.state_dict(), own.last.state_dict()))
    assert_equal(*found)
    saved = [torch.load(tmp_path / folder / "epoch=3.ckpt", weights_only=True) for folder in ("whole", "again")]
    ours = [{key: value for key, value in each["callbacks"].items() if "ClientMetrics" in key} for each in saved]
    assert len(ours[0]) == 2
    assert_equal(*ours)


def test_a_second_fit_from_the_start_forgets_the_first() -> None:
    watch, seen = ClientMetrics(), list[Any]()

    class Look(RoundEvents):
        def on_round_start(self, *_: Any) -> None:
            seen.append(watch.last)

    for _ in range(2):
        fit(watch, Look(), rounds=1)
    assert seen == [None, None]


# ---- what it is told and tells


def events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.*")
    found = EventAccumulator(str(file), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_shows_histograms_and_the_worst_clients(tmp_path: Path) -> None:
    watch = ClientMetrics()
    fit(watch, logger=TensorBoardLogger(tmp_path))
    found, last = events(tmp_path), watch.last
    assert last is not None
    histograms = found.Histograms("clients/val_loss")
    assert [event.step for event in histograms] == [0, 1, 2]  # as Lightning numbers steps
    assert histograms[-1].histogram_value.num == CLIENTS
    assert histograms[-1].histogram_value.min == pytest.approx(last.values["val_loss"].min())
    assert histograms[-1].histogram_value.max == pytest.approx(last.values["val_loss"].max())
    scalars = found.Scalars("clients/val_loss/worst10")
    assert [event.step for event in scalars] == [event.step for event in found.Scalars("round/loss")]
    assert scalars[-1].value == pytest.approx(last.values["val_loss"].max())
    text = found.Tensors("clients/val_loss/worst/text_summary")[-1].tensor_proto.string_val[0].decode()
    header, _, *rows = text.splitlines()
    assert header == "| client | samples | val_loss |"
    assert [int(row.split("|")[1]) for row in rows] == last.clients[np.argsort(-last.values["val_loss"])].tolist()
    assert [image.step for image in found.Images("clients/val_loss/sorted")] == [3]  # one, in the end
    layout = found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert b"clients/val_loss/best10" in layout
    # The module's own writing in validation is that of the Trainer's validation alone.
    assert len(found.Scalars("mine")) == 3 * math.ceil(120 / 16)


def test_floating_point_operations_count_as_evaluation() -> None:
    spent = []
    for watches in ([], [ClientMetrics()]):
        accounting = ComputeAccounting()
        fit(accounting, *watches, limit_val_batches=0)
        spent.append(dict(accounting.ledger.flops))
    forward = 2 * (12 * 16 + 16 * 4)
    assert spent[0]["evaluation"] == 0
    assert spent[1]["evaluation"] == 3 * 120 * forward
    assert spent[0]["forward"] == spent[1]["forward"]


def test_a_client_without_a_finite_value_is_left_out_and_named() -> None:
    class Spoilt(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            if batch[1][0] == 0:
                self.log("some", torch.tensor(1.0))
            self.log("val_loss", torch.tensor(math.nan if batch[1][0] == 0 else float(batch[1][0])))

        def on_validation_epoch_end(self) -> None:
            pass

    watch, apart = ClientMetrics(), PathologicalPartitioner(4, None, 1, class_assignment_mode="deterministic")
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(partitioner=apart), callbacks=[watch])
    with pytest.warns(UserWarning, match=r"ClientMetrics: 1 of 4 clients have no finite 'val_loss' \(\d\)"):
        trainer.fit(Spoilt(), *loaders())
    assert watch.last is not None
    assert float(trainer.callback_metrics["clients/val_loss/mean"]) == 2.0
    assert math.isnan(watch.last.worst("val_loss", 1)[0][2])
    assert np.isfinite(watch.last.values["some"]).sum() == 1
    assert float(trainer.callback_metrics["clients/some/mean"]) == 1.0


def test_which_end_is_worst_can_be_said() -> None:
    watch = ClientMetrics(lower_is_better=["HITS"])
    trainer, _ = fit(watch, rounds=1)
    assert watch.last is not None
    assert watch.last.higher_is_better["val_loss"]
    assert not watch.last.higher_is_better["hits"]
    assert watch.last.higher_is_better["f1"]  # torchmetrics knows
    assert float(trainer.callback_metrics["clients/hits/worst10"]) == max(watch.last.values["hits"])


def test_what_validation_raises_reaches_the_user() -> None:
    class Broken(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            raise KeyError("mine")

    trainer = reference.quiet_trainer(
        max_epochs=1, strategy=sequential(2), callbacks=[ClientMetrics()], limit_val_batches=0
    )
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(Broken(), *loaders())


class NeedsTwo(Module):
    """As pytorch-tabular's: `squeeze()` takes the samples' own dimension away where there is one sample."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if len(batch[1]) == 1:
            self.kept.append(batch[1] < 0)
        self(batch[0]).squeeze()[:, 0]
        super().validation_step(batch, batch_idx)


def test_a_tail_of_one_sample_is_judged_with_the_batch_before_it() -> None:
    watch = ClientMetrics(partitioner=Partition.from_lists([range(17), range(17, 33)]))
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(2), callbacks=[watch])
    module = NeedsTwo()
    trainer.fit(module, *loaders(size=16))
    assert watch.last is not None
    for client, indices in enumerate((range(17), range(17, 33))):
        expected = by_hand(module, validation(), list(indices))
        assert {name: watch.last.values[name][client] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_client_whose_single_sample_cannot_be_judged_is_left_out() -> None:
    apart = Partition.from_lists([range(50), [50], range(51, 120)])
    watch = ClientMetrics(partitioner=apart)
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(3), callbacks=[watch])
    module = NeedsTwo()
    with pytest.warns(UserWarning, match=r"client 1 has a single validation sample, on which .* raised IndexError"):
        trainer.fit(module, *loaders())
    assert watch.last is not None
    assert np.isfinite(watch.last.values["val_loss"]).tolist() == [True, False, True]
    # Nothing that its step had begun is in what the next client comes to.
    assert watch.last.values["hits"][2] == pytest.approx(
        by_hand(module, validation(), range(51, 120))["hits"], rel=1e-5
    )


# ---- what cannot be is refused before training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_rounds": 0}, "every_n_rounds=0"),
        ({"every_n_rounds": 1.5}, "every_n_rounds=1.5"),
        ({"clients": 0}, "clients=0"),
        ({"clients": 1.5}, "clients=1.5"),
        ({"clients": "all"}, "clients='all'"),
        ({"personal": "yes"}, "personal='yes'"),
        ({"partitioner": 3}, "partitioner=3"),
        ({"partitioner": IidPartitioner(5, seed=None)}, "partitioner: seed=None"),
        ({"partitioner": "iid", "dataloaders": []}, "partitioner='iid': .*dataloaders="),
        ({"lower_is_better": "loss"}, "lower_is_better='loss'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ClientMetrics(**options)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


class NotThere(RoundEvents):
    """No round may begin."""

    def on_round_start(self, *_: Any) -> None:
        raise AssertionError("a round began")


def subset() -> DataLoader[Any]:
    return DataLoader(validation(), 8, sampler=SubsetRandomSampler(range(10)))


@pytest.mark.parametrize(
    ("watch", "options", "message"),
    [
        (lambda: ClientMetrics(personal=True), {}, r"personal=True: .*FederatedStrategy\(personal="),
        (lambda: ClientMetrics(clients=6), {}, "clients=6 .*5"),
        (lambda: ClientMetrics(partitioner="iids"), {}, "cannot be divided by partitioner='iids'.*Did you mean"),
        (
            lambda: ClientMetrics(partitioner=IidPartitioner(3)),
            {},
            "partitioner=.* 3 clients.* 5 clients",
        ),
        (lambda: ClientMetrics(dataloaders=[subset()]), {}, "dataloaders: got 1 .* 5 clients"),
        (lambda: ClientMetrics(dataloaders=subset()), {}, "ClientMetrics: dataloaders: sampler=SubsetRandomSampler"),
        (
            lambda: ClientMetrics(dataloaders=3),  # type: ignore[arg-type]
            {},
            "ClientMetrics: dataloaders=int: pass a torch",
        ),
        (
            lambda: ClientMetrics(dataloaders=DataLoader(Stream())),
            {},
            "dataloaders: dataset=Stream is an IterableDataset",
        ),
        (ClientMetrics, {"data": loaders()[:1]}, "found no validation loader"),
        (ClientMetrics, {"data": [loaders()[0], [loaders()[1]] * 2]}, "found 2 validation loaders"),
        (
            ClientMetrics,
            {"data": loaders(val=TensorDataset(*validation().tensors[:1]))},
            "validation data cannot be divided",
        ),
        (
            ClientMetrics,
            {"data": loaders(val=TensorDataset(validation().tensors[0], validation().tensors[1] + 10))},
            "no client has a validation sample",
        ),
        (ClientMetrics, {"strategy": "auto"}, "ClientMetrics evaluates clients, but strategy=SingleDeviceStrategy has"),
    ],
)
def test_what_cannot_be_is_refused_before_training(watch: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fit(watch(), NotThere(), **options)


def test_a_module_without_validation_is_refused() -> None:
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(2), callbacks=[ClientMetrics(), NotThere()])
    with pytest.raises(ValueError, match="validation_step, and Classifier has none"):
        trainer.fit(reference.make_module(), *loaders())


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ClientMetrics.*")
        warnings.filterwarnings("error", message=".*before the ``update``.*")
        fit(ClientMetrics(), rounds=1)


class KeepsItsLoss(Module):
    """As lightning-hydra-template's own module: a metric is given the loss with its graph, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean_loss = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss = super().training_step(batch, batch_idx)
        self.mean_loss(self.loss)
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        return self.loss


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_a_module_that_keeps_its_loss_is_copied_and_trains_on(executor: Any) -> None:
    everything = [
        ClientMetrics(), ComputeAccounting(), CriticalPhase(action="observe", noise_every=1),
        MaxBatchProbe(budget="1GiB", apply=False),
    ]  # fmt: skip
    found = []
    for callbacks in ([], everything):
        module = KeepsItsLoss()
        strategy = FederatedStrategy(num_clients=CLIENTS, executor=executor)
        reference.quiet_trainer(max_epochs=3, callbacks=callbacks, strategy=strategy).fit(module, *loaders())
        found.append(dict(module.state_dict()))
    assert reference.difference(*found) == 0.0
