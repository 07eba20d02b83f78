"""The fourth law: the executor does not matter. Vectorized clients train to the same results as sequential ones."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.core.executors.step_model import StepModel
from lightning_fedscale.core.executors.vectorized import captured_steps
from tests.laws import reference

Parameters = Any


class Net(pl.LightningModule):
    """Enough to go wrong: BatchNorm, dropout, a metric, several kinds of logging."""

    def __init__(
        self,
        optimizer: Callable[[Parameters], Optimizer] = lambda p: SGD(p, lr=0.1),
        dropout: float = 0.0,
        batch_norm: bool = False,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(16)] if batch_norm else []
        self.net = nn.Sequential(
            nn.Linear(12, 16, bias=not batch_norm), *norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self._make, self._decay = optimizer, decay

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", logits.max(), reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self._make(self.parameters())
        if self._decay is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, self._decay)}


class Run:
    """A run's outcome."""

    def __init__(
        self,
        executor: str,
        make: Callable[[], pl.LightningModule],
        *,
        data: Dataset[Any] | None = None,
        rounds: int = 3,
        partition: Partition | None = None,
        loader: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        callbacks: list[Callback] | None = None,
        dtype: torch.dtype = torch.float64,
        ckpt_path: str | None = None,
        **strategy: Any,
    ) -> None:
        torch.manual_seed(0)
        self.module = make().to(dtype)
        data = reference.dataset(dtype=dtype) if data is None else data
        self.strategy = FederatedStrategy(
            partitioner=reference.unequal_clients(101, 6) if partition is None else partition,
            **{"executor": executor, "clients_per_round": 5, **strategy},
        )  # fmt: skip
        self.trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=rounds, strategy=self.strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks or [], **(trainer or {}),
        )  # fmt: skip
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"batch_size": 8, "shuffle": True, **(loader or {})}
            self.trainer.fit(self.module, DataLoader(data, **options), ckpt_path=ckpt_path)
        self.warnings = [str(w.message) for w in caught if "they cannot be vectorized: " in str(w.message)]
        self.state = {k: v.detach().clone() for k, v in self.module.state_dict().items()}

    @property
    def kind(self) -> str | None:
        """How clients trained in the end."""
        federation = self.strategy._federation
        assert federation is not None
        return federation.fit.executor.kind


def assert_alike(one: Run, other: Run, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(one.state, other.state, rtol=rtol, atol=atol)
    mine, theirs = one.strategy.last_round, other.strategy.last_round
    assert mine is not None
    assert theirs is not None
    for name in ("clients", "weights", "samples", "local_steps", "losses", "delta_norms"):
        np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=max(rtol, 1e-6), err_msg=name)
    times = {"round/seconds", "round/idle", "round/padding"}
    logged, expected = one.trainer.callback_metrics, other.trainer.callback_metrics
    assert logged.keys() == expected.keys()
    for name in logged.keys() - times:
        torch.testing.assert_close(
            logged[name], expected[name], rtol=max(rtol, 1e-5), atol=1e-6, check_dtype=False, equal_nan=True
        )


