"""What `trainer.fit` refuses before a client has trained, and what it does with updates that are not finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datasets import Dataset as HfDataset
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import OnExceptionCheckpoint, ThroughputMonitor
from lightning.pytorch.demos.lstm import SequenceSampler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics import Metric

from lightning_fedscale import FederatedStrategy, Partition, aggregators, partitioners, server
from lightning_fedscale.core.round.federation import Federation
from lightning_fedscale.samplers import uniform
from lightning_fedscale.server import ServerOptimizer
from tests.ids import stable
from tests.laws import reference
from tests.strategies import sequential


class Counting(reference.Classifier):
    """Counts its training steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        return super().training_step(batch, batch_idx)


def refused(
    kind: type[Exception],
    message: str,
    *,
    strategy: dict[str, Any] | None = None,
    data: Any = None,
    module: Any = None,
    trainer: dict[str, Any] | None = None,
    **fit: Any,
) -> None:
    """``fit`` raises, no client has trained and the model is as it was."""
    module = Counting() if module is None else module
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters() if not _lazy(tensor)}
    run = reference.quiet_trainer(strategy=sequential(**(strategy or {})), **{"max_epochs": 2, **(trainer or {})})
    with pytest.raises(kind, match=message):
        run.fit(module, reference.loader(reference.dataset()) if data is None else data, **fit)
    assert module.calls == 0
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters() if name in before)


def _lazy(tensor: Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor))


# Data


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(12)


class Columns(Dataset[Any]):
    """Samples without a label, as dicts or as tensors."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return self.sample


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


def two_loaders() -> list[DataLoader[Any]]:
    return [reference.loader(reference.dataset()), reference.loader(reference.dataset())]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (lambda: DataLoader(Stream()), TypeError, "dataset=Stream is an IterableDataset.*use a map-style dataset"),
        (
            lambda: DataLoader(Endless(), sampler=SequentialSampler(range(5))),
            TypeError,
            "dataset=Endless is .* has no length.*use a map-style dataset",
        ),
        (two_loaders, ValueError, "train_dataloader: got a list of 2 loaders.*return a single DataLoader"),
        (lambda: two_loaders()[:1], ValueError, "train_dataloader: got a list of 1 loaders"),
        (lambda: dict(enumerate(two_loaders())), ValueError, "train_dataloader: got a dict of 2 loaders"),
        (lambda: CombinedLoader(two_loaders(), "max_size_cycle"), ValueError, "got a list of 2 loaders"),
        (
            lambda: reference.dataset(),
            TypeError,
            "train_dataloader=TensorDataset: .*pass a torch.utils.data.DataLoader",
        ),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(0, 12))),
            ValueError,
            "dataset=TensorDataset is empty: give it at least one sample per client",
        ),
        (lambda: reference.loader(reference.dataset(9)), ValueError, "num_clients=10 is more than the 9 samples"),
    ],
)
def test_data(data: Callable[[], Any], kind: type[Exception], message: str) -> None:
    refused(kind, message, data=data())


@pytest.mark.parametrize(
    ("partitioner", "dataset", "message"),
    [
        (
            "dirichlet",
            Columns(torch.zeros(12)),
            r"partition_by=None: .*sample 0, a Tensor: .*samples be \(input, label\)",
        ),
        ("dirichlet", Columns({"x": 1, "user": 2}), r"partition_by=None: .*\['x', 'user'\]"),
        ("dirichlet", HfDataset.from_dict({"text": ["a"] * 20}), r"partition_by=None: .*\['text'\]"),
        (
            partitioners.NaturalIdPartitioner("speaker"),
            HfDataset.from_dict({"text": ["a"] * 20}),
            r"partition_by='speaker': .*no such column: .*\['text'\]",
        ),
        (
            partitioners.NaturalIdPartitioner("speaker"),
            Columns({"x": 1}),
            r"partition_by='speaker': .*no such column: .*\['x'\]",
        ),
        (
            partitioners.NaturalIdPartitioner("speaker"),
            Columns((1, 2)),
            "partition_by='speaker': sample 0, a tuple, .*position of an entry, '0' to '1'",
        ),
        (
            "natural_id",
            reference.dataset(),
            r"a TensorDataset of 2 tensor\(s\) has no ids: add them as one more tensor, .*partition_by=\"2\"",
        ),
        (
            "natural_id",
            TensorDataset(*[torch.zeros(20)] * 3),
            r"partition_by=None: pass the number of the tensor of TensorDataset .*or set them as an attribute",
        ),
        (
            "natural_id",
            Columns((1, 2)),
            r"partition_by=None: pass the column of Columns .*their position in samples that are tuples",
        ),
        (partitioners.NaturalIdPartitioner("2"), reference.dataset(), r"pass the position of an entry, .*'0' to '1'"),
        (
            partitioners.DirichletPartitioner(10, alpha=0.5, min_partition_size=100),
            reference.dataset(),
            "min_partition_size=100 with num_partitions=10: .*min_partition_size of at most 20",
        ),
        (
            Partition.from_lists([[0], [500]]),
            reference.dataset(),
            "sample 500 is not in the dataset: pass positions from 0 to 202",
        ),
        (Partition.from_lists([[0], [], [1]]), reference.dataset(), r"have no samples \(client 1\)"),
    ],
)
def test_data_that_cannot_be_divided_as_asked(partitioner: Any, dataset: Any, message: str) -> None:
    refused(ValueError, message, strategy={"partitioner": partitioner}, data=DataLoader(dataset, batch_size=4))


class BatchesOfRanks(DistributedSampler[int]):
    """Hands out whole batches, as scvi-tools' does."""

    def __iter__(self) -> Iterator[Any]:
        yield list(super().__iter__())


class OwnSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __len__(self) -> int:
        return 10


class OwnBatches(BatchSampler):
    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, extra: int) -> None:
        super().__init__(sampler, batch_size, drop_last)


class SameBatches(BatchSampler):
    """Custom in type only."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": WeightedRandomSampler([1.0] * 203, 203)},
            "sampler=WeightedRandomSampler cannot be applied to each",
        ),
        ({"sampler": OwnSampler()}, "sampler=OwnSampler cannot .*: use shuffle=True or shuffle=False"),
        ({"sampler": SubsetRandomSampler(range(9))}, "sampler=SubsetRandomSampler cannot"),
        ({"sampler": RandomSampler(range(203), replacement=True)}, "sampler=RandomSampler cannot"),
        ({"sampler": [1, 2, 3]}, "sampler=list cannot"),
        (
            {"sampler": BatchesOfRanks(range(203), 2, 0), "batch_size": None},  # type: ignore[arg-type]
            "sampler=BatchesOfRanks cannot",
        ),
        (
            {"batch_sampler": SequenceSampler(range(203), 20)},
            "batch_sampler=SequenceSampler has no sampler.*BatchSampler",
        ),
        (
            {"batch_sampler": OwnBatches(SequentialSampler(range(203)), 4, False, 0)},
            "batch_sampler=OwnBatches .*'extra'.*BatchSampler",
        ),
        (
            {"batch_sampler": SameBatches(SequentialSampler(range(203)), 50, True)},
            "batch_sampler=SameBatches .* drop_last=False",
        ),
        ({"batch_size": 50, "drop_last": True}, r"drop_last=True with batch_size=50 leaves 10 of 10 clients without a"),
    ],
    ids=stable,
)
@pytest.mark.parametrize("work", [{"local_epochs": 1}, {"local_steps": 2}], ids=stable)
def test_loader(options: dict[str, Any], message: str, work: dict[str, int]) -> None:
    refused(ValueError, message, strategy=work, data=DataLoader(reference.dataset(), **options))


def test_drop_last_names_the_clients_that_are_left_without_a_batch() -> None:
    partition = reference.unequal_clients()
    short = [client for client, size in enumerate(partition.sizes.tolist()) if size < 8]
    message = rf"leaves {len(short)} of 7 clients without a batch \(clients {', '.join(map(str, short))}\)"
    data = DataLoader(reference.dataset(), batch_size=8, drop_last=True)
    refused(ValueError, message, strategy={"partitioner": partition}, data=data)


# Model


class NoParameters(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU())


class Frozen(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Returns(Counting):
    """Whatever configure_optimizers is to return."""

    def __init__(self, optimizers: Any, automatic: bool) -> None:
        super().__init__()
        self.optimizers_ = optimizers
        self.automatic_optimization = automatic

    def configure_optimizers(self) -> Any:
        return self.optimizers_


class Foreign(Counting):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3, 5))], lr=0.1)


class Iter(Counting):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return torch.zeros(())


class Lazy(Counting):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net  # type: ignore[assignment]


class Scripted(Metric):
    def update(self) -> None: ...

    def compute(self) -> None: ...


class Synced(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.metric = Scripted(dist_sync_on_step=True)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoParameters, "the model has 0 parameters"),
        (Frozen, "the model has 4 parameter tensors .*requires_grad=True"),
        (lambda: Returns(None, True), "configure_optimizers returned no optimizer"),
        (lambda: Returns(None, False), "configure_optimizers returned no optimizer"),
        (lambda: Returns([], True), "configure_optimizers returned no optimizer"),
        (lambda: Returns([], False), "configure_optimizers returned no optimizer"),
        (Foreign, r"configure_optimizers: .* a parameter of shape \(3, 5\) "),
        (Iter, r"training_step\(self, dataloader_iter\)"),
        (lambda: Lazy(nn.LazyLinear(4)), "lazy layers.*configure_model"),
        (lambda: Lazy(nn.Sequential(nn.Linear(12, 4), nn.LazyBatchNorm1d(affine=False))), "lazy layers"),
    ],
)
def test_model(module: Callable[[], Any], message: str) -> None:
    refused(ValueError, message, module=module())


def test_lazy_layers_work_after_the_remedy() -> None:
    class Remedied(Lazy):
        def configure_model(self) -> None:
            self.net(torch.zeros(1, 12))

    module = Remedied(nn.LazyLinear(4))
    reference.quiet_trainer(strategy=sequential(), max_epochs=1).fit(module, reference.loader(reference.dataset()))
    assert module.calls == 30


@pytest.mark.parametrize("sizes", [[9, 17, 4], [25, 8, 12]])
def test_tail_batch_of_one_sample_is_merged_for_batch_norm(sizes: list[int]) -> None:
    seen: list[int] = []

    class Seeing(Counting):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    strategy = sequential(partitioner=partitioners.SizePartitioner(sizes))
    data = reference.loader(reference.dataset(sum(sizes)), batch_size=8)
    reference.quiet_trainer(strategy=strategy, max_epochs=1).fit(Seeing(batch_norm=True), data)
    assert seen == {9: [9, 8, 9, 4], 25: [8, 8, 9, 8, 8, 4]}[sizes[0]]
    assert strategy.last_round is not None
    assert strategy.last_round.samples.tolist() == sizes


def test_clients_of_one_sample_with_batch_norm_are_announced() -> None:
    strategy = sequential(partitioner=Partition.from_lists([[0, 1], [2], [3]]))
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=1)
    message = r"partitioner: 2 client.*\(clients 1, 2\).*min_partition_size=2"
    with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match="more than 1 value per channel"):
        trainer.fit(Counting(batch_norm=True), reference.loader(reference.dataset()))


# Trainer


def test_sync_batchnorm() -> None:
    refused(ValueError, r"Trainer\(sync_batchnorm=True\): .*Remove it", trainer={"sync_batchnorm": True})


def test_throughput_monitor(tmp_path: Path) -> None:
    callbacks = [ThroughputMonitor(lambda batch: len(batch[1]))]
    refused(
        ValueError,
        "callbacks: ThroughputMonitor counts one batch per step.* Remove it; round/samples",
        trainer={"callbacks": callbacks, "logger": CSVLogger(tmp_path)},
    )


@pytest.mark.parametrize("device", ["mps", "xla"])
def test_other_accelerators(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr(FederatedStrategy, "root_device", property(lambda self: torch.device(device)))
    refused(ValueError, f"accelerator: .* runs on CPU and CUDA, not on '{device}': use .*accelerator='cpu'")


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process believes to be the first of two, as far as planning goes."""
    init = Federation.__init__

    def of_two(self: Federation, trainer: Any, options: Any, rank: int, world_size: int) -> None:
        init(self, trainer, options, rank, 2)

    monkeypatch.setattr(Federation, "__init__", of_two)


