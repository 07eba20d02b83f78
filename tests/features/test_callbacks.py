"""Lightning's callbacks live on the server: they count rounds and see the global model."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from lightning_fedscale import server
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import flat_view
from tests.clock import Clock, Minutes
from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential


def states_in(folder: Path) -> dict[int, reference_loop.State]:
    """Every checkpoint's model by the round it was written after."""
    files = [torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")]
    return {file["global_step"]: file["state_dict"] for file in files}


def validation_losses(rounds: int) -> list[float]:
    return [reference_loop.validation_loss(state) for state in reference_loop.models(rounds)]


def mean_of(states: list[reference_loop.State]) -> reference_loop.State:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "memory"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass

    def of(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]


# ---- checkpoints


@pytest.mark.parametrize(
    ("rounds_per_epoch", "options", "when"),
    [
        (1, {"every_n_train_steps": 2}, {2, 4, 6}),
        (4, {"every_n_train_steps": 3}, {3, 6}),
        (1, {"every_n_epochs": 3, "save_on_train_epoch_end": True}, {3, 6}),
        (2, {"every_n_epochs": 2, "save_on_train_epoch_end": False}, {4}),
        (3, {}, {3, 6}),
    ],
)
def test_model_checkpoint_saves_the_global_model_after_these_rounds(
    tmp_path: Path, rounds_per_epoch: int, options: dict[str, Any], when: set[int]
) -> None:
    save = ModelCheckpoint(tmp_path, save_top_k=-1, **options)
    reference_loop.fit(
        strategy={"rounds_per_epoch": rounds_per_epoch},
        validate=True,
        enable_checkpointing=True,
        callbacks=[save],
        max_steps=6,
    )
    saved, expected = states_in(tmp_path), reference_loop.models(6)
    assert saved.keys() == when
    assert all(reference_loop.same(state, expected[round]) for round, state in saved.items())


def test_model_checkpoint_by_time(tmp_path: Path, clock: Clock) -> None:
    save = ModelCheckpoint(tmp_path, save_top_k=-1, train_time_interval=timedelta(minutes=1.5))
    reference_loop.fit(enable_checkpointing=True, callbacks=[save, Minutes(clock)], max_epochs=6)
    saved, expected = states_in(tmp_path), reference_loop.models(6)
    assert saved.keys() == {2, 4, 6}
    assert all(reference_loop.same(state, expected[round]) for round, state in saved.items())


def test_model_checkpoint_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=2, mode="max")
    last = ModelCheckpoint(tmp_path / "last", save_last=True)
    reference_loop.fit(validate=True, enable_checkpointing=True, callbacks=[best, last], max_epochs=5)
    losses, models = validation_losses(5), reference_loop.models(5)
    worst_first = sorted(range(1, 6), key=lambda round: -losses[round])
    kept = states_in(tmp_path / "best")
    assert kept.keys() == set(worst_first[:2]) != {4, 5}
    assert all(reference_loop.same(state, models[round]) for round, state in kept.items())
    assert best.best_model_score == pytest.approx(losses[worst_first[0]], rel=1e-5)
    final = torch.load(tmp_path / "last" / "last.ckpt", weights_only=True)
    assert reference_loop.same(final["state_dict"], models[5])


def test_model_checkpoint_monitors_the_rounds_own_loss_within_an_epoch(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, monitor="round/loss", every_n_train_steps=1, save_top_k=1)
    reference_loop.fit(strategy={"rounds_per_epoch": 6}, enable_checkpointing=True, callbacks=[save], max_epochs=1)
    losses: list[float] = []
    reference_loop.models(6, losses=losses)
    best = min(range(6), key=losses.__getitem__)
    assert states_in(tmp_path).keys() == {best + 1}
    assert save.best_model_score == pytest.approx(losses[best], rel=1e-6)