def both(make: Callable[[], pl.LightningModule], **options: Any) -> tuple[Run, Run]:
    """The same run with either executor; the first must really have been vectorized."""
    vectorized, sequential = Run("vectorized", make, **options), Run("sequential", make, **options)
    assert not vectorized.warnings
    assert vectorized.kind == "vectorized"
    return vectorized, sequential


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: Adam(p, lr=0.01),
    "adam, foreach": lambda p: Adam(p, lr=0.01, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw, amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: Adadelta(p),
    "adamax": lambda p: Adamax(p),
    "nadam": lambda p: NAdam(p),
    "radam": lambda p: RAdam(p),
    "rprop": lambda p: Rprop(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_every_elementwise_optimizer(name: str, client_optimizer: str) -> None:
    rounds = {"reset": 2, "keep": 3}[client_optimizer]
    options = {"client_optimizer": client_optimizer, "rounds": rounds, "local_epochs": 2}
    assert_alike(*both(lambda: Net(OPTIMIZERS[name]), **options), rtol=1e-7)


def groups(parameters: Parameters) -> Optimizer:
    first, *rest = list(parameters)
    both_groups: list[dict[str, Any]] = [{"params": rest, "lr": 0.02, "weight_decay": 0.1}, {"params": [first]}]
    return Adam(both_groups, lr=0.01)


def some(parameters: Parameters) -> Optimizer:
    return SGD(list(parameters)[1:], lr=0.1, momentum=0.9)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__(lambda p: Adam([q for q in p if q.requires_grad], lr=0.01))
        self.net[0].weight.requires_grad_(False)


FEATURES: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any]]] = {
    "plain": (Net, {}),
    "dropout": (lambda: Net(dropout=0.3), {}),
    "batch norm": (
        lambda: Net(batch_norm=True),
        {"partition": Partition.from_lists([range(i * 20, i * 20 + 5 + 2 * i) for i in range(7)])},
    ),
    "param groups": (lambda: Net(groups), {}),
    "a parameter without optimizer": (lambda: Net(some), {}),
    "frozen": (Frozen, {"client_optimizer": "keep"}),
    "accumulation": (lambda: Net(OPTIMIZERS["adam"]), {"trainer": {"accumulate_grad_batches": 3}}),
    "accumulation, dropout, keep": (
        lambda: Net(OPTIMIZERS["nesterov"], dropout=0.2),
        {"trainer": {"accumulate_grad_batches": 2}, "client_optimizer": "keep"},
    ),
    "clip by norm": (Net, {"trainer": {"gradient_clip_val": 0.05}}),
    "clip by value": (Net, {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}}),
    "clip and accumulate": (Net, {"trainer": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}}),
    "schedule": (lambda: Net(OPTIMIZERS["momentum"], decay=0.7), {}),
    "local steps": (lambda: Net(OPTIMIZERS["adam"], dropout=0.2), {"local_steps": 3, "client_optimizer": "keep"}),
    "waves of two": (lambda: Net(dropout=0.3), {"clients_per_wave": 2}),
    "waves of three, no cache": (lambda: Net(dropout=0.3), {"clients_per_wave": 3, "cache_dataset": False}),
    "no cache": (lambda: Net(dropout=0.3), {"cache_dataset": False}),
    "a worker": (Net, {"cache_dataset": False, "loader": {"num_workers": 1}}),
    "drop last": (Net, {"loader": {"drop_last": True, "batch_size": 2}, "clients_per_round": 3}),
    "64-true": (Net, {"trainer": {"precision": "64-true"}}),
    "rounds in an epoch": (Net, {"rounds_per_epoch": 3, "rounds": 2}),
    "server by samples held": (Net, {"aggregator": "uniform"}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature: str) -> None:
    make, options = FEATURES[feature]
    if feature == "drop last":
        options = {**options, "partition": Partition.from_lists([range(i * 20, i * 20 + 5 + i) for i in range(7)])}
    assert_alike(*both(make, **options), rtol=1e-7)


@pytest.mark.parametrize(("precision", "rtol"), [("32-true", 1e-4), ("bf16-mixed", 0.1), ("bf16-true", 0.1)])
def test_every_precision(precision: str, rtol: float) -> None:
    options = {"trainer": {"precision": precision}, "dtype": torch.float32}
    assert_alike(*both(Net, **options), rtol=rtol, atol=rtol / 10)


class Augmented(Dataset[Any]):
    """Every sample is noisy, from all three generators."""

    def __init__(self) -> None:
        self.inner = reference.dataset(dtype=torch.float64)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.inner[index]
        return inputs + torch.randn(12) + random.random() + float(np.random.rand()), label

    def __len__(self) -> int:
        return len(self.inner)


@pytest.mark.parametrize("width", [None, 2])
def test_random_samples_and_dropout_draw_the_same_numbers(width: int | None) -> None:
    assert_alike(*both(lambda: Net(dropout=0.3), data=Augmented(), clients_per_wave=width), rtol=1e-7)


class Noisy(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs = batch[0] + 0.1 * torch.randn_like(batch[0]) + torch.rand(12, dtype=batch[0].dtype)
        mask = torch.bernoulli(torch.sigmoid(inputs))
        return super().training_step([inputs * mask, batch[1]], batch_idx)


def test_a_step_draws_for_each_client() -> None:
    assert_alike(*both(lambda: Noisy(dropout=0.2)), rtol=1e-7)


class Metrics(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        value = self.accuracy(logits, batch[1])
        self.log("value", value, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"constant": 2.0, "batch": float(len(batch[0]))}, on_epoch=True, on_step=False)
        return nn.functional.cross_entropy(logits, batch[1])


def test_torchmetrics_and_numbers() -> None:
    vectorized, sequential = both(Metrics)
    assert_alike(vectorized, sequential)
    assert {"value", "accuracy", "constant", "batch"} <= vectorized.trainer.callback_metrics.keys()


class Transferred(Net):
    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + torch.randn_like(batch[0]), batch[1]]


@pytest.mark.parametrize("cache", [True, False])
def test_transfer_hooks(cache: bool) -> None:
    assert_alike(*both(lambda: Transferred(dropout=0.1), cache_dataset=cache), rtol=1e-7)