@pytest.mark.usefixtures("two_ranks")
def test_fewer_clients_per_round_than_ranks() -> None:
    refused(
        ValueError,
        r"clients_per_round=1: .* 2 ranks.*devices=1",
        strategy={"clients_per_round": 1},
    )


def test_metric_that_syncs_on_every_step_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FederatedStrategy, "_processes", property(lambda self: 2))
    monkeypatch.setattr(FederatedStrategy, "_configure_launcher", lambda self: None)
    monkeypatch.setattr(FederatedStrategy, "setup_distributed", lambda self: self.set_world_ranks())
    refused(ValueError, "metric 'metric' has dist_sync_on_step=True.*set it to False", module=Synced())


@pytest.mark.parametrize(
    ("cohort", "kind", "message"),
    [
        ([1, 1], ValueError, r"sampler=.* distinct clients below 10 in ascending order.* \[1, 1\] in round 0"),
        ([2, 1], ValueError, "in ascending order"),
        ([9, 10], ValueError, "below 10"),
        ([-1, 3], ValueError, "distinct clients below 10"),
        ([0.0, 1.9], TypeError, r"sampler=.* one-dimensional .* \[0.0, 1.9\]"),
        ([[0, 1]], TypeError, "one-dimensional"),
        (None, TypeError, "one-dimensional .* None in round 0"),
        (3, TypeError, "one-dimensional .* 3 in round 0"),
        ({1, 2}, TypeError, "one-dimensional"),
    ],
    ids=stable,
)
def test_sampler_answers(cohort: Any, kind: type[Exception], message: str) -> None:
    def sampler(**_: int) -> Any:
        return cohort

    refused(kind, message, strategy={"sampler": sampler})