class Breaks(reference_loop.Validated):
    """Raises within its 12th local batch, which is in a client of the second round."""

    count = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.count += 1
        if self.count == 12:
            raise KeyError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("by", ["OnExceptionCheckpoint", "ModelCheckpoint"])
def test_a_checkpoint_on_exception_holds_the_last_global_model(tmp_path: Path, by: str) -> None:
    batches = reference_loop.passes(reference_loop.partition())
    assert sum(len(batches(client, 0)) for client in range(4)) == 7

    class Keep(OnExceptionCheckpoint):
        def teardown(self, *args: Any, **kwargs: Any) -> None:
            """Lightning's own removes the file again when the Trainer closes in good order."""

    callback: pl.Callback = Keep(tmp_path)
    if by == "ModelCheckpoint":
        callback = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100)
    torch.manual_seed(0)
    with pytest.raises(KeyError, match="on purpose"):
        reference_loop.fit(Breaks(), enable_checkpointing=True, callbacks=[callback], max_epochs=3)
    found = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert [file["global_step"] for file in found] == [1]
    assert reference_loop.same(found[0]["state_dict"], reference_loop.models(1)[1])


# ---- stopping


def test_early_stopping_on_a_validation_loss() -> None:
    losses = validation_losses(8)
    threshold = (losses[4] + losses[5]) / 2
    expected = next(round for round in range(1, 9) if losses[round] < threshold)
    assert 1 < expected < 8
    stop = EarlyStopping("val_loss", stopping_threshold=threshold, patience=100)
    trainer, module = reference_loop.fit(validate=True, callbacks=[stop], max_epochs=8)
    assert trainer.global_step == stop.stopped_epoch + 1 == expected
    assert reference_loop.same(module.state_dict(), reference_loop.models(expected)[-1])


def test_early_stopping_loses_patience_with_the_rounds_own_loss() -> None:
    stop = EarlyStopping("round/loss", mode="max", patience=2, check_on_train_epoch_end=True)
    losses: list[float] = []
    reference_loop.models(8, losses=losses)
    best = max(range(8), key=lambda i: (losses[i], -i))
    assert best == 0
    trainer, _ = reference_loop.fit(callbacks=[stop], max_epochs=8)
    assert trainer.global_step == 3
    assert stop.best_score == pytest.approx(losses[0], rel=1e-6)


def test_timer_stops_between_rounds(clock: Clock) -> None:
    timer = Timer(timedelta(minutes=3.5), interval="step")
    trainer, module = reference_loop.fit(
        strategy={"rounds_per_epoch": 3}, callbacks=[Minutes(clock), timer], max_epochs=9
    )
    assert trainer.global_step == 4
    assert timer.time_elapsed("train") == 240
    assert reference_loop.same(module.state_dict(), reference_loop.models(4)[-1])


# ---- averages of the global model


