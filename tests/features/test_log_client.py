"""What clients log is collected and reduced once a round, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from lightning_fedscale.core.executors import ClientLog
from lightning_fedscale.core.lightning import client_log
from lightning_fedscale.core.lightning.log_series import read_numbers
from tests.features import local_loops, reference_loop
from tests.laws import reference
from tests.strategies import sequential

Metrics = dict[str, float]


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log_batch(batch, batch_idx)
        return self.scale * batch[0].mean()

    def log_batch(self, batch: list[Tensor], batch_idx: int) -> None:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Varied(Base):
    """Logs values of every kind, and looks at what has become of them after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.running = torch.zeros(())
        self.mean, self.total = MeanMetric(), SumMetric()
        self.seen: list[Metrics] = []

    def log_batch(self, batch: list[Tensor], batch_idx: int) -> None:
        value = batch[0].mean()
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.log("half", value.bfloat16(), **both)
        self.log("double", value.double(), **both)
        self.log("count", (batch[1] == 0).sum(), reduce_fx="sum", **both)
        self.log("bool", True, **both)
        self.log("int", 7, on_epoch=True, batch_size=batch_idx + 1)
        self.log("numpy", np.float32(value.item()), **both)  # type: ignore[arg-type]
        self.log("one", value.reshape(1), prog_bar=True, **both)
        self.log("nan", value * math.nan if batch_idx == 2 else value, on_epoch=True)
        self.log("nan_min", value * math.nan if batch_idx == 2 else value, reduce_fx="min", **both)
        self.log("max", value, reduce_fx=torch.max, **both)
        self.log("graph", value * self.scale, enable_graph=True, **both)
        self.log("moves", self.scale, **both)
        self.running += 1
        self.log("running", self.running, **both)
        self.log("step", value, on_step=True, on_epoch=False)
        self.log("hidden", value, logger=False, **both)
        if batch_idx % 2:
            self.log("sometimes", value, **both)
        self.log("changes", batch_idx / 3 if batch_idx == 3 else value, **both)
        self.log_dict({"one/more": value, "two/more": 2 * value}, on_step=False, on_epoch=True)
        if self.dtype == torch.float32:  # else Lightning widens metrics after their first value
            self.mean(batch[0].mean(1))
            self.log("metric", self.mean, **both)
            self.total.update(value)
            self.log_dict({"total": self.total}, on_step=False, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("end", batch[0].max(), on_step=True, on_epoch=True)
        trainer = self.trainer
        for found in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
            self.seen.append({k: float(v) for k, v in found.items() if not k.startswith("round/")})


class Nested(Varied):
    """Logs from one hook, from another inside it, and from the first again."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("after", loss, on_step=True, on_epoch=True)

    def on_after_backward(self) -> None:
        self.log("inside", self.scale.grad, on_step=True, on_epoch=True)  # type: ignore[arg-type]


class Epochs(pl.Callback):
    def __init__(self) -> None:
        self.found: list[Metrics] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("round/")})

    on_train_end = on_train_epoch_start


def assert_equal(left: list[Metrics], right: list[Metrics]) -> None:
    """To the last bit, also where NaN is expected."""
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys()
        assert {k: (i, a[k], b[k]) for k in a if not (a[k] == b[k] or (math.isnan(a[k]) and math.isnan(b[k])))} == {}


@pytest.mark.parametrize("waiting", [client_log._MOST_WAITING, 5])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("kind", [Varied, Nested])
def test_same_bits_as_the_plain_trainer(
    kind: type[Varied], waiting: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client with its own optimizer is plain training, and logs what that logs, at every batch and every epoch."""
    monkeypatch.setattr(client_log, "_MOST_WAITING", waiting)
    found, seen = [], []
    for strategy in ("auto", sequential(num_clients=1, client_optimizer="keep")):
        module, epochs = kind(), Epochs()
        trainer = reference.quiet_trainer(strategy=strategy, max_epochs=3, callbacks=[epochs], precision=precision)
        trainer.fit(module, reference.loader(reference_loop.data(), shuffle=False))
        found.append(epochs.found)
        seen.append(module.seen)
    assert len(found[0][-1]) > 30
    assert math.isnan(found[0][-1]["nan"])
    assert_equal(*found)
    assert_equal(*seen)


class Means(Base):
    def log_batch(self, batch: list[Tensor], batch_idx: int) -> None:
        mean = batch[0].mean()
        self.log("step", mean)
        self.log("both", 2 * mean, on_step=True, on_epoch=True)
        self.log("python", 3.0 * mean.item(), on_step=True)
        self.log("epoch", mean, on_step=False, on_epoch=True)
        self.log("hidden", mean, on_step=True, logger=False)


def test_only_first_calls_go_through_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    through = _ResultCollection.log

    def counted(self: _ResultCollection, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        calls.append(name)
        through(self, fx, name, *args, **kwargs)

    monkeypatch.setattr(_ResultCollection, "log", counted)
    reference_loop.fit(Means(), max_epochs=3)
    assert sorted(calls) == ["both", "epoch", "hidden", "python", "step"]


# ---- complaints


class Bad(Base):
    """Logs well until batch ``at``."""

    def __init__(self, call: Callable[[Any], object], at: int) -> None:
        super().__init__()
        self.call, self.at = call, at
        self.metric = MeanMetric()

    def log_batch(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == self.at:
            self.call(self)
        else:
            self.log("x", batch[0].mean())


class BadHook(Means):
    """Logs where that is not allowed, from the second local batch on."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "step" in self.trainer.logged_metrics:
            self.log("x", 1.0)
        return batch


BAD_CALLS: dict[str, Callable[[Any], object]] = {
    "nested": lambda m: m.log("x", {"a": {"b": 1.0}}),
    "text": lambda m: m.log("x", "text"),
    "two elements": lambda m: m.log("x", torch.ones(2)),
    "nowhere": lambda m: m.log("x", 1.0, on_step=False, on_epoch=False),
    "median": lambda m: m.log("x", 1.0, reduce_fx="median"),
    "lambda": lambda m: m.log("x", 1.0, reduce_fx=lambda values: values[0]),
    "other options": lambda m: (m.log("x", 1.0), m.log("x", 1.0, prog_bar=True)),
    "dataloader index": lambda m: m.log("x/dataloader_idx_0", 1.0),
    "foreign metric": lambda m: m.log("x", MeanMetric()),
}


def complaint(module: pl.LightningModule, strategy: object) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        reference.quiet_trainer(strategy=strategy, max_epochs=2).fit(
            module, reference.loader(reference_loop.data(), shuffle=False)
        )
    assert any(entry.name in ("<lambda>", "on_after_batch_transfer") for entry in caught.traceback)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_complaints_are_lightnings(name: str, at: int) -> None:
    plain = complaint(Bad(BAD_CALLS[name], at), "auto")
    ours = complaint(Bad(BAD_CALLS[name], at), sequential(num_clients=1, client_optimizer="keep"))
    hide = str.maketrans("", "", "0123456789abcdef")  # addresses in what is printed of a function
    assert (ours[0], ours[1].translate(hide)) == (plain[0], plain[1].translate(hide))


def test_complaint_about_a_hook() -> None:
    assert complaint(BadHook(), sequential(num_clients=2)) == complaint(BadHook(), "auto")


# ---- around the module


class Prefixed(Means):
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"train/{name}", *args, **kwargs)


def test_a_log_of_the_users_own() -> None:
    trainer, _ = reference_loop.fit(Prefixed(), max_epochs=2)
    plain, _ = reference_loop.fit(Means(), max_epochs=2)
    for name in ("step", "both", "both_epoch", "epoch", "python"):
        assert trainer.callback_metrics[f"train/{name}"] == plain.callback_metrics[name]


class Copies(pl.Callback):
    def __init__(self) -> None:
        self.copies: list[pl.LightningModule] = []

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: object) -> None:
        module._trainer, trainer_of_fit = None, module._trainer
        self.copies += [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        module._trainer = trainer_of_fit


def test_copies_made_inside_a_client_have_their_own_log() -> None:
    callback = Copies()
    _, module = reference_loop.fit(Means(), callbacks=[callback], max_epochs=1)
    assert "log" not in vars(module)
    assert len(callback.copies) == 8
    for own in callback.copies:
        assert own.log.__func__ is pl.LightningModule.log  # type: ignore[attr-defined]
        assert own.log.__self__ is own  # type: ignore[attr-defined]


class Fails(Means):
    def log_batch(self, batch: list[Tensor], batch_idx: int) -> None:
        super().log_batch(batch, batch_idx)
        if self.trainer.global_step == 1 and batch_idx == 2:
            raise RuntimeError("in the middle of a round")


def test_after_a_client_failed() -> None:
    module = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        reference_loop.fit(module, max_epochs=3)
    assert "log" not in vars(module)
    assert "metrics" not in vars(module.trainer.fit_loop.epoch_loop._results)


# ---- client_log_every_n


class Points(Logger):
    """Remembers what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, int, float]] = []

    @property
    def name(self) -> str:
        return "points"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.points += [(name, int(step or 0), float(value)) for name, value in metrics.items()]

    def of_clients(self) -> list[tuple[str, int, float]]:
        return sorted(point for point in self.points if point[0].startswith("client/"))


def expected_points(rounds: int, every: int) -> list[tuple[str, int, float]]:
    clients, inputs = reference_loop.partition(), reference_loop.data().tensors[0].double()
    batches = reference_loop.seen(range(rounds), clients, reference_loop.passes(clients), 3)
    assert (
        len(
            {
                len(reference_loop.seen(range(r, r + 1), clients, reference_loop.passes(clients), 3))
                for r in range(rounds)
            }
        )
        > 1
    )
    due = [(i + 1, float(inputs[batch].mean())) for i, batch in enumerate(batches) if (i + 1) % every == 0]
    factors = {"client/step": 1, "client/both": 2, "client/python": 3}
    return sorted((name, step, factor * mean) for name, factor in factors.items() for step, mean in due)


def fit_points(every: int | None, epochs: int, **options: Any) -> Points:
    points = Points()
    reference_loop.fit(
        Means(),
        strategy={"client_log_every_n": every, "clients_per_round": 3},
        logger=points,
        max_epochs=epochs,
        **options,
    )
    return points


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("waiting", [client_log._MOST_WAITING, 5])
def test_points_over_local_batches(every: int, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_log, "_MOST_WAITING", waiting)
    got, right = fit_points(every, 5).of_clients(), expected_points(5, every)
    assert [(name, step) for name, step, _ in got] == [(name, step) for name, step, _ in right]
    assert [value for *_, value in got] == pytest.approx([value for *_, value in right], rel=1e-5)


class Skips(Means):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


def test_batches_that_were_not_trained_do_not_count() -> None:
    points = Points()
    reference_loop.fit(Skips(), strategy={"client_log_every_n": 1, "clients_per_round": 3}, logger=points, max_epochs=4)
    steps = [step for name, step, _ in points.of_clients() if name == "client/step"]
    assert steps == list(range(1, 1 + 3 * 4))


def test_no_more_waits_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(values: list[Any], device: torch.device) -> Any:
        numbers = read_numbers(values, device)
        lengths.append(len(numbers))
        return numbers

    monkeypatch.setattr(client_log, "read_numbers", counted)
    monkeypatch.setattr(client_log, "_MOST_WAITING", 5)
    fit_points(1, 3)
    # What waits, what is picked of it, and what each of five names has come to before.
    assert max(lengths) <= 5 + 5 + 5 < sum(lengths) / 3
    assert len(lengths) > 3 * 4


def test_off_by_default() -> None:
    assert fit_points(None, 3).of_clients() == []


def test_nothing_else_changes() -> None:
    def others(points: Points) -> list[tuple[str, int, float]]:
        return [p for p in points.points if not p[0].startswith(("client/", "round/seconds", "round/idle"))]

    assert others(fit_points(2, 3)) == others(fit_points(None, 3))


def test_resumed_points_go_on(tmp_path: Any) -> None:
    whole = fit_points(3, 5).of_clients()
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    first = fit_points(3, 2, callbacks=[saver], enable_checkpointing=True)
    rest = fit_points(3, 5, ckpt_path=str(tmp_path / "last.ckpt"))
    assert sorted(first.of_clients() + rest.of_clients()) == whole
    assert rest.of_clients()


# ---- vectorized


def connected(module: pl.LightningModule) -> pl.Trainer:
    """A Trainer that believes it is in the middle of `fit`."""
    trainer = reference.quiet_trainer()
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.training = True
    trainer._logger_connector.on_batch_start([torch.zeros(1)])
    return trainer


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"on_step": True, "on_epoch": True},
    "last": {},
    "sum": {"on_epoch": True, "reduce_fx": "sum"},
    "max": {"on_step": True, "on_epoch": True, "reduce_fx": "max", "prog_bar": True},
}