# Resume


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    strategy = sequential(num_clients=4, server_optimizer=server.from_torch(torch.optim.Adam))
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=1)
    trainer.fit(Counting(), reference.loader(reference.dataset()))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            {"num_clients": 5},
            r"num_clients=5 differs from num_clients=4 in the checkpoint.*\(num_clients=4\), or start",
        ),
        ({"num_clients": 4, "seed": 1}, r"seed=1 differs from seed=0 in the checkpoint: resume with .*\(seed=0\)"),
        ({"num_clients": 4, "partitioner": "dirichlet"}, "partitioner: .* divided among clients differently"),
    ],
    ids=stable,
)
def test_resume_of_another_run(saved: Path, strategy: dict[str, Any], message: str) -> None:
    module = Counting()
    trainer = reference.quiet_trainer(strategy=sequential(**strategy), max_epochs=3)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, reference.loader(reference.dataset()), ckpt_path=saved)
    assert module.calls == 0


def test_resume_with_another_server_optimizer(saved: Path) -> None:
    strategy = sequential(num_clients=4, server_optimizer=server.from_torch(torch.optim.SGD, momentum=0.9))
    module = Counting()
    with pytest.raises(ValueError, match="server_optimizer=SGD: the checkpoint has the state of Adam: resume with"):
        reference.quiet_trainer(strategy=strategy, max_epochs=3).fit(
            module, reference.loader(reference.dataset()), ckpt_path=saved
        )
    saved_weights = torch.load(saved, weights_only=True)["state_dict"]
    assert reference.difference(module.state_dict(), saved_weights) == 0.0


