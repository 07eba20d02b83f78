"""`MaxBatchProbe` in whole runs: it predicts, sets the batch size where projects keep it, leaves nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import Accuracy, Metric

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import MaxBatchProbe
from lightning_fedscale.callbacks.max_batch_probe.rank_probe import check_whole_module
from lightning_fedscale.devices import DeviceClass, MemoryModel, estimate_memory
from lightning_fedscale.devices.probe import ProbeResult
from lightning_fedscale.devices.profiling import libraries
from lightning_fedscale.devices.profiling.real_step import real_step
from lightning_fedscale.partitioners import SizePartitioner
from tests.clock import Clock
from tests.keepers import KEEPERS
from tests.networks import Classifier

SAMPLES = 600


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 64, generator=generator), torch.randint(10, (samples,), generator=generator)
    )


class Watched(Classifier):
    """Notes the size of every batch."""

    def __init__(self, **options: Any) -> None:
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        super().__init__(network, torch.optim.SGD, momentum=0.9, **options)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


@cache
def model_of(*extras: tuple[str, float]) -> MemoryModel:
    """The memory of `Watched`, and of so many bytes per exchanged number besides."""
    return estimate_memory(Watched(), dataset(2)[:], extras=dict(extras))


def budget_for(batch: int, extras: Mapping[str, float] | None = None) -> int:
    """Bytes that hold exactly so many samples of `Watched`."""
    return model_of(*(extras or {}).items()).peak(batch)


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


# ---- where projects keep their batch size


class WithAttribute(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), self.batch_size)


class WithHparams(Watched):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), self.hparams["batch_size"], shuffle=True)


class HardCoded(Watched):
    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), 4, shuffle=True)


class Data(pl.LightningDataModule):
    def __init__(self, train_batch_size: int = 4) -> None:
        super().__init__()
        self.train_batch_size = train_batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), self.train_batch_size)


class DataWithHparams(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), self.hparams["batch_size"])


class DataMadeOnce(pl.LightningDataModule):
    """Keeps a batch size that nobody looks at any more when it could be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def setup(self, stage: str) -> None:
        self.loader = DataLoader(dataset(), self.batch_size)

    def train_dataloader(self) -> Any:
        return self.loader


PROJECTS: dict[str, Callable[[], tuple[Watched, dict[str, Any]]]] = {
    "attribute": lambda: (WithAttribute(), {}),
    "hparams": lambda: (WithHparams(), {}),
    "hard-coded": lambda: (HardCoded(), {}),
    "data module": lambda: (Watched(), {"datamodule": Data()}),
    "data module's hparams": lambda: (Watched(), {"datamodule": DataWithHparams()}),
    "made once": lambda: (Watched(), {"datamodule": DataMadeOnce()}),
    "loader": lambda: (Watched(), {"train_dataloaders": DataLoader(dataset(), 4, shuffle=True)}),
}

STRATEGIES: dict[str, tuple[Callable[[], Any], dict[str, float], int]] = {
    "auto": (lambda: "auto", {}, SAMPLES),
    "ddp": (lambda: "ddp", {"gradient buckets": 4}, SAMPLES),
    "federated": (
        lambda: FederatedStrategy(num_clients=2, executor="sequential"),
        {"global model": 8, "delta": 8, "accumulator": 8},
        SAMPLES // 2,
    ),
}