class Waves:
    """Four clients with 3, 2, 2 and 1 batches log by one `ClientLog`."""

    lengths, sizes = (3, 2, 2, 1), (8, 5, 7, 4)
    starts = (0, 3, 5, 7)
    values = torch.randn(8, generator=torch.Generator().manual_seed(0))

    def __init__(self) -> None:
        self.module = Means()
        self.trainer = connected(self.module)
        self.log, self.points = ClientLog(self.trainer, every_n=2), Points()
        self.trainer.loggers = [self.points]

    def alone(self, client: int) -> None:
        """All batches of a client."""
        for step in range(self.lengths[client]):
            self.log.position = self.starts[client] + step
            self.log.start_batch([torch.zeros(self.sizes[client])])
            self.module._current_fx_name = "training_step"
            for name, options in OPTIONS.items():
                self.module.log(name, self.values[self.log.position], **options)
            self.module._current_fx_name = None

    def vectorized(self, *clients: int) -> None:
        """All batches of these clients, step by step."""
        for step in range(max(self.lengths[c] for c in clients)):
            wave = [c for c in clients if step < self.lengths[c]]
            places, sizes = [self.starts[c] + step for c in wave], [self.sizes[c] for c in wave]
            for name, options in OPTIONS.items():
                self.log.add_stacked(name, self.values[places], sizes, options, positions=places)

    def outcome(self) -> tuple[Metrics, list[tuple[str, int, float]], int]:
        """What the Trainer shows after the round and after the epoch, what the loggers got, what was counted."""
        self.log.points.commit(8)
        self.log.points.send()
        connector = self.trainer._logger_connector
        shown: dict[str, Tensor | float] = {**connector.metrics["callback"], **connector.metrics["pbar"]}
        connector.epoch_end_reached()
        shown |= {f"epoch {name}": value for name, value in connector.metrics["callback"].items()}
        return {k: float(v) for k, v in shown.items()}, self.points.of_clients(), self.log.points.local_batches