class Counting(Net):
    """Depends on the number of the batch, the round and an attribute that a hook changes."""

    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 / (1 + self.current_epoch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor * (1.0 if batch_idx % 2 else 0.5) / (1 + self.global_step)


@pytest.fixture
def captures_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured in the second round of three steps each."""
    monkeypatch.setattr(captured_steps, "_CAPTURE_AT", 4)


@pytest.mark.usefixtures("captures_soon")
def test_what_a_step_reads_in_python_is_never_frozen() -> None:
    options = {"rounds": 6, "partition": reference.equal_clients(4, 24), "clients_per_round": 4}
    assert_alike(*both(Counting, **options), rtol=1e-6)


class Annealed(Net):
    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 if self.current_epoch < 4 else 0.1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor


@pytest.mark.usefixtures("captures_soon")
def test_recorded_steps_equal_others_and_follow_attributes() -> None:
    options = {"rounds": 8, "partition": reference.equal_clients(4, 24), "clients_per_round": 4}
    vectorized, sequential = both(lambda: Annealed(dropout=0.2), **options)
    step = vectorized.strategy._federation.fit.executor._vectorized._batched_step  # type: ignore[union-attr]
    assert step is not None
    assert step.captured.reason is None
    assert step.captured.forgotten == 1
    assert step.captured.made == 2
    assert_alike(vectorized, sequential, rtol=1e-6)


# ---- what cannot be vectorized


class Branches(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss > 1.3:  # the offending line
            loss = loss * 2
        return loss


class Reads(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen = loss.item()  # the offending line
        return loss


class Remembers(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last = loss.detach()
        return loss + 0 * self.last


class Adds(Net):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros((), dtype=torch.float64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.total += loss.detach()  # the offending line
        return loss


class Gambles(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + random.random())


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Custom(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return Double.apply(super().training_step(batch, batch_idx))  # the offending line


class TwiceReferenced(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [cast(nn.Linear, self.net[0]).weight]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.weights[0].pow(2).sum()


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 12, batch_first=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = self.rnn(batch[0][:, None])[0][:, 0]
        return super().training_step([outputs, batch[1]], batch_idx)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Hooked(Net):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5


class Renames(Net):
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"train/{name}", *args, **kwargs)


class Starts(Callback):
    def on_client_start(self, trainer: Any, module: Any, client: int) -> None:
        module.factor = client


NOT_VECTORIZABLE: dict[str, tuple[Callable[[], pl.LightningModule], str, dict[str, Any]]] = {
    "branch": (Branches, "if loss > 1.3:  # the offending line", {}),
    "item": (Reads, re.escape("self.seen = loss.item()  # the offending line"), {}),
    "attribute": (Remembers, "changes attributes", {}),
    "in-place attribute": (Adds, "self.total \\+= loss.detach\\(\\)  # the offending line", {}),
    "python random": (Gambles, "Python's or numpy's random numbers", {}),
    "autograd function": (Custom, "return Double.apply", {}),
    "second reference": (TwiceReferenced, "second reference", {}),
    "lbfgs": (lambda: Net(lambda p: LBFGS(p, lr=0.1, max_iter=2)), "LBFGS", {}),
    "manual": (Manual, "[Mm]anual", {}),
    "module hook": (Hooked, "on_before_optimizer_step", {}),
    "own log": (Renames, "overrides log", {}),
    "client start": (Net, "when a client starts", {"callbacks": [Starts()]}),
}


@pytest.mark.parametrize("case", NOT_VECTORIZABLE)
@pytest.mark.parametrize("cache", ["auto", False])
def test_what_cannot_be_vectorized_is_explained_and_runs_all_the_same(case: str, cache: Any) -> None:
    make, reason, options = NOT_VECTORIZABLE[case]
    vectorized = Run("vectorized", make, cache_dataset=cache, **options)
    sequential = Run("sequential", make, cache_dataset=cache, **options)
    assert len(vectorized.warnings) == 1
    assert re.search(reason, vectorized.warnings[0]), vectorized.warnings[0]
    assert vectorized.kind == "sequential"
    torch.testing.assert_close(vectorized.state, sequential.state, rtol=0, atol=0)
    assert vectorized.trainer.callback_metrics.keys() == sequential.trainer.callback_metrics.keys()


def test_recurrent_layers_train_to_the_same_whatever_this_release_of_torch_can_stack() -> None:
    vectorized, sequential = Run("vectorized", Recurrent), Run("sequential", Recurrent)
    assert_alike(vectorized, sequential, rtol=1e-7)
    copy.deepcopy(vectorized.module)  # nothing of what was stacked stays in the layer's lists


# ---- waves


def test_padding_is_the_room_without_work() -> None:
    # Four clients of 1, 2, 3 and 6 batches: in waves of two, 6 + 3 and 2 + 1 batches have room for 12 + 4.
    partition = Partition.from_lists([range(8), range(8, 24), range(24, 48), range(48, 96)])
    options: dict[str, Any] = {"partition": partition, "clients_per_round": 4, "clients_per_wave": 2, "rounds": 2}
    vectorized, sequential = both(Net, **options)
    assert_alike(vectorized, sequential)
    assert vectorized.strategy.last_round is not None
    assert sequential.strategy.last_round is not None
    assert vectorized.strategy.last_round.padding == pytest.approx(1 - 12 / 16)
    assert vectorized.trainer.callback_metrics["round/padding"] == pytest.approx(1 - 12 / 16)
    assert sequential.strategy.last_round.padding == 0.0


def test_clients_that_turn_out_to_be_sequential_leave_no_room_without_work() -> None:
    partition = Partition.from_lists([range(8), range(8, 24), range(24, 48), range(48, 96)])
    run = Run("vectorized", Branches, partition=partition, clients_per_round=4, rounds=1)
    assert run.kind == "sequential"
    assert run.strategy._federation is not None
    assert run.strategy._federation.fit.executor.slots == 1 + 2 + 3 + 6


class Remember(Callback):
    """Each client's model and update as callbacks see them."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[dict[str, Tensor], float]] = {}

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: Any) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.seen[trainer.global_step, update.client] = state, update.norm