# A strategy and a project meet where loaders are made anew: by the project, or from the given one.
@pytest.mark.parametrize(
    ("strategy", "project"),
    [
        *(("auto", project) for project in PROJECTS),
        *(("ddp", project) for project in ("attribute", "loader")),
        *(("federated", project) for project in ("attribute", "loader", "made once")),
    ],
)
def test_trains_with_the_largest_batch(strategy: str, project: str) -> None:
    module, data = PROJECTS[project]()
    make, extras, samples = STRATEGIES[strategy]
    probe = MaxBatchProbe(budget=budget_for(123, extras=extras), headroom=0.0)
    trainer(probe, strategy=make()).fit(module, **data)
    assert probe.result is not None
    assert probe.result.max_batch == probe.result.batch_size == 123
    assert probe.result.previous == 4
    assert probe.result.limited_by == "memory"
    held = [SAMPLES] if strategy != "federated" else [samples] * 2
    assert sorted(module.sizes, reverse=True) == sorted(
        (size for n in held for size in [123] * (n // 123) + [n % 123]), reverse=True
    )


def test_what_a_project_keeps_is_set_and_its_own_loader_is_not() -> None:
    probe = MaxBatchProbe(budget=budget_for(50), headroom=0.0)
    module = WithHparams()
    trainer(probe).fit(module)
    assert module.hparams["batch_size"] == 50
    loader = DataLoader(dataset(), 4)
    trainer(MaxBatchProbe(budget=budget_for(50), headroom=0.0)).fit(Watched(), loader)
    assert loader.batch_size == 4
    hard = HardCoded()
    trainer(MaxBatchProbe(budget=budget_for(50), headroom=0.0)).fit(hard)
    assert hard.train_dataloader().batch_size == 4  # only while the run lasted


def test_an_exception_undoes_it_too() -> None:
    class Failing(HardCoded):
        def on_train_epoch_end(self) -> None:
            raise KeyError("mine")

    module = Failing()
    with pytest.raises(KeyError, match="mine"):
        trainer(MaxBatchProbe(budget=budget_for(50), headroom=0.0)).fit(module)
    assert module.train_dataloader().batch_size == 4


def test_a_name_of_ones_own() -> None:
    class Own(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.bs = 4

        def train_dataloader(self) -> Any:
            return DataLoader(dataset(), self.bs)

    module = Own()
    trainer(MaxBatchProbe(budget=budget_for(50), headroom=0.0, batch_arg_name="bs")).fit(module)
    assert module.bs == 50
    with pytest.raises(ValueError, match="batch_arg_name='size'"):
        trainer(MaxBatchProbe(batch_arg_name="size")).fit(Own())


@pytest.mark.parametrize("apply", [True, False])
def test_the_report_names_the_limit_and_what_becomes_of_the_batch_size(
    apply: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_fedscale.callbacks.max_batch_probe.report.rank_zero_info", said.append)
    trainer(MaxBatchProbe(budget="1GiB", apply=apply), max_steps=1).fit(WithAttribute())
    (line,) = said
    assert "limited by samples" in line
    assert "was 4" in line
    assert ("unchanged" in line) is not apply


def test_only_reporting() -> None:
    module = WithAttribute()
    probe = MaxBatchProbe(budget=budget_for(50), headroom=0.0, apply=False)
    trainer(probe).fit(module)
    assert probe.result is not None
    assert probe.result.max_batch == 50
    assert probe.result.batch_size == module.batch_size == 4
    assert set(module.sizes) == {4}


def test_several_loaders() -> None:
    class Both(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert len(batch["a"][0]) == len(batch["b"][0])
            return super().training_step(batch["a"], batch_idx) + Classifier.training_step(self, batch["b"], batch_idx)

    def loaders() -> dict[str, Any]:
        return {"a": DataLoader(dataset(), 4), "b": DataLoader(dataset(), 4)}

    for given in (loaders(), CombinedLoader(loaders(), "min_size")):
        module = Both()
        probe = MaxBatchProbe(budget=2 * budget_for(40), headroom=0.0)
        trainer(probe).fit(module, given)
        assert probe.result is not None
        assert module.sizes[0] == probe.result.max_batch > 4


def test_schedules_that_depend_on_the_number_of_steps() -> None:
    class Scheduled(WithAttribute):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.total = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(self.total))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Scheduled()
    trainer(MaxBatchProbe(budget=budget_for(200), headroom=0.0)).fit(module)
    assert module.total == len(module.sizes) < SAMPLES / 4


def test_not_more_than_there_are() -> None:
    module = WithAttribute()
    probe = MaxBatchProbe(budget="4GiB")
    trainer(probe).fit(module)
    assert probe.result is not None
    assert probe.result.max_batch == SAMPLES
    assert probe.result.limited_by == "samples"
    probe = MaxBatchProbe(budget="4GiB", max_samples=7)
    trainer(probe).fit(WithAttribute())
    assert probe.result is not None
    assert probe.result.max_batch == 7
    federated = MaxBatchProbe(budget="4GiB")
    trainer(federated, strategy=FederatedStrategy(num_clients=3)).fit(WithAttribute())
    assert federated.result is not None
    assert federated.result.max_batch == SAMPLES // 3


def test_tails_that_are_dropped_leave_no_client_without_a_batch() -> None:
    probe, module = MaxBatchProbe(budget="1GiB"), Watched()
    partitioner = SizePartitioner([20, 180, 400])
    strategy = FederatedStrategy(partitioner=partitioner, executor="sequential")
    trainer(probe, strategy=strategy).fit(module, DataLoader(dataset(), 4, shuffle=True, drop_last=True))
    assert probe.result is not None
    assert probe.result.max_batch == 20
    assert set(module.sizes) == {20}


# ---- which sample


class Texts(Dataset[Any]):
    """One long text among short ones."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(200 if index == 333 else 5 + index % 5, 64), index % 10


def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    inputs = nn.utils.rnn.pad_sequence([sample for sample, _ in samples], batch_first=True)
    return inputs, torch.tensor([label for _, label in samples])


class OfTexts(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        return nn.functional.cross_entropy(self.network(batch[0]).mean(1), batch[1])


def test_the_longest_sample_is_probed() -> None:
    probe = MaxBatchProbe(budget="8MiB", headroom=0.0)
    trainer(probe).fit(OfTexts(), DataLoader(Texts(), 4, collate_fn=padded))
    assert probe.result is not None
    longest = padded([Texts()[333]] * 2)
    assert probe.result.max_batch == estimate_memory(OfTexts(), longest).max_batch(2**23, headroom=0.0)


def test_iterable_data_is_not_consumed() -> None:
    class Stream(IterableDataset[Any]):
        def __init__(self) -> None:
            self.given = 0

        def __iter__(self) -> Any:
            for sample in zip(*dataset(40).tensors, strict=True):
                self.given += 1
                yield sample

    stream, module = Stream(), Watched()
    probe = MaxBatchProbe(budget=budget_for(15), headroom=0.0)
    trainer(probe).fit(module, DataLoader(stream, 4))
    assert module.sizes == [15, 15, 10]
    assert stream.given == 40


class Graphs(Dataset[Any]):
    """Samples that no function knows how to repeat, except their own collate function."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(1 + index % 3, 64)


class GraphBatch:
    def __init__(self, parts: list[Tensor]) -> None:
        self.nodes = torch.cat(parts)
        self.owner = torch.cat([torch.full((len(part),), n) for n, part in enumerate(parts)])
        self.count = len(parts)

    def to(self, device: Any) -> GraphBatch:
        return self


class OfGraphs(Watched):
    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        self.sizes.append(batch.count)
        outputs = self.network(batch.nodes)
        pooled = torch.zeros(batch.count, 10).index_add(0, batch.owner, outputs)
        return pooled.square().mean()


def test_batches_of_ones_own_kind_are_collated() -> None:
    module, probe = OfGraphs(), MaxBatchProbe(budget=10**6, headroom=0.0)
    trainer(probe).fit(module, DataLoader(Graphs(), 4, collate_fn=GraphBatch))
    assert probe.result is not None
    assert module.sizes[0] == probe.result.max_batch > 4


class Slices:
    """A loader that is no DataLoader."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return zip(*(tensor.split(self.size) for tensor in dataset(60).tensors), strict=True)

    def __len__(self) -> int:
        return -(-60 // self.size)


class Hand(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return Slices(self.batch_size)


def test_loaders_of_ones_own_kind_with_make_batch() -> None:
    module, data = Watched(), Hand()
    probe = MaxBatchProbe(budget=budget_for(25), headroom=0.0, make_batch=lambda n: dataset(n)[:])
    trainer(probe).fit(module, datamodule=data)
    assert module.sizes == [25, 25, 10]
    with pytest.raises(ValueError, match=r"train_dataloaders=Slices: .* pass make_batch="):
        trainer(MaxBatchProbe(budget="1GiB")).fit(Watched(), datamodule=Hand())
    with pytest.raises(ValueError, match="train_dataloaders=Slices: there is no batch size"):
        trainer(MaxBatchProbe(budget=budget_for(25), make_batch=lambda n: dataset(n)[:])).fit(Watched(), Slices(4))


def test_a_collate_function_that_makes_always_the_same() -> None:
    loader = DataLoader(dataset(), 4, collate_fn=lambda samples: dataset(3)[:])
    with pytest.raises(ValueError, match=r"collate_fn: .*3 rows.*make_batch="):
        trainer(MaxBatchProbe(budget="1GiB")).fit(Watched(), loader)


def test_a_module_that_depends_on_its_data() -> None:
    class Selective(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch[0].sum() == float("inf"):
                return self.network(batch[0]).sum()
            return super().training_step(batch, batch_idx)

    probe, module = MaxBatchProbe(budget=budget_for(50), headroom=0.0), Selective()
    with pytest.warns(UserWarning, match=r"MaxBatchProbe: .*fake tensors"):
        trainer(probe).fit(module, DataLoader(dataset(), 4))
    assert probe.result is not None
    assert "DataDependent" in probe.result.fallback
    assert 45 <= probe.result.max_batch <= 50
    assert module.sizes[0] == probe.result.max_batch


def test_training_goes_on_where_no_other_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lightning_fedscale.callbacks.max_batch_probe.report.rank_zero_info", told.append)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    libraries._ask.cache_clear()
    module, batch = KEEPERS["grouped"].project()
    probe = MaxBatchProbe(budget="64MiB")
    run = trainer(probe, max_steps=1)
    run.fit(module, DataLoader(TensorDataset(*(tensor.repeat(20, *[1] * (tensor.ndim - 1)) for tensor in batch)), 2))
    assert run.global_step == 1
    assert probe.result is not None
    assert probe.result.parts["libraries"] > 0
    (line,) = (line for line in told if "a batch of" in line)
    assert "not measured (FileNotFoundError" in line
    assert ProbeResult(**probe.result.state_dict()) == probe.result


# ---- nothing is left behind


class Everything(Callback):
    """All that a probe could change, when ``on_fit_start`` reaches this callback."""

    def __init__(self) -> None:
        self.state: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.fit_loop._data_source.instance
        numpy: Any = np.random.get_state()
        self.state = copy.deepcopy([
            pl_module.state_dict(), [p.grad for p in pl_module.parameters()], [m.training for m in pl_module.modules()],
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            trainer.precision_plugin.state_dict(),
            random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state(),
            loader.generator.get_state(), loader._iterator,
            trainer.fit_loop.state_dict(), trainer.global_step, trainer.accumulate_grad_batches,
            {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("probe/")},
            [(m.metric_state, m._update_count) for m in pl_module.modules() if isinstance(m, Metric)],
            pl_module.sizes, pl_module._trainer is trainer, sorted(vars(pl_module)), sorted(vars(trainer.strategy)),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(),
        ])  # fmt: skip


class Rich(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 10))
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        self.log("noise", random.random() + np.random.rand())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adagrad(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def scaled() -> MixedPrecision:
    """With a scaler, which Lightning itself makes on CUDA only."""
    plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu", init_scale=8.0))
    plugin.device = "cpu"
    return plugin


@pytest.mark.parametrize(("strategy", "verify"), [("auto", False), *((strategy, True) for strategy in STRATEGIES)])
def test_nothing_changes(strategy: str, verify: bool) -> None:
    def run(*probes: MaxBatchProbe) -> tuple[Any, Any, Rich]:
        pl.seed_everything(3, verbose=False)
        before, after, module = Everything(), Everything(), Rich()
        loader = DataLoader(dataset(64), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
        options = {"strategy": STRATEGIES[strategy][0](), "plugins": scaled(), "max_epochs": 2}
        trainer(before, *probes, after, **options).fit(module, loader)
        return before.state, after.state, module

    before, after, probed = run(MaxBatchProbe(budget="64MiB", apply=False, verify=verify))
    assert len(before) == len(after) > 20
    assert [number for number, (old, new) in enumerate(zip(before, after, strict=True)) if not same(old, new)] == []
    plain = run()[-1]
    assert all(map(torch.equal, probed.state_dict().values(), plain.state_dict().values()))


# ---- confirmed by real steps


def plenty(*shape: int) -> DataLoader[Any]:
    """Ten million samples that take no memory."""
    return DataLoader(
        TensorDataset(torch.zeros(shape).expand(10**7, *shape), torch.zeros(1, dtype=torch.long).expand(10**7)), 4
    )


@pytest.mark.parametrize("budget", [2**27, 2**28])
def test_verified_under_a_real_limit(budget: int) -> None:
    probe = MaxBatchProbe(budget=budget, verify=True, apply=False)
    trainer(probe, max_steps=1).fit(Watched(), plenty(64))
    result = probe.result
    assert result is not None
    assert (result.verified, result.real_steps, result.out_of_memory) == (True, 2, 0)
    assert result.limited_by == "memory"
    assert result.measured_bytes == pytest.approx(result.predicted_bytes, rel=0.1)


@pytest.mark.slow
def test_never_above_the_truth() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    budget = 2**26
    probe = MaxBatchProbe(budget=budget, headroom=0.1, verify=True, apply=False)
    trainer(probe, max_steps=1).fit(Classifier(network), plenty(3, 32, 32))
    assert probe.result is not None
    assert probe.model is not None
    chosen = probe.result.max_batch
    step_of = probe.model.real_step
    assert real_step(step_of(chosen), budget).fits
    assert not real_step(step_of(int(chosen / 0.7) + 1), budget).fits


# ---- logged, saved, resumed


def test_logged(tmp_path: Path) -> None:
    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path, "tensorboard")
    probe = MaxBatchProbe(budget=budget_for(50), headroom=0.0, device_classes=["phone", "t4"])
    run = trainer(probe, logger=[table, board])
    run.fit(WithAttribute())
    assert run.callback_metrics["probe/max_batch"] == 50
    written = (Path(table.log_dir) / "metrics.csv").read_text()
    for name in ("probe/max_batch", "probe/predicted_bytes", "probe/budget_bytes", "probe/max_batch/phone"):
        assert name in written
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir).Reload()
    assert events.Scalars("probe/max_batch")[0].value == 50
    assert "probe/memory" in events.Tags()["images"]


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_step_times_are_fitted_while_training(strategy: str, tmp_path: Path, clock: Clock) -> None:
    class Timed(WithAttribute):
        """Takes 2 ms and 0.2 ms for each sample."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            clock.now += 0.002 + 0.0002 * len(batch[0])
            return super().training_step(batch, batch_idx)

    clock.tick = 0.0
    logger = TensorBoardLogger(tmp_path)
    probe = MaxBatchProbe(budget="1GiB", max_samples=64, noise_scale=500.0)
    options: dict[str, Any] = {"max_epochs": 4, "logger": logger}
    if strategy == "federated":
        partitioner = SizePartitioner([30, 200, 370])
        options["strategy"] = FederatedStrategy(partitioner=partitioner, executor="sequential", rounds_per_epoch=3)
    trainer(probe, **options).fit(Timed())
    step = probe.times.fit()
    assert step.identified
    assert (step.fixed, step.per_sample) == pytest.approx((0.002, 0.0002), rel=1e-6)
    assert step.residual == pytest.approx(0, abs=1e-6)
    model = probe.performance(sync=0.1)
    assert model.max_batch == 64
    assert model.noise_scale == 500.0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload()
    names = {"step_fixed_seconds", "step_seconds_per_sample", "step_residual", "best_batch"}
    assert {f"probe/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert "probe/time" in events.Tags()["images"]


def test_data_that_draws_is_probed_without_a_trace() -> None:
    class Augmented(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            inputs, target = super().__getitem__(index)
            return inputs + torch.randn(64) * random.random() * np.random.rand(), target

    class Splitting(Watched):
        def train_dataloader(self) -> Any:
            part, _ = torch.utils.data.random_split(Augmented(*dataset(80).tensors), [64, 16])
            return DataLoader(part, 8, shuffle=True)

    results = []
    for probes in ([], [MaxBatchProbe(budget="1GiB", apply=False)]):
        pl.seed_everything(5, verbose=False)
        module = Splitting()
        trainer(*probes).fit(module)
        results.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(*results)


def test_resumed_runs_keep_their_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in STRATEGIES:
        probe = MaxBatchProbe(budget=budget_for(123, extras=STRATEGIES[strategy][1]), headroom=0.0)
        run = trainer(probe, strategy=STRATEGIES[strategy][0]())
        run.fit(WithAttribute())
        run.save_checkpoint(tmp_path / f"{strategy}.ckpt")
    monkeypatch.setattr(
        "lightning_fedscale.callbacks.max_batch_probe.rank_probe.estimate_memory", None
    )  # must not be asked
    for strategy in STRATEGIES:
        again, module = MaxBatchProbe(budget=budget_for(10), headroom=0.0), WithAttribute()
        trainer(again, strategy=STRATEGIES[strategy][0](), max_epochs=2).fit(
            module, ckpt_path=tmp_path / f"{strategy}.ckpt", weights_only=True
        )
        assert module.sizes[0] == 123
        assert again.result is not None
        assert again.result.max_batch == 123
        assert again.result.previous == 4


def test_device_classes() -> None:
    small = DeviceClass("small", budget_for(30), 1e9, 1e9, 1e6, 1e6)
    tiny = DeviceClass("tiny", 1000, 1e9, 1e9, 1e6, 1e6)
    probe = MaxBatchProbe(budget="1GiB", headroom=0.0, device_classes=[small, tiny, "phone"], apply=False)
    trainer(probe, max_steps=1).fit(WithAttribute())
    assert probe.result is not None
    assert probe.result.device_classes == {"small": 30, "tiny": 0, "phone": SAMPLES}
    by_class = MaxBatchProbe(budget=small, headroom=0.0, apply=False)
    trainer(by_class, max_steps=1).fit(WithAttribute())
    assert by_class.result is not None
    assert by_class.result.max_batch == 30


# ---- what cannot be


def test_not_one_sample() -> None:
    with pytest.raises(ValueError, match=r"bytes more than .*; the largest part is (parameters|optimizer state)"):
        trainer(MaxBatchProbe(budget=50_000)).fit(WithAttribute())


def test_a_failed_probe_keeps_its_model() -> None:
    probe = MaxBatchProbe(budget=50_000, apply=False)
    with pytest.warns(UserWarning, match="MaxBatchProbe: nothing was probed"):
        trainer(probe, max_steps=1).fit(WithAttribute())
    assert probe.result is None
    assert probe.model is not None
    assert probe.model.peak(1) > 50_000


def test_no_batch_size_anywhere() -> None:
    class Whole(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return tuple(tensor[:8] for tensor in dataset().tensors)

    with pytest.raises(ValueError, match=r"train_dataloaders=DataLoader: .*batch_size=None"):
        trainer(MaxBatchProbe(budget="1GiB")).fit(Watched(), DataLoader(Whole(), batch_size=None))
    reporting = MaxBatchProbe(budget="1MiB", apply=False)
    trainer(reporting).fit(Watched(), DataLoader(Whole(), batch_size=None))
    assert reporting.result is not None
    # Such items are batches whose rows are the samples, of which nobody knows how many there are.
    assert reporting.result.max_batch == model_of().max_batch(2**20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": "lots"}, "budget='lots'.*device class"),
        ({"budget": "phon"}, "Did you mean 'phone'"),
        ({"headroom": 1.0}, "headroom=1.0"),
        ({"verify": "maybe"}, "verify='maybe'"),
        ({"device_classes": ["toaster"]}, "device_class='toaster' is not known"),
        ({"device_classes": "phone"}, r"pass a list, \['phone'\]"),
        ({"make_batch": 3}, "make_batch=3"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"max_samples": True}, "max_samples=True"),
        ({"device_classes": 5}, "device_classes=5"),
        ({"apply": "no"}, "apply='no'"),
        ({"batch_arg_name": 5}, "batch_arg_name=5"),
        ({"noise_scale": 0}, "noise_scale=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MaxBatchProbe(**arguments)


def test_sharded_strategies_are_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Elsewhere:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="strategy=ModelParallelStrategy"):
        check_whole_module(Elsewhere())  # type: ignore[arg-type]