@pytest.mark.parametrize(
    "waves", [[(0, 1, 2, 3)], [(3, 1), (2, 0)], [(0, 1, 2), (3,)], [(3,), (0, 2, 1)], [(0, 3, 2), (1,)]]
)
def test_stacked_values_are_those_of_one_after_the_other(waves: list[tuple[int, ...]]) -> None:
    in_a_row, in_waves = Waves(), Waves()
    with in_a_row.log.collecting():
        for client in range(4):
            in_a_row.alone(client)
    with in_waves.log.collecting():
        for wave in waves:
            in_waves.vectorized(*wave) if len(wave) > 1 else in_waves.alone(*wave)
    metrics, points, batches = in_a_row.outcome()
    values = Waves.values
    assert metrics["mean_step"] == metrics["last"] == metrics["max_step"] == float(values[-1])
    weights = torch.tensor(Waves.sizes, dtype=torch.float64).repeat_interleave(torch.tensor(Waves.lengths))
    assert metrics["epoch mean_epoch"] == pytest.approx(float(values.double() @ weights / weights.sum()), rel=1e-6)
    assert metrics["epoch max_epoch"] == float(values.max())
    assert [point[1:] for point in points if point[0] == "client/last"] == [
        (n, float(values[n - 1])) for n in (2, 4, 6, 8)
    ]
    assert batches == 8
    other_metrics, other_points, other_batches = in_waves.outcome()
    assert metrics == pytest.approx(other_metrics, rel=1e-6)
    assert points == other_points
    assert batches == other_batches


def test_stacked_values_are_checked_as_lightning_checks_them() -> None:
    module = Means()
    log = ClientLog(connected(module))
    with (
        pytest.raises(Exception, match=r"on_step=False, on_epoch=False.* is not useful"),
        log.collecting(),
    ):
        log.add_stacked("x", torch.ones(2), [1, 1], {"on_step": False, "on_epoch": False}, positions=[0, 1])


def test_a_metric_object_of_many_batches() -> None:
    module = local_loops.make(Varied)
    trainer = connected(module)
    log = ClientLog(trainer)
    with log.collecting():
        log.add_stacked("mean", torch.tensor([1.0, 2.0]), [3, 1], {"on_epoch": True}, positions=[0, 2])
        module.total.update(torch.arange(4.0))
        log.add_metric("total", module.total, {"on_epoch": True, "on_step": False}, position=3)
        log.add_stacked("mean", torch.tensor([4.0, 5.0]), [1, 1], {"on_epoch": True}, positions=[1, 3])
    trainer._logger_connector.epoch_end_reached()
    found = trainer._logger_connector.metrics["callback"]
    assert float(found["total"]) == 6.0
    assert float(found["mean"]) == pytest.approx((3 * 1 + 1 * 2 + 4 + 5) / 6)