def test_callbacks_see_every_clients_model() -> None:
    mine, theirs = Remember(), Remember()
    assert_alike(Run("vectorized", Net, callbacks=[mine]), Run("sequential", Net, callbacks=[theirs]))
    assert mine.seen.keys() == theirs.seen.keys()
    for key, (state, norm) in mine.seen.items():
        torch.testing.assert_close(state, theirs.seen[key][0], rtol=1e-9, atol=1e-10)
        assert norm == pytest.approx(theirs.seen[key][1], rel=1e-6)


class Poisoned(Net):
    """One client's data has no finite loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.where((batch[0] > 1e6).any(), float("nan"), 1.0)


def test_a_bad_client_spoils_neither_the_model_nor_its_neighbours() -> None:
    tensors = reference.dataset(dtype=torch.float64).tensors
    inputs = tensors[0].clone()
    partition = Partition.from_lists([range(i * 20, i * 20 + 15 + i) for i in range(5)])
    inputs[40] = 1e7
    data = TensorDataset(inputs, tensors[1])
    options = {"data": data, "partition": partition, "client_optimizer": "keep"}
    vectorized, sequential = both(lambda: Poisoned(OPTIMIZERS["adam"]), **options)
    assert vectorized.strategy.last_round is not None
    assert vectorized.strategy.last_round.rejected == (2,)
    assert_alike(vectorized, sequential, rtol=1e-7)


class OutOfMemory(Net):
    """Has room for so many clients only."""

    room = 2
    error: Exception = torch.OutOfMemoryError("CUDA out of memory, or so it seems")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        physical = batch[0]
        if torch._C._functorch.is_batchedtensor(physical):
            physical = torch._C._functorch.get_unwrapped(physical)
            if len(physical) > self.room:
                raise self.error
        return super().training_step(batch, batch_idx)


class OutOfMemoryInLibrary(OutOfMemory):
    """Not torch's own allocator is the first to notice."""

    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("cache", ["auto", False])
@pytest.mark.parametrize("kind", [OutOfMemory, OutOfMemoryInLibrary])
def test_waves_are_halved_when_memory_runs_out(kind: type[OutOfMemory], cache: Any) -> None:
    vectorized, sequential = both(lambda: kind(dropout=0.2), cache_dataset=cache)
    assert_alike(vectorized, sequential, rtol=1e-7)
    federation = vectorized.strategy._federation
    assert federation is not None
    assert federation.fit.executor._vectorized._width == 2


def test_the_width_of_waves_does_not_change_what_clients_draw() -> None:
    runs = [Run("vectorized", lambda: Noisy(dropout=0.2), clients_per_wave=width) for width in (2, 3, 5)]
    for run in runs[1:]:
        torch.testing.assert_close(run.state, runs[0].state, rtol=1e-9, atol=1e-11)