# While running: updates that are not finite


class Poisoned(Counting):
    """Clients that hold a poisoned sample, one with input 1e6 in every place, send an update that is not finite."""

    seen: Tensor

    def __init__(self, how: str) -> None:
        super().__init__(dropout=0.0)
        self.how = how
        self.register_buffer("seen", torch.zeros(2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bad = bool((batch[0] == 1e6).any())
        if bad and self.how == "buffer":
            self.seen[1] = torch.inf
        if bad and self.how == "weights":
            first = self.net[0]
            assert isinstance(first, nn.Linear)
            with torch.no_grad():
                first.weight[0, 0] = -torch.inf
        if bad and self.how == "loss":
            loss = loss * torch.nan
        if bad and self.how == "lr":
            self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"] = 1e38  # type: ignore[union-attr]
        if not bad and self.how in ("buffer", "weights"):
            # Without training on it, what the poisoned sample does to the loss must not matter.
            self.seen[0] += 1.0
        return loss


def poisoned(clients: set[int]) -> tuple[TensorDataset, Partition]:
    data, partition = reference.dataset(), reference.unequal_clients()
    inputs = data.tensors[0].clone()
    for client in clients:
        inputs[partition.client(client)[-1]] = 1e6
    return TensorDataset(inputs, data.tensors[1]), partition


@pytest.mark.parametrize("how", ["loss", "buffer", "weights", "lr"])
def test_update_that_is_not_finite_is_left_out(how: str) -> None:
    data, partition = poisoned({2, 5})
    module = Poisoned(how)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    # Two passes, so that also the client whose only batch is the one that sets off its learning rate explodes.
    strategy = sequential(partitioner=partition, local_epochs=2)
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=1, gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match=r"round 0: left out 2 client.* NaN .*: 2, 5"):
        trainer.fit(module, reference.loader(data))

    # The same round with the poisoned clients never asked.
    def healthy(**_: int) -> Any:
        return np.array([0, 1, 3, 4, 6])

    expected = Poisoned(how)
    expected.load_state_dict(weights)
    reference.quiet_trainer(
        strategy=sequential(partitioner=partition, local_epochs=2, sampler=healthy),
        max_epochs=1,
        gradient_clip_val=1.0,
    ).fit(expected, reference.loader(data))
    assert reference.difference(module.state_dict(), expected.state_dict()) == 0.0
    assert reference.difference(module.state_dict(), weights) > 0.0

    record = strategy.last_round
    assert record is not None
    assert record.rejected == (2, 5)
    sizes = partition.sizes * np.array([1, 1, 0, 1, 1, 0, 1])
    np.testing.assert_allclose(record.weights, sizes / sizes.sum(), rtol=1e-15)
    assert np.isnan(record.delta_norms[[2, 5]]).all()
    assert trainer.callback_metrics["round/rejected"] == 2
    assert trainer.callback_metrics["round/clients"] == 5


def test_rejected_client_with_kept_optimizer_starts_afresh() -> None:
    data, partition = poisoned({2})
    strategy = sequential(partitioner=partition, client_optimizer="keep")
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2)
    with pytest.warns(UserWarning, match="round 1: left out 1 client"):
        trainer.fit(Poisoned("loss"), reference.loader(data))
    assert strategy._federation is not None
    assert sorted(strategy._federation.fit.clients.store.keepers()) == [0, 1, 3, 4, 5, 6]


class FailsInRound2(Counting):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.global_step == 2 else loss


