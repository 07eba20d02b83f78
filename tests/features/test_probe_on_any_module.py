"""`MaxBatchProbe` is an observer: whatever a module, its data and its batches are, training is as without the probe."""

from __future__ import annotations

import collections
import inspect
import threading
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import MaxBatchProbe
from lightning_fedscale.devices import estimate_memory
from lightning_fedscale.devices.profiling.copies import copied
from lightning_fedscale.devices.profiling.stubs import TrainerView, silence
from tests.ids import stable

ROWS, FEATURES = 24, 6
COLLECTED: list[float] = []


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, FEATURES, generator=generator)
        self.targets = torch.randn(ROWS, 1, generator=generator)
        self.read = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return self.inputs[index], self.targets[index]


class Regression(pl.LightningModule):
    """Fits a line with a little dropout, so that generators matter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
        self.steps = 0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Data(pl.LightningDataModule):
    collate: Any = None

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), 4, shuffle=True, collate_fn=self.collate)


# ---- how a step is called


class AnyArguments(Regression):
    def training_step(self, *args: Any) -> Any:
        batch, index = args
        assert index == int(index)
        return self.loss(*batch)


class OnlyBatch(Regression):
    def training_step(self, samples: Any) -> Any:  # type: ignore[override]
        return self.loss(*samples)


class OwnNames(Regression):
    def training_step(self, samples: Any, number: int) -> Any:
        assert number >= 0
        return {"loss": self.loss(*samples), "more": "text"}


class TakesIterator(Regression):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(*batch)


class SkipsSteps(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch) if batch_idx % 2 == 0 else None


# ---- in which state it finds itself


class PartInEval(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.5)).requires_grad_(False).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert not any(part.training for part in self.frozen.modules())
        assert self.net.training
        return self.loss(self.frozen(batch[0]), batch[1])


class PreparesAtStart(Regression):
    def on_fit_start(self) -> None:
        self.scale = torch.ones(())

    def on_train_start(self) -> None:
        self.offset = 0.0 * self.trainer.max_epochs  # type: ignore[operator]

    def on_train_epoch_start(self) -> None:
        self.epoch_scale = 1.0 + self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rows = len(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.rows == len(batch[0])
        return self.loss(*batch) * self.scale * self.epoch_scale + self.offset


class NoGradInStep(torch.optim.Adam):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class ClosureWithoutGrad(Regression):
    def configure_optimizers(self) -> Any:
        return NoGradInStep(self.parameters(), lr=0.01)


class OwnOptimizerStep(Regression):
    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + batch_idx)
        optimizer.step(closure=optimizer_closure)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()


class Adversaries(Regression):
    """Two optimizers, two schedulers, one of which goes by a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = self.loss(*batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        schedulers: Any = self.lr_schedulers()
        plateau, steps = schedulers
        plateau.step(loss)
        steps.step()
        self.log("lr", steps.get_last_lr()[0])

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 3)]
        first = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0]), "monitor": "lr"}
        return optimizers, [first, torch.optim.lr_scheduler.StepLR(optimizers[1], 1)]