# ---- interruption and choice


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_an_interrupted_run_goes_on_to_the_same_bits(client_optimizer: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {"client_optimizer": client_optimizer, "local_steps": 3}
    make = lambda: Net(OPTIMIZERS["adam"], dropout=0.2)  # noqa: E731
    whole = Run("vectorized", make, rounds=6, **options)
    half = Run("vectorized", make, rounds=3, **options)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Run("vectorized", make, rounds=6, ckpt_path=str(tmp_path / "half.ckpt"), **options)
    torch.testing.assert_close(resumed.state, whole.state, rtol=0, atol=0)


def test_executors_may_change_on_resume(tmp_path: Any) -> None:
    make = lambda: Net(OPTIMIZERS["adam"], dropout=0.2)  # noqa: E731
    whole = Run("sequential", make, rounds=6, client_optimizer="keep")
    for first, second in (("sequential", "vectorized"), ("vectorized", "sequential")):
        half = Run(first, make, rounds=3, client_optimizer="keep")
        half.trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed = Run(second, make, rounds=6, ckpt_path=str(tmp_path / "half.ckpt"), client_optimizer="keep")
        torch.testing.assert_close(resumed.state, whole.state, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cache", ["auto", False])
def test_auto_decides_after_the_first_round_and_remembers(
    cache: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options: dict[str, Any] = {"partition": reference.equal_clients(7, 29), "cache_dataset": cache}
    auto = Run("auto", lambda: Net(dropout=0.2), rounds=4, **options)
    said = [record.message for record in caplog.records if record.message.startswith("Executor:")]
    assert len(said) == 1
    assert auto.kind == "vectorized"
    assert "'vectorized'" in said[0]
    assert_alike(auto, Run("sequential", lambda: Net(dropout=0.2), rounds=4, **options), rtol=1e-7)
    auto.trainer.save_checkpoint(tmp_path / "auto.ckpt")
    saved = torch.load(tmp_path / "auto.ckpt", weights_only=True)["federated"]["executor"]
    assert saved == auto.kind
    caplog.clear()
    resumed = Run("auto", lambda: Net(dropout=0.2), rounds=5, ckpt_path=str(tmp_path / "auto.ckpt"), **options)
    assert resumed.kind == auto.kind
    assert not [record for record in caplog.records if record.message.startswith("Executor:")]


def test_the_dry_run_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round under "auto" is a sequential one to the bit, whatever was tried before."""
    make = lambda: Metrics(OPTIMIZERS["adam"], dropout=0.3, batch_norm=True)  # noqa: E731
    partition = Partition.from_lists([range(i * 20, i * 20 + 5 + 2 * i) for i in range(7)])
    options: dict[str, Any] = {"rounds": 1, "partition": partition, "client_optimizer": "keep"}
    sequential = Run("sequential", make, **options)
    original = StepModel.vectorized

    def vectorized(self: StepModel, clients: float, *, captured: bool = True) -> float:
        """Of use if steps can be captured, so that this is tried."""
        return original(self, clients) * 0.0 + self.sequential() * (0.5 if captured else 2.0)

    monkeypatch.setattr(StepModel, "vectorized", vectorized)
    auto = Run("auto", make, **options)
    assert auto.kind == "sequential", "Metrics call a metric, which cannot be captured"
    torch.testing.assert_close(auto.state, sequential.state, rtol=0, atol=0)
    for name in sequential.trainer.callback_metrics.keys() - {"round/seconds", "round/idle"}:
        assert auto.trainer.callback_metrics[name] == sequential.trainer.callback_metrics[name], name


def test_auto_says_why_it_trains_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    auto = Run("auto", Branches)
    assert auto.kind == "sequential"
    assert not auto.warnings
    assert any("if loss > 1.3" in record.message for record in caplog.records)


def test_feeding_batch_norm_alone_trains_nobody() -> None:
    options: dict[str, Any] = {
        "partition": Partition.from_lists([range(i * 20, i * 20 + 5 + 2 * i) for i in range(7)]),
        "rounds": 4,
    }
    runs = []
    for executor in ("vectorized", "sequential"):
        swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
        runs.append(Run(executor, lambda: Net(batch_norm=True), callbacks=[swa], **options))
    torch.testing.assert_close(runs[0].state, runs[1].state, rtol=1e-7, atol=1e-9)


class Late(Net):
    """Keeps something from one client to the next, but only from the third round on."""

    seen = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= 2:
            self.seen += 1
        return loss * (1.0 + 0.1 * self.seen)


def test_what_shows_later_is_noticed_later() -> None:
    vectorized, sequential = Run("vectorized", Late, rounds=5), Run("sequential", Late, rounds=5)
    assert len(vectorized.warnings) == 1
    assert "changes attributes" in vectorized.warnings[0]
    assert_alike(vectorized, sequential)