def exploding(round: int) -> ServerOptimizer:
    """FedAvg whose step of one round is infinite in one element."""

    def update(delta: Any, state: Any, params: Any) -> Any:
        step = {name: value.clone() for name, value in delta.items()}
        if state["round"] == round:
            next(iter(step.values())).view(-1)[0] = torch.inf
        return step, {"round": state["round"] + 1}

    return ServerOptimizer(lambda params: {"round": 0}, update)


@pytest.mark.parametrize(
    ("module", "strategy", "message"),
    [
        (
            FailsInRound2,
            {},
            r"round 2: the updates of all 3 clients have NaN",
        ),
        (Counting, {"server_optimizer": exploding(2)}, "server_optimizer: its step in round 2 has NaN or infinite"),
    ],
)
def test_stops_with_the_last_good_model(
    module: type[Counting], strategy: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data, partition = reference.dataset(), reference.unequal_clients()

    def run(model: pl.LightningModule, rounds: int, **options: Any) -> None:
        reference.quiet_trainer(
            strategy=sequential(partitioner=partition, clients_per_round=3, **strategy),
            max_epochs=rounds,
            **options,
        ).fit(model, reference.loader(data))

    torch.manual_seed(0)
    model = module()
    expected = reference.fed_avg(
        reference.make_module(), data, partition, rounds=2, clients_per_round=3
    )  # what two good rounds make
    with pytest.raises(RuntimeError, match=message):
        run(model, 5, enable_checkpointing=True, callbacks=[OnExceptionCheckpoint(tmp_path)])
    assert reference.difference(model.state_dict(), expected) == 0.0
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert reference.difference(checkpoint["state_dict"], expected) == 0.0
    assert checkpoint["global_step"] == checkpoint["federated"]["round"] == 2


def test_a_dataset_that_fails_leaves_the_model_of_the_last_round() -> None:
    class Failing(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads > 250:  # a pass over all clients is 203 reads
                raise OSError("disk gone")
            return super().__getitem__(index)

    data, partition = reference.dataset(), reference.unequal_clients()
    torch.manual_seed(0)
    model = Counting()
    with pytest.raises(OSError, match="disk gone"):
        reference.quiet_trainer(strategy=sequential(partitioner=partition), max_epochs=5).fit(
            model, reference.loader(Failing(*data.tensors))
        )
    expected = reference.fed_avg(reference.make_module(), data, partition, rounds=1, clients_per_round=7)
    assert reference.difference(model.state_dict(), expected) == 0.0


def test_nothing_is_rejected_in_a_healthy_run() -> None:
    strategy = sequential(sampler=uniform)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out.*")
        reference.quiet_trainer(strategy=strategy, max_epochs=1).fit(Counting(), reference.loader(reference.dataset()))
    assert strategy.last_round is not None
    assert strategy.last_round.rejected == ()


class SometimesNone(Counting):
    """Returns a loss for batches of these numbers only."""

    def __init__(self, *batches: int, automatic: bool = True) -> None:
        super().__init__()
        self.batches, self.automatic_optimization = batches, automatic

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if batch_idx in self.batches else None


@pytest.mark.parametrize("executor", ["sequential", "auto"])
@pytest.mark.parametrize(
    ("module", "warns"),
    [(SometimesNone(), True), (SometimesNone(0), False), (SometimesNone(automatic=False), False)],
    ids=["never", "once", "manual"],
)
def test_a_training_step_that_never_returns_a_loss(module: SometimesNone, warns: bool, executor: Any) -> None:
    trainer = reference.quiet_trainer(strategy=FederatedStrategy(executor=executor), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, reference.loader(reference.dataset()))
    told = [str(each.message) for each in caught if "training_step returned None for every" in str(each.message)]
    assert len(told) == warns


class StepsEveryThird(Counting):
    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 3}}