class SeesValidation(reference_loop.Validated):
    """Keeps the weights that it is validated with."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[reference_loop.State] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(reference_loop.state_of(self))


def test_weight_averaging_averages_global_models() -> None:
    torch.manual_seed(0)
    _, module = reference_loop.fit(SeesValidation(), validate=True, callbacks=[WeightAveraging()], max_epochs=5)
    models = reference_loop.models(5)
    assert reference.difference(module.state_dict(), mean_of(models[1:])) < 1e-6
    for round, state in enumerate(module.validated, 1):  # type: ignore[arg-type]
        assert reference.difference(state, mean_of(models[1 : round + 1])) < 1e-6


def test_ema_averages_global_models() -> None:
    torch.manual_seed(0)
    ema = EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=2)
    _, module = reference_loop.fit(SeesValidation(), validate=True, callbacks=[ema], max_epochs=8)
    models = reference_loop.models(8)
    # Updates happen at step indices 2, 4, 6, that is with the models after rounds 3, 5, 7; the first is a copy.
    average = models[3]
    for round in (5, 7):
        average = {name: 0.8 * average[name] + 0.2 * models[round][name] for name in average}
    assert reference.difference(module.state_dict(), average) < 1e-6
    assert len(module.validated) == 8  # type: ignore[arg-type]


class WithNorm(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0, batch_norm=True)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=3, annealing_strategy="linear")


def test_swa_averages_global_models() -> None:
    _, module = reference_loop.fit(callbacks=[swa()], max_epochs=6)
    # Lightning averages the models at the start of epochs 2 to 5.
    expected = mean_of(reference_loop.models(6)[2:6])
    assert reference.difference(module.state_dict(), expected) < 1e-6


@pytest.mark.parametrize("rounds_per_epoch", [1, 2])
def test_swa_feeds_batch_norm_for_an_epoch_in_which_nothing_trains(rounds_per_epoch: int) -> None:
    torch.manual_seed(0)
    trainer, module = reference_loop.fit(
        WithNorm(), strategy={"rounds_per_epoch": rounds_per_epoch}, callbacks=[swa()], max_epochs=4
    )
    assert trainer.global_step == 4 * rounds_per_epoch

    clients, data = reference_loop.partition(), reference_loop.data()
    torch.manual_seed(0)
    plain = WithNorm()
    start = reference_loop.state_of(plain)
    run = reference_loop.fed_avg(plain, data, clients, reference_loop.passes(clients))
    models = [start, *itertools.islice(run, 4 * rounds_per_epoch)]
    got, trained = module.state_dict(), [name for name, _ in plain.named_parameters()]
    average = {name: (models[2 * rounds_per_epoch][name] + models[3 * rounds_per_epoch][name]) / 2 for name in trained}
    assert max(float((got[name] - average[name]).abs().max()) for name in trained) < 1e-6

    # In the last epoch every client takes the mean of its batches' statistics, on top of the server's.
    running_mean, running_var, tracked = torch.zeros(16), torch.ones(16), 0
    for number in range(4 * rounds_per_epoch, 5 * rounds_per_epoch):
        means, variances, counts = torch.zeros(16), torch.zeros(16), 0.0
        for client in range(4):
            mean, variance, count = running_mean.clone(), running_var.clone(), tracked
            for positions in reference_loop.passes(clients)(client, number):
                inputs = nn.functional.linear(
                    data.tensors[0][positions], average["net.0.weight"], average["net.0.bias"]
                )
                count += 1
                mean += (inputs.mean(0) - mean) / count
                variance += (inputs.var(0) - variance) / count
            share = len(clients.client(client)) / 45
            means, variances, counts = means + share * mean, variances + share * variance, counts + share * count
        running_mean, running_var, tracked = means, variances, round(counts)
    assert torch.allclose(got["net.1.running_mean"], running_mean, atol=1e-5)
    assert torch.allclose(got["net.1.running_var"], running_var, atol=1e-5)
    assert int(got["net.1.num_batches_tracked"]) == tracked
    assert module.net[1].momentum == 0.1  # type: ignore[index, union-attr]


# ---- learning rates


class Stepped(reference_loop.Validated):
    """Its learning rate halves every second round."""

    lr = 0.1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 2, 0.5)}


class Plain(reference_loop.Validated):
    """The usual model; its learning rate has a name."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor_logs_the_rounds_rate(interval: str) -> None:
    torch.manual_seed(0)
    logger = Memory()
    monitor = LearningRateMonitor(logging_interval=interval)  # type: ignore[arg-type]
    _, module = reference_loop.fit(Stepped(), logger=logger, callbacks=[monitor], max_epochs=5)
    assert logger.of("lr-SGD") == [(i, rate) for i, rate in enumerate([0.1, 0.1, 0.05, 0.05, 0.025])]
    expected = reference_loop.models(5, lr=lambda round: 0.1 * 0.5 ** (round // 2))[-1]
    assert reference_loop.same(module.state_dict(), expected)


def search(num_training: int, lowest: float, highest: float) -> tuple[list[float], list[float]]:
    """Learning rates and smoothed losses of Lightning's range test, by hand."""
    rates = [lowest] + [lowest * (highest / lowest) ** ((i + 1) / num_training) for i in range(1, num_training)]
    losses: list[float] = []
    reference_loop.models(num_training, lr=rates.__getitem__, losses=losses)
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss
        smoothed.append(average / (1 - 0.98 ** (i + 2)))
    return rates, smoothed


OPTIONS: dict[str, Any] = {
    "client_optimizer": "keep",
    "local_steps": 2,
    "server_optimizer": server.from_torch(torch.optim.SGD, lr=0.9, momentum=0.5),
    "clients_per_round": 3,
}


def test_lr_find_searches_over_rounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    trainer = reference.quiet_trainer(
        strategy=sequential(partitioner=reference_loop.partition()), max_epochs=20, default_root_dir=tmp_path
    )
    found = Tuner(trainer).lr_find(
        module, reference.loader(reference_loop.data()), min_lr=1e-4, max_lr=1.0, num_training=12, update_attr=False
    )
    rates, losses = search(12, 1e-4, 1.0)
    assert found is not None
    assert found.results["lr"] == pytest.approx(rates)
    assert found.results["loss"] == pytest.approx(losses, rel=1e-5)
    assert reference_loop.same(module.state_dict(), reference_loop.models(0)[0])
    assert list(tmp_path.iterdir()) == []


def untouched(**options: Any) -> reference_loop.State:
    torch.manual_seed(0)
    _, module = reference_loop.fit(Plain(), strategy=OPTIONS, max_epochs=4, **options)
    return reference_loop.state_of(module)


def test_after_lr_find_a_fit_is_as_if_nothing_had_been(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, loader = Plain(), reference.loader(reference_loop.data())
    strategy = sequential(partitioner=reference_loop.partition(), **OPTIONS)
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=4, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, loader, num_training=3, update_attr=False)
    trainer.fit(module, loader)
    assert trainer.global_step == 4
    assert reference_loop.same(module.state_dict(), untouched())


def test_learning_rate_finder_inside_a_fit_leaves_server_and_clients_as_they_were(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    assert reference_loop.same(untouched(callbacks=[finder], default_root_dir=tmp_path), untouched())


def test_learning_rate_finder_sets_the_rate_that_clients_use(tmp_path: Path) -> None:
    finder = LearningRateFinder(min_lr=1e-3, max_lr=1.0, num_training_steps=20, update_attr=True)
    torch.manual_seed(0)
    _, module = reference_loop.fit(Plain(), callbacks=[finder], max_epochs=20, default_root_dir=tmp_path)
    rate = finder.optimal_lr.suggestion()  # type: ignore[union-attr]
    assert module.lr == rate != 0.1
    assert reference_loop.same(module.state_dict(), reference_loop.models(20, lr=lambda round: rate)[-1])


# ---- refused


def test_batch_size_finder_is_refused_by_lightning() -> None:
    with pytest.raises(MisconfigurationException, match="Batch size finder is not supported"):
        reference_loop.fit(callbacks=[BatchSizeFinder()], max_epochs=1)


def test_throughput_monitor_is_refused_with_what_to_read_instead() -> None:
    monitor = ThroughputMonitor(batch_size_fn=len)
    with pytest.raises(ValueError, match=r"ThroughputMonitor.*Remove it.*round/seconds"):
        reference_loop.fit(callbacks=[monitor], logger=Memory(), max_epochs=1)


# ---- others


def test_device_stats_monitor_logs_twice_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = itertools.count()
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", True)
    monkeypatch.setattr(CPUAccelerator, "get_device_stats", lambda self, device: {"load": next(counter)})
    logger = Memory()
    reference_loop.fit(callbacks=[DeviceStatsMonitor()], logger=logger, max_epochs=3)
    prefix = "DeviceStatsMonitor.on_train_batch_"
    assert [value for _, value in logger.of(f"{prefix}start/load")] == [0, 2, 4]
    assert [value for _, value in logger.of(f"{prefix}end/load")] == [1, 3, 5]


class TwoParts(reference.Classifier):
    """The usual model in two parts, of which at first only the second trains."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.backbone, self.head = self.net[0], self.net[3]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Unfrozen(TwoParts):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": self.head.parameters()},
            {"params": self.backbone.parameters(), "lr": 0.02},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Frozen(TwoParts):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)


def test_backbone_finetuning_adds_a_group_that_reaches_the_clients() -> None:
    torch.manual_seed(0)
    module = TwoParts()
    start = reference_loop.state_of(module)
    unfreeze = BackboneFinetuning(
        unfreeze_backbone_at_epoch=2,
        backbone_initial_lr=0.02,
        initial_denom_lr=1,
        lambda_func=lambda epoch: 1.0,
        should_align=False,
    )
    snapshots = reference_loop.Snapshots()
    reference_loop.fit(module, callbacks=[unfreeze, snapshots], max_epochs=4)

    data, clients = reference_loop.data(), reference_loop.partition()
    expected: list[reference_loop.State] = []
    first = 0
    for kind in (Frozen, Unfrozen):
        plain = kind()
        plain.load_state_dict(expected[-1] if expected else start)
        run = reference_loop.fed_avg(plain, data, clients, reference_loop.passes(clients), first=first)
        expected += itertools.islice(run, 2)
        first += 2
    assert all(map(reference_loop.same, snapshots.after_round, expected))
    assert torch.equal(snapshots.after_round[1]["backbone.weight"], start["backbone.weight"])
    assert not torch.equal(snapshots.after_round[2]["backbone.weight"], start["backbone.weight"])


def test_gradient_accumulation_scheduler_counts_batches_of_a_client() -> None:
    schedule = GradientAccumulationScheduler({0: 1, 2: 3})
    trainer, module = reference_loop.fit(callbacks=[schedule], max_epochs=4)
    expected = reference_loop.models(4, accumulate=lambda round: 1 if round < 2 else 3)
    assert trainer.global_step == 4
    assert reference_loop.same(module.state_dict(), expected[-1])


def test_model_pruning_of_one_client_is_that_of_the_plain_trainer() -> None:
    results = []
    for strategy in ("auto", sequential(num_clients=1, client_optimizer="keep")):
        torch.manual_seed(0)
        module = reference.Classifier(dropout=0.0)
        prune = ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(module.net[0], "weight")],
            amount=lambda epoch: 0.3 if epoch == 1 else 0,
            use_lottery_ticket_hypothesis=False,
        )
        trainer = reference.quiet_trainer(strategy=strategy, callbacks=[prune], max_epochs=4)
        trainer.fit(module, reference.loader(reference_loop.data(), shuffle=False))
        results.append(reference_loop.state_of(module))
    assert int((results[0]["net.0.weight"] == 0).sum()) == round(0.3 * 12 * 16)
    assert reference_loop.same(*results)


def test_model_pruning_holds_over_clients() -> None:
    torch.manual_seed(0)
    module = reference.Classifier()
    prune = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.net[0], "weight")],
        amount=lambda epoch: 0.5 if epoch == 1 else 0,
        use_lottery_ticket_hypothesis=False,
    )
    reference_loop.fit(module, callbacks=[prune], max_epochs=4)
    dense = reference_loop.models(2)[2]["net.0.weight"]
    smallest = dense.abs().flatten().argsort()[: dense.numel() // 2]
    layer = module.net[0]
    assert isinstance(layer, nn.Linear)
    pruned = (layer.weight == 0).flatten().nonzero().flatten()
    assert set(pruned.tolist()) == set(smallest.tolist())


# ---- progress


class Losses(reference_loop.Validated):
    """Keeps the losses of its local batches."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss


def expected_progress(losses: list[float]) -> Iterator[tuple[str, str]]:
    batches = reference_loop.passes(reference_loop.partition())
    remaining = iter(losses)
    for round in range(4):
        for client in range(4):
            for _ in batches(client, round):
                yield f"{client}/4", f"{next(remaining):.3g}"


def test_tqdm_counts_rounds_and_shows_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fedscale.core.lightning.progress._SECONDS_BETWEEN_UPDATES", 0)
    shown: list[dict[str, Any]] = []
    counts: list[tuple[float, float | None]] = []

    class Bar(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            bar.fp = io.StringIO()
            original = bar.set_postfix

            def set_postfix(*args: Any, **kwargs: Any) -> None:
                shown.append(dict(*args, **kwargs))
                original(*args, **kwargs)

            bar.set_postfix = set_postfix  # type: ignore[method-assign]
            return bar

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            counts.append((self.train_progress_bar.n, self.train_progress_bar.total))

    torch.manual_seed(0)
    module = Losses()
    reference_loop.fit(
        module, strategy={"rounds_per_epoch": 2}, callbacks=[Bar()], enable_progress_bar=True, max_epochs=2
    )
    clients = [(row["clients"], row["client_loss"]) for row in shown if "clients" in row]
    assert clients == list(expected_progress(module.losses))
    assert counts == [(1, 2), (2, 2)] * 2


def test_rich_counts_rounds_and_shows_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fedscale.core.lightning.progress._SECONDS_BETWEEN_UPDATES", 0)
    shown: list[dict[str, Any]] = []
    counts: list[tuple[float, float | None]] = []

    class Bar(RichProgressBar):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            component = self._metric_component
            assert component is not None
            original = component.update

            def update(metrics: dict[str, Any]) -> None:
                shown.append(dict(metrics))
                original(metrics)

            component.update = update  # type: ignore[method-assign]

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            assert self.progress is not None
            assert self.train_progress_bar_id is not None
            task = self.progress.tasks[self.train_progress_bar_id]
            counts.append((task.completed, task.total))

    torch.manual_seed(0)
    module = Losses()
    bar = Bar(console_kwargs={"file": io.StringIO()})
    reference_loop.fit(
        module, strategy={"rounds_per_epoch": 2}, callbacks=[bar], enable_progress_bar=True, max_epochs=2
    )
    clients = [(row["clients"], row["client_loss"]) for row in shown if "clients" in row]
    assert clients == list(expected_progress(module.losses))
    assert counts == [(1, 2), (2, 2)] * 2


def test_progress_waits_between_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fedscale.core.lightning.progress._SECONDS_BETWEEN_UPDATES", float("inf"))
    drawn: list[dict[str, Any]] = []

    class Bar(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            bar.fp = io.StringIO()

            def set_postfix(*args: Any, **kwargs: Any) -> None:
                drawn.append(dict(*args, **kwargs))

            bar.set_postfix = set_postfix  # type: ignore[method-assign]
            return bar

    reference_loop.fit(callbacks=[Bar()], enable_progress_bar=True, max_epochs=2)
    assert drawn
    assert not any("clients" in row for row in drawn)


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
@pytest.mark.parametrize("looks", [False, True])
def test_what_a_callback_does_to_the_module_after_a_client_is_not_sent(
    executor: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoils(pl.Callback):
        def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
            if looks:
                seen.append(update.delta.clone())
            for parameter in pl_module.parameters():
                nn.init.constant_(parameter, 7.0)

    seen: list[Tensor] = []
    _, expected = reference_loop.fit(strategy={"executor": executor}, max_epochs=2)
    # As for large models, whose deltas are computed in parts.
    monkeypatch.setattr(flat_view, "ONE_PART", 0)
    monkeypatch.setattr(flat_view, "elements_at_once", lambda device: 3)
    _, found = reference_loop.fit(strategy={"executor": executor}, max_epochs=2, callbacks=[Spoils()])
    assert reference_loop.same(reference_loop.state_of(found), reference_loop.state_of(expected))
    assert bool(seen) is looks