class OneScheduler(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(*batch))
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class MetricIsLoss(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanSquaredError()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        return self.metric(self.net(inputs), targets)


class CollectionIsLoss(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection([MeanSquaredError()])

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        return sum(self.metrics(self.net(inputs), targets).values())


# ---- what a batch is


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


class Encoding(UserDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Opaque:
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.count = inputs, targets, len(inputs)

    def to(self, device: Any) -> Opaque:
        return Opaque(self.inputs.to(device), self.targets.to(device))


def stack(samples: Any) -> Pair:
    return Pair(*(torch.stack(column) for column in zip(*samples, strict=True)))


def named(samples: Any) -> dict[str, Any]:
    return {"x": stack(samples)[0], "y": stack(samples)[1], "names": [f"row {i}" for i in range(len(samples))]}


class OfPairs(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert type(batch) is Pair
        return self.loss(batch.inputs, batch.targets)


class OfEncodings(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert type(batch) is Encoding
        return self.loss(batch.x, batch.y)


class OfOpaque(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch.count == len(batch.inputs)
        return self.loss(batch.inputs, batch.targets)


class OfLists(Regression):
    """A list of samples of each, as in object detection."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        assert isinstance(inputs, list)
        assert len(inputs) == len(targets)
        return self.loss(torch.stack(inputs), torch.stack(targets))


class TakesApart(Regression):
    """Changes its batch, which is the only one of its size that the probe might have."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        names = batch.pop("names")
        inputs = batch.pop("x")
        assert len(names) == len(inputs)
        batch["y"].requires_grad_()
        return self.loss(inputs, batch.pop("y"))


class OfNames(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(batch["names"]) == len(batch["x"])
        return self.loss(batch["x"], batch["y"])


class NeedsFour(Regression):
    """Contrasts samples with each other, so that fewer than four are refused."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) < 4:
            raise ValueError("at least four samples")
        return self.loss(*batch)


def of(collate: Callable[[Any], Any]) -> type[Data]:
    return type("Collating", (Data,), {"collate": staticmethod(collate)})


# ---- what it holds on to


class Diary(Callback):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: list[float] = []


class HoldsEverything(Regression):
    """Refers to what nobody can copy, and writes to what a copy would share."""

    shared: ClassVar[list[float]] = []
    counts: ClassVar[collections.Counter[str]] = collections.Counter()
    total = 0

    def on_fit_start(self) -> None:
        self.boss, self.ways = self.trainer, self.trainer.strategy

    def setup(self, stage: str) -> None:
        self.kept = {"trainer": self.trainer, "data": self.trainer.datamodule, "diary": self.trainer.callbacks}  # type: ignore[attr-defined]
        self.loggers_ = self.trainer.loggers

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.shared.append(1.0)
        COLLECTED.append(2.0)
        self.counts["steps"] += 1
        type(self).total += 1
        next(c for c in self.kept["diary"] if isinstance(c, Diary)).seen.append(3.0)
        self.kept["data"].notes["steps"] = self.kept["data"].notes.get("steps", 0) + 1
        return loss


class HoldsALock(Data):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.notes: dict[str, int] = {}


class Preparing(Data):
    """Its hooks make the batch what the step wants."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls += 1
        return {"pair": batch}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"prepared": batch["pair"]}


class Prepared(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch["prepared"])


PROBED: dict[str, tuple[type[Regression], type[Data]]] = {
    "any arguments": (AnyArguments, Data),
    "only the batch": (OnlyBatch, Data),
    "names of its own": (OwnNames, Data),
    "an iterator": (TakesIterator, Data),
    "no loss now and then": (SkipsSteps, Data),
    "a part in eval mode": (PartInEval, Data),
    "hooks at the start": (PreparesAtStart, Data),
    "closure without gradients": (ClosureWithoutGrad, Data),
    "optimizer_step and backward": (OwnOptimizerStep, Data),
    "two optimizers and schedulers": (Adversaries, Data),
    "one scheduler": (OneScheduler, Data),
    "a metric as loss": (MetricIsLoss, Data),
    "a collection as loss": (CollectionIsLoss, Data),
    "named tuples": (OfPairs, of(stack)),
    "mappings": (OfEncodings, of(lambda samples: Encoding(named(samples)))),
    "opaque batches": (OfOpaque, of(lambda samples: Opaque(*stack(samples)))),
    "lists": (OfLists, of(lambda samples: tuple(map(list, zip(*samples, strict=True))))),
    "a step that takes its batch apart": (TakesApart, of(named)),
    "texts": (OfNames, of(named)),
    "at least four": (NeedsFour, Data),
    "hooks of the data module": (Prepared, Preparing),
    "references": (HoldsEverything, HoldsALock),
}


class Fixed(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return self.loss(inputs.view(2, 2, FEATURES).flatten(0, 1), targets)


class CannotBeCopied(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class EmptyToSome(Data):
    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        loader.collate_fn = self.only_four
        return loader

    @staticmethod
    def only_four(samples: Any) -> Any:
        if len(samples) != 4:
            raise OSError("four files make a batch")
        return stack(samples)


FAILING: dict[str, tuple[type[Regression], type[Data], str]] = {
    "one batch size": (
        Fixed,
        Data,
        r"a training step on a copy of the module fails \(RuntimeError: shape .*make_batch=",
    ),
    "a lock": (CannotBeCopied, Data, "module=CannotBeCopied cannot be copied.*__getstate__"),
    "collate function": (Regression, EmptyToSome, "OSError: four files make a batch.*remove MaxBatchProbe"),
}


def trained(make: type[Regression], data: type[Data], *callbacks: Callback, **options: Any) -> Any:
    """A module after two epochs, and everything outside of it that it may have written to."""
    pl.seed_everything(1, verbose=False)
    COLLECTED.clear()
    HoldsEverything.shared.clear()
    HoldsEverything.counts.clear()
    HoldsEverything.total = 0
    module, source, diary = make(), data(), Diary()
    pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        callbacks=[*callbacks, diary], enable_progress_bar=False, enable_model_summary=False, **options,
    ).fit(module, datamodule=source)  # fmt: skip
    outside = [
        list(COLLECTED), list(HoldsEverything.shared), dict(HoldsEverything.counts), HoldsEverything.total, diary.seen,
        getattr(source, "notes", None), getattr(source, "calls", None), module.steps,
        module.trainer.callback_metrics.keys(),
    ]  # fmt: skip
    return module.state_dict(), outside, torch.rand(3)


def assert_same(left: Any, right: Any) -> None:
    assert left[0].keys() == right[0].keys()
    assert all(map(torch.equal, left[0].values(), right[0].values()))
    kept = [[name for name in run[1][-1] if not name.startswith("probe/")] for run in (left, right)]
    assert (left[1][:-1], kept[0]) == (right[1][:-1], kept[1])
    assert torch.equal(left[2], right[2])


@pytest.mark.parametrize("kind", PROBED)
def test_probed_and_trained_as_without(kind: str) -> None:
    make, data = PROBED[kind]
    probe = MaxBatchProbe(budget="1GiB", apply=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MaxBatchProbe: nothing")
        assert_same(trained(make, data, probe), trained(make, data))
    assert probe.result is not None
    assert probe.result.max_batch == ROWS
    assert not probe.result.fallback


@pytest.mark.parametrize("kind", ["references", "texts", "a metric as loss", "hooks of the data module"])
def test_clients_train_as_without(kind: str) -> None:
    make, data = PROBED[kind]
    probe = MaxBatchProbe(budget="1GiB", apply=False)
    options = [{"strategy": FederatedStrategy(num_clients=3, executor="sequential")} for _ in range(2)]
    assert_same(trained(make, data, probe, **options[0]), trained(make, data, **options[1]))
    assert probe.result is not None
    assert probe.result.max_batch == ROWS // 3


@pytest.mark.parametrize("kind", FAILING)
def test_a_failure_is_one_line_and_training_goes_on(kind: str) -> None:
    make, data, says = FAILING[kind]
    probe = MaxBatchProbe(budget="1GiB", apply=False)
    with pytest.warns(UserWarning, match=f"MaxBatchProbe: nothing was probed.*: .*{says}") as told:
        found = trained(make, data, probe)
    lines = [str(each.message) for each in told if "MaxBatchProbe" in str(each.message)]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert probe.result is None
    assert_same(found, trained(make, data))


@pytest.mark.parametrize("kind", FAILING)
def test_a_failure_to_set_the_batch_size_is_one_clear_error(kind: str) -> None:
    make, data, says = FAILING[kind]
    steps: list[int] = []

    class Counting(make):  # type: ignore[valid-type, misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if type(self.trainer) is pl.Trainer:
                steps.append(batch_idx)

    Counting.__name__ = make.__name__
    with pytest.raises((RuntimeError, TypeError), match=says):
        trained(Counting, data, MaxBatchProbe(budget="1GiB"))
    assert steps == []


@pytest.mark.parametrize(
    "options", [{"budget": 200}, {"batch_arg_name": "size"}, {"make_batch": lambda samples: 1 / 0}], ids=stable
)
def test_whatever_fails_only_reporting_goes_on(options: dict[str, Any]) -> None:
    probe = MaxBatchProbe(**{"budget": "1GiB", "apply": False, **options})
    with pytest.warns(UserWarning, match="MaxBatchProbe: nothing was probed"):
        found = trained(Regression, Data, probe)
    assert_same(found, trained(Regression, Data))


# ---- read from Lightning, so that what it adds is covered


@pytest.mark.parametrize("hook", _DataHookSelector._valid_hooks)
@pytest.mark.parametrize("owner", ["module", "data"])
def test_every_hook_on_the_way_to_the_step(hook: str, owner: str) -> None:
    def marked(self: Any, batch: Any, *rest: Any) -> Any:
        moved = getattr(super(type(self), self), hook)(batch, *rest)
        return [*moved, hook]

    class Checks(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            *pair, mark = batch
            assert mark == hook
            return self.loss(*pair)

    make = type("Marked", (Checks,), {hook: marked}) if owner == "module" else Checks
    data = type("Marking", (Data,), {hook: marked}) if owner == "data" else Data
    probe = MaxBatchProbe(budget="1GiB", apply=False)
    assert_same(trained(make, data, probe), trained(make, data))
    assert probe.result is not None


def test_nothing_that_the_trainer_can_do_is_done() -> None:
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    view = TrainerView(trainer)
    methods = [name for name, _ in inspect.getmembers(pl.Trainer, inspect.isfunction) if not name.startswith("_")]
    assert {"fit", "save_checkpoint", "print", "log_dict"} & set(methods) >= {"fit", "save_checkpoint", "print"}
    for name in methods:
        assert getattr(view, name)("anything", strange=1) is None


def test_a_metric_that_is_the_loss_is_counted() -> None:
    batch = torch.randn(4, FEATURES), torch.randn(4, 1)
    plain, metric = estimate_memory(Regression(), batch), estimate_memory(MetricIsLoss(), batch)
    assert metric.exact
    assert metric.breakdown(4)["gradients"] == plain.breakdown(4)["gradients"] > 0
    assert metric.breakdown(4)["optimizer state"] == plain.breakdown(4)["optimizer state"] > 0


@pytest.mark.parametrize("by", ["lightning", "the module"])
def test_a_copy_of_a_compiled_module_runs_its_own_steps(by: str) -> None:
    """What torch.compile puts into a module runs the module's own weights, also when it is found in a copy."""
    module = BoringModel()
    if by == "lightning":
        from_compiled(torch.compile(module, backend="eager"))  # type: ignore[arg-type]
    else:
        module.forward = torch.compile(module.forward, backend="eager")  # type: ignore[method-assign]
    assert "forward" in vars(module)
    other = module.other = torch.compile(torch.sin, backend="eager")  # type: ignore[assignment]
    twin = copied(module, TrainerView(None))
    assert not {"forward", "training_step", "validation_step"} & vars(twin).keys()
    assert twin.other is other
    assert "forward" in vars(module)
    torch.nn.init.zeros_(twin.layer.weight)
    torch.nn.init.zeros_(twin.layer.bias)
    assert not twin(torch.ones(1, 32)).any()


def test_a_function_that_a_module_has_compiled_in_place_of_a_method_stays() -> None:
    module = BoringModel()
    module.forward = torch.compile(torch.sin, backend="eager")  # type: ignore[method-assign, arg-type]
    assert copied(module, TrainerView(None)).forward is module.forward


def test_the_trainer_of_a_part_that_is_no_lightning_module_is_its_own() -> None:
    class Part(torch.nn.Linear):
        trainer = "coach"

    module = BoringModel()
    module.inner, module.part = BoringModel(), Part(2, 2)
    view: Any = TrainerView(None)
    silence(module, view)
    assert module.trainer is view
    assert module.inner.trainer is view
    assert module.part.trainer == "coach"