def test_a_scheduler_that_would_never_step() -> None:
    """Lightning counts batches from the epoch's start, and an epoch is one round by default."""
    module, loader = StepsEveryThird(), reference.loader(reference.dataset())
    with pytest.raises(ValueError, match=r"frequency=3 never steps.*rounds_per_epoch=3"):
        reference.quiet_trainer(max_epochs=1, strategy=sequential()).fit(module, loader)
    assert module.calls == 0
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(rounds_per_epoch=3))
    trainer.fit(module, loader)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_validation_more_often_than_an_epoch_has_rounds() -> None:
    loader = reference.loader(reference.dataset())
    options: dict[str, Any] = {"max_epochs": 5, "val_check_interval": 5}

    class Validates(Counting):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.calls += 0

    with pytest.raises(ValueError, match=r"val_check_interval=5.*rounds_per_epoch=5.*check_val_every_n_epoch=5"):
        reference.quiet_trainer(strategy=sequential(), **options).fit(Validates(), loader, loader)
    for strategy, trainer in (
        (sequential(rounds_per_epoch=5), options),
        (sequential(), {"max_epochs": 5, "check_val_every_n_epoch": 5}),
    ):
        reference.quiet_trainer(strategy=strategy, **trainer).fit(Validates(), loader, loader)


@pytest.mark.parametrize(
    "answer",
    [
        lambda delta: delta,
        lambda delta: ({}, {}),
        lambda delta: ({k: v[:1] for k, v in delta.items()}, {}),
        lambda _: 1,
    ],
    ids=["no state", "no step", "wrong shapes", "a number"],
)
def test_server_optimizer_of_another_shape(answer: Callable[[Any], Any]) -> None:
    rule = ServerOptimizer(lambda params: {}, lambda delta, state, params: answer(delta))
    module = Counting()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(server_optimizer=rule))
    with pytest.raises(TypeError, match=r"server_optimizer: update must return \(step, state\)"):
        trainer.fit(module, reference.loader(reference.dataset()))
    assert reference.difference(module.state_dict(), before) == 0.0


def test_aggregator_of_another_length() -> None:
    rule = aggregators.mean()._replace(finish=lambda total, cohort: total)
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(aggregator=rule))
    with pytest.raises(ValueError, match="aggregator: finish returned a tensor of shape"):
        trainer.fit(Counting(), reference.loader(reference.dataset()))


def test_weigh_decides_what_is_computed_and_what_is_reported() -> None:
    data, partition = reference.dataset(272), reference.unequal_clients(272)
    expected = reference.fed_avg(
        reference.make_module(), data, partition, rounds=2, clients_per_round=7, weigh=lambda held: float(held**2)
    )
    rule = aggregators.mean()._replace(weigh=lambda update: float(update.num_samples**2))
    strategy = sequential(partitioner=partition, aggregator=rule)
    module = reference.make_module()
    reference.quiet_trainer(max_epochs=2, strategy=strategy).fit(module, reference.loader(data))
    assert reference.difference(module.state_dict(), expected) == 0.0
    squares = partition.sizes.astype(float) ** 2
    assert strategy.last_round is not None
    assert strategy.last_round.weights == pytest.approx(squares / squares.sum())


def test_partitioner_class_in_place_of_an_object() -> None:
    with pytest.raises(TypeError, match=r"partitioner=IidPartitioner is a class"):
        sequential(partitioner=partitioners.IidPartitioner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_epochs": 2}, r"local_epochs=2 differs from 1"),
        ({"client_optimizer": "keep"}, r"client_optimizer=keep differs from reset"),
        ({}, None),
    ],
    ids=["epochs", "keep", "nothing"],
)
def test_resume_with_other_settings_warns(saved: Path, change: dict[str, Any], message: str | None) -> None:
    strategy = sequential(num_clients=4, server_optimizer=server.from_torch(torch.optim.Adam), **change)
    trainer = reference.quiet_trainer(max_epochs=3, strategy=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Counting(), reference.loader(reference.dataset()), ckpt_path=saved)
    told = [str(warning.message) for warning in caught if "ckpt_path: " in str(warning.message)]
    assert len(told) == (message is not None)
    assert message is None or re.search(message, told[0])
