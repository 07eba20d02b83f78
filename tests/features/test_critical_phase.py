"""`CriticalPhase` in whole runs: what it sees, what it changes, and that it changes nothing else."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import CriticalPhase, RoundEvents
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.phases import (
    Detector,
    Observation,
    accordion,
    adascale,
    fisher_trace,
    page_hinkley,
    relative_change,
)
from lightning_fedscale.samplers import uniform
from lightning_fedscale.server import from_torch
from tests.laws import reference

STEPS = 12
WARM_UP = 4
"""Steps that are critical in any case with the detectors of these tests."""


class Net(pl.LightningModule):
    """BatchNorm, Dropout, a metric, logging."""

    def __init__(self, optimizer: Callable[..., Any] | None = None, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 4)
        self.accuracy = Accuracy("multiclass", num_classes=4)
        self._make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.body(batch[0]))
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self._make(self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(samples: int = 96, batch: int = 8) -> DataLoader[Any]:
    return DataLoader(reference.dataset(samples), batch, shuffle=False)


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    options = {"max_steps": STEPS, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def test_arguments_are_attributes_that_can_be_set() -> None:
    callback = CriticalPhase(
        action="noise", target_batch=4, noise_in="all", scale_weight_decay=True, every_n_steps=3, noise_every=50, seed=7
    )
    names = ("action", "target_batch", "noise_in", "scale_weight_decay", "every_n_steps", "noise_every", "seed")
    assert [getattr(callback, name) for name in names] == ["noise", 4, "all", True, 3, 50, 7]
    assert callback.needs_sampling_noise is None
    assert CriticalPhase(fisher_trace()).needs_sampling_noise == "detector 'fisher_trace'"
    assert CriticalPhase(scale=adascale(8, reference=4)).needs_sampling_noise == "the scale rule"
    assert copy.deepcopy(callback).target_batch == 4


def test_an_attribute_that_is_set_takes_effect() -> None:
    callback = CriticalPhase(relative_change(threshold=100.0, window=WARM_UP), scale=3.0)
    callback.action = "observe"
    trainer(callback).fit(Net(), data())
    assert not callback.critical
    assert callback.scale == 1.0
    callback.action = "scale"
    assert callback.scale == 3.0
    callback.detector = relative_change(threshold=100.0, window=STEPS)
    trainer(callback).fit(Net(), data())
    assert callback.record.summary("step").startswith("10 of 10 ")  # the last two steps wait to be read


def trained(*callbacks: Callback, module: pl.LightningModule | None = None, **options: Any) -> pl.LightningModule:
    module = Net() if module is None else module
    trainer(*callbacks, **options).fit(module, data())
    return module


def federated(**options: Any) -> FederatedStrategy:
    return FederatedStrategy(**{"num_clients": 6, "local_epochs": 1, "executor": "sequential", **options})


def one_step(clients: int | None, **options: Any) -> FederatedStrategy:
    return federated(num_clients=clients, local_epochs=None, local_steps=1, **options)


def always_after(warm_up: int = WARM_UP) -> Detector:
    """Critical at the beginning and never again."""
    return relative_change(1e6, window=warm_up)


def phase(**options: Any) -> CriticalPhase:
    return CriticalPhase(**{"detector": always_after(), "every_n_steps": 1, "noise_every": None, **options})


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Rates(Callback):
    """Multiplies the learning rate in steps after the warm-up: what scaling is to equal."""

    def __init__(self, factor: float, warm_up: int = WARM_UP) -> None:
        self._factor, self._warm_up = factor, warm_up

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.around = [group["lr"] for group in trainer.optimizers[0].param_groups]
        if trainer.global_step >= self._warm_up:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self._factor

    def on_before_zero_grad(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """Nothing: schedulers step after the batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for group, rate in zip(trainer.optimizers[0].param_groups, self.around, strict=True):
            group["lr"] = rate


def constant(make: Callable[..., Any]) -> Net:
    """Without a schedule, which the comparison's own changes of the learning rate would disturb."""
    module = Net(make)
    module.configure_optimizers = lambda: make(module.parameters())  # type: ignore[method-assign]
    return module


# ---- scaling


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    ],
)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_steps": 6}, {"precision": "bf16-mixed"}])
def test_equals_the_same_run_with_the_learning_rate_multiplied(make: Any, options: dict[str, Any]) -> None:
    ours = trained(phase(scale=2.0), module=constant(make), **options)
    theirs = trained(Rates(2.0), module=constant(make), **options)
    plain = trained(module=constant(make), **options)
    assert torch.equal(weights(ours), weights(theirs))
    assert not torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_cannot_undo_it(algorithm: str) -> None:
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    ours = trained(phase(scale=2.0), module=constant(sgd), **options)
    assert torch.equal(weights(ours), weights(trained(Rates(2.0), module=constant(sgd), **options)))


def test_the_modules_own_clipping_comes_first() -> None:
    seen = []

    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **options: Any) -> None:
            seen.append(options)
            self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")

    class Norms(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            self.grads = [p.grad for p in module.parameters() if p.grad is not None]

    norms, module = Norms(), Own()
    trained(phase(scale=4.0), norms, module=module)
    assert len(seen) == STEPS
    assert float(torch.cat([g.flatten() for g in norms.grads]).norm()) == pytest.approx(4e-3, rel=1e-4)
    assert "configure_gradient_clipping" not in vars(module)


def test_monitors_and_schedules_see_the_learning_rate_as_it_was() -> None:
    def rates(*callbacks: Callback) -> list[float]:
        logger = CSVLogger("logs")
        adam = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
        run = trainer(*callbacks, LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
        run.fit(Net(adam), data())
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5 ** (STEPS // 5))
        return [float(row["lr-Adam"]) for row in logger.experiment.metrics] or read(logger, "lr-Adam")

    assert rates(phase(scale=3.0)) == rates()


def read(logger: CSVLogger, name: str) -> list[float]:
    import pandas as pd

    table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    found: list[float] = table[name].dropna().tolist()
    return found


def test_skipped_steps_of_mixed_precision_leave_the_learning_rate() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=100)
    adam = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    callback = phase(scale=2.0)
    run = trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_steps=40)
    module = constant(adam)
    run.fit(module, data(400))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.01
    # Gradients are seen as they are, whatever the loss was multiplied by: skipped steps are no observations.
    norms = [row[1] for row in callback.record.rows]
    assert 0 < len(norms) < 40
    assert 0.01 < min(norms) <= max(norms) < 100


def test_manual_optimization_is_scaled_after_the_users_own_clipping() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1]))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()

    callback = phase(scale=2.0)
    ours = trained(callback, module=Manual())
    assert len(callback.record.rows) == STEPS
    assert max(row[1] for row in callback.record.rows) == pytest.approx(0.1, rel=1e-4)
    assert not torch.equal(weights(ours), weights(trained(module=Manual())))


# ---- what it sees


class Norms(Callback):
    """The sum of layer norms of every step, as anybody would measure it."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.seen.append([float(p.grad.norm()) for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("every", [1, 5, 100])
def test_it_sees_accumulated_unclipped_gradients(every: int) -> None:
    norms, callback = Norms(), phase(every_n_steps=every, action="observe")
    trained(norms, callback, accumulate_grad_batches=3, gradient_clip_val=1e-3, max_steps=6)
    rows = callback.record.rows
    assert len(rows) == 6 // every * every
    for row, seen in zip(rows, norms.seen, strict=False):
        assert row[1] == pytest.approx(math.sqrt(sum(n * n for n in seen)), rel=1e-5)


def test_the_detector_is_fed_step_by_step() -> None:
    norms, detector = Norms(), relative_change(0.05, window=3)
    callback = phase(detector=detector, every_n_steps=4, action="observe")
    trained(norms, callback)
    state = detector.init()
    for row, seen in zip(callback.record.rows, norms.seen, strict=True):
        decision, state = detector.update(state, Observation(seen))
        assert row[2] == pytest.approx(decision.statistic, rel=1e-4, nan_ok=True)
    assert callback.critical == decision.critical


def test_reading_less_often_delays_decisions_only() -> None:
    at_once, later = phase(action="observe"), phase(action="observe", every_n_steps=4)
    trained(at_once)
    trained(later)
    assert at_once.record.rows == later.record.rows
    assert at_once.record.spans == later.record.spans == [[0, WARM_UP - 1]]


@pytest.mark.parametrize("action", [{"action": "observe"}, {"scale": 2.0}, {"action": "noise", "target_batch": 4}])
def test_numbers_leave_the_device_once_in_n_steps(action: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these calls would wait for a GPU; those that come from this project are counted."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if "/lightning_fedscale/" in sys._getframe(1).f_code.co_filename:
                reads.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__array__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    trained(phase(every_n_steps=4, noise_in="all", **action), gradient_clip_val=0.1)
    assert reads.count("cpu") == STEPS // 4
    assert set(reads) == {"cpu"}


def test_accordion_sees_gradients_added_up() -> None:
    gradients: list[list[Tensor]] = []

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
            gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])

    callback = phase(detector=accordion(interval=1, accumulate=3), action="observe")
    trained(Keep(), callback)
    assert len(callback.record.rows) == STEPS // 3
    sums = [torch.stack([g[i] for g in gradients[:3]]).sum(0) for i in range(len(gradients[0]))]
    assert callback.record.rows[0][1] == pytest.approx(float(torch.cat([s.flatten() for s in sums]).norm()), rel=1e-5)


# ---- it changes nothing else


@pytest.mark.parametrize("strategy", ["auto", "federated"])
@pytest.mark.parametrize("options", [{}, {"level": "step"}, {"noise_every": 1}])
def test_observing_changes_no_bit(strategy: str, options: dict[str, Any]) -> None:
    def run(*callbacks: Callback) -> list[Any]:
        module = Net(lambda p: torch.optim.Adam(p, lr=0.01))
        kind = federated() if strategy == "federated" else "auto"
        run = trainer(*callbacks, strategy=kind, max_steps=6)
        run.fit(module, DataLoader(reference.dataset(96), 8, shuffle=True))
        return [module.state_dict(), run.optimizers[0].state_dict(), torch.get_rng_state(), {
            name: float(value) for name, value in run.callback_metrics.items() if name in ("loss", "accuracy")
        }]  # fmt: skip

    torch.manual_seed(7)
    ours = run(phase(action="observe", **options))
    torch.manual_seed(7)
    theirs = run()
    for left, right in zip(ours, theirs, strict=True):
        assert str(left) == str(right)
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])


def test_nothing_stays_in_module_optimizer_or_trainer() -> None:
    module, callback = Net(), phase(scale=2.0)
    run = trainer(callback, max_steps=6)
    run.fit(module, data())
    assert run.callbacks.count(callback) == 1  # type: ignore[attr-defined]
    assert not any("Watch" in type(each).__name__ for each in run.callbacks)  # type: ignore[attr-defined]
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert "configure_gradient_clipping" not in vars(module)

    class Boom(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("boom")

    module = Net()
    run = trainer(callback, Boom())
    with pytest.raises(KeyError):
        run.fit(module, data())
    assert "configure_gradient_clipping" not in vars(module)
    assert not any("Watch" in type(each).__name__ for each in run.callbacks)  # type: ignore[attr-defined]


def test_a_module_copied_during_fit_has_its_own_clipping() -> None:
    class Copy(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            self.twin = copy.deepcopy(module)

    keeper = Copy()
    trained(phase(), keeper, max_steps=1)
    clipping = keeper.twin.configure_gradient_clipping
    assert isinstance(clipping, MethodType)
    assert clipping.__func__ is pl.LightningModule.configure_gradient_clipping


# ---- noise


def test_half_batches_measure_the_noise_of_single_samples() -> None:
    """On linear regression, where the gradient of every sample is known in closed form."""

    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return ((batch[0] @ self.weight - batch[1]) ** 2).mean() / 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)  # always the same point

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 5, generator=generator)
    targets = inputs @ torch.linspace(-0.5, 0.5, 5) + torch.randn(20_000, generator=generator)
    callback = phase(action="observe", noise_every=1, every_n_steps=7)
    trainer(callback, max_steps=315, accumulate_grad_batches=2).fit(
        Linear(), DataLoader(TensorDataset(inputs, targets), 32)
    )
    samples = -targets[:, None] * inputs  # at zero
    trace, square = float(samples.var(0).sum()), float(samples.mean(0).square().sum())
    found = callback.noise_scale
    assert found.enough
    assert found.estimates == 300
    assert found.low <= trace / square <= found.high
    assert found.high < 2 * found.low
    assert found.fisher_trace == pytest.approx(trace + square, rel=0.1)
    assert found.critical_batch == pytest.approx(found.scale)


def test_clients_show_within_and_between() -> None:
    """Clients with planted directions of their own: how much noise is theirs, and how much comes from sampling."""
    clients, each, batch = 10, 400, 20

    class Mean(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.weight - batch[0]).square().sum(1).mean() / 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    generator = torch.Generator().manual_seed(0)
    centres = 1.0 + 0.5 * torch.randn(clients, 1, 4, generator=generator)
    samples = (centres + 2.0 * torch.randn(clients, each, 4, generator=generator)).flatten(0, 1)
    callback = phase(action="observe", noise_every=1)
    owners = Partition.from_lists([range(k * each, (k + 1) * each) for k in range(clients)])
    trainer(callback, strategy=one_step(None, partitioner=owners), max_steps=60).fit(
        Mean(), DataLoader(TensorDataset(samples), batch, shuffle=True)
    )
    means = -samples.reshape(clients, each, 4).mean(1)
    square = float(means.mean(0).square().sum())
    within = float(samples.reshape(clients, each, 4).var(1).sum(1).mean())
    between = float(means.var(0).sum())
    sampling, members = callback.sampling_noise, callback.noise_scale
    assert sampling.critical_batch == pytest.approx(within / square, rel=0.15)
    assert members.critical_cohort == pytest.approx((between + within / batch) / square, rel=0.15)
    assert sampling.critical_cohort == pytest.approx(members.critical_cohort, rel=0.15)
    assert members.low < batch * members.critical_cohort < members.high


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("auto", {}), ("federated", {"noise": "reweighting"}), ("federated", {"noise": "diagonal"})],
)
def test_noise_is_added_and_repeated_exactly(strategy: str, options: dict[str, Any]) -> None:
    def run(seed: int, **more: Any) -> Tensor:
        callback = phase(**{"action": "noise", "target_batch": 4, "noise_in": "all", "seed": seed, **options, **more})
        kind = federated() if strategy == "federated" else "auto"
        return weights(trained(callback, strategy=kind, max_steps=6))

    plain = weights(trained(strategy=federated() if strategy == "federated" else "auto", max_steps=6))
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), plain)
    assert torch.equal(run(0, target_batch=10**6), plain)  # as large a batch as there is needs no noise


def test_noise_goes_by_the_loaders_batch_where_its_tensors_disagree() -> None:
    """Graphs, say, are batched as one large graph, and nothing in it is as long as there are samples."""

    def run(batch: Callable[[Any], Any]) -> Tensor:
        loader, module = data(), Net()
        collate = loader.collate_fn
        loader.collate_fn = lambda samples: batch(collate(samples))
        callback = phase(action="noise", target_batch=4, noise_in="all")
        trainer(callback, max_steps=6).fit(module, loader)
        return weights(module)

    assert torch.equal(run(lambda batch: batch), run(lambda batch: [*batch, torch.zeros(1)]))


def test_reweighting_noise_has_the_covariance_of_a_smaller_batch() -> None:
    """Of the server's update over many rounds at one point, against what fewer samples would give."""
    updates: dict[bool, list[Tensor]] = {True: [], False: []}

    class Mean(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(30))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.weight - batch[0]).square().sum(1).mean() / 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class Collect(RoundEvents):
        def __init__(self, noisy: bool) -> None:
            self._noisy = noisy

        def on_server_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: Any) -> None:
            updates[self._noisy].append(step["weight"].clone())
            step["weight"].zero_()  # stay where we are

    # A round shows ten numbers of each of three widths.
    widths = torch.tensor([1.0, 2.0, 0.5]).repeat(10)
    samples = torch.randn(8 * 1000, 30, generator=torch.Generator().manual_seed(0)) * widths
    for noisy in (True, False):
        noise = [phase(action="noise", target_batch=8, noise_in="all")] if noisy else []
        trainer(*noise, Collect(noisy), strategy=one_step(8), max_steps=100).fit(
            Mean(), DataLoader(TensorDataset(samples), 4, shuffle=True)
        )
    variance = {noisy: torch.stack(found).var(0).view(10, 3).mean(0) for noisy, found in updates.items()}
    of_sample = samples.double().var(0).view(10, 3).mean(0)
    assert torch.allclose(variance[False], of_sample / 32, rtol=0.2)
    assert torch.allclose(variance[True], of_sample / 8, rtol=0.2)


# ---- federated rounds


def test_round_level_scales_the_aggregated_update() -> None:
    """Against a server learning rate that is doubled after the warm-up by hand."""
    steps: list[float] = []

    class ByHand(Callback):
        def on_before_server_step(self, trainer: Any, module: Any, record: Any, delta: Any) -> None:
            steps.append(record.delta_norm)
            if record.round >= WARM_UP:
                for value in delta.values():
                    value.mul_(2.0)

    options: dict[str, Any] = {"max_steps": 8}
    callback = phase(scale=2.0)
    ours = trained(callback, strategy=federated(), **options)
    theirs = trained(ByHand(), strategy=federated(), **options)
    assert torch.equal(weights(ours), weights(theirs))
    assert [row[1] for row in callback.record.rows] == pytest.approx(steps)
    assert callback.record.spans == [[0, WARM_UP - 1]]


def test_adaptive_servers_have_their_step_scaled() -> None:
    class ByHand(Callback):
        def on_server_step(self, trainer: pl.Trainer, module: Any, step: Any) -> None:
            if trainer.global_step >= WARM_UP:
                for value in step.values():
                    value.mul_(2.0)

    def run(callback: Callback) -> Tensor:
        adaptive = from_torch(torch.optim.Adam, lr=0.05)
        return weights(trained(callback, strategy=federated(server_optimizer=adaptive), max_steps=8))

    assert torch.equal(run(phase(scale=2.0)), run(ByHand()))


@pytest.mark.parametrize("with_decay", [False, True])
def test_the_servers_weight_decay_is_scaled_only_if_asked(with_decay: bool) -> None:
    """Against AdamW's own step, taken apart: its decay is a share of the weights, the rest is multiplied."""
    rate, decay, factor = 0.05, 0.4, 2.0

    class ByHand(RoundEvents):
        def on_round_start(self, trainer: Any, module: Any, round: int, clients: Any) -> None:
            self.before = {name: p.detach().double() for name, p in module.named_parameters()}

        def on_server_step(self, trainer: pl.Trainer, module: Any, step: Any) -> None:
            if trainer.global_step >= WARM_UP:
                for name, value in step.items():
                    fixed = 0.0 if with_decay else rate * decay * self.before[name]
                    value.copy_(factor * (value - fixed) + fixed)

    def run(callback: Callback) -> Tensor:
        adaptive = from_torch(torch.optim.AdamW, lr=rate, weight_decay=decay)
        return weights(trained(callback, strategy=federated(server_optimizer=adaptive), max_steps=8))

    ours = run(phase(scale=factor, scale_weight_decay=with_decay))
    assert torch.allclose(ours, run(ByHand()), rtol=1e-6, atol=1e-7)


def test_a_linear_servers_weight_decay_is_scaled_only_if_asked() -> None:
    """SGD with decay follows the update's size: the update is multiplied, unless decay is to be as well."""

    def run(callback: Callback, **options: Any) -> Tensor:
        sgd = from_torch(torch.optim.SGD, lr=0.8, **options)
        return weights(trained(callback, strategy=federated(server_optimizer=sgd), max_steps=WARM_UP + 1))

    start = weights(trained(phase(action="observe"), strategy=federated(
        server_optimizer=from_torch(torch.optim.SGD, lr=0.8, weight_decay=0.1)), max_steps=WARM_UP))  # fmt: skip
    plain = run(phase(action="observe"), weight_decay=0.1) - start
    decay = -0.8 * 0.1 * start
    assert torch.allclose(run(phase(scale=2.0), weight_decay=0.1), start + 2 * (plain - decay) + decay, atol=1e-6)
    asked = run(phase(scale=2.0, scale_weight_decay=True), weight_decay=0.1)
    assert torch.allclose(asked, start + 2 * plain, atol=1e-6)


def test_step_level_scales_the_clients_steps() -> None:
    """Warm-up is counted in every client's own steps; from the round after it, all steps of all clients are scaled."""
    callback = phase(scale=2.0, level="step", detector=always_after(4))
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    ours = trained(callback, module=constant(sgd), strategy=federated(), max_steps=6)

    class ByHand(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            # 16 samples are 2 batches: the 5th step of a client falls into its 3rd round, so the 4th is scaled.
            if trainer.global_step >= 3:
                for parameter in module.parameters():
                    parameter.grad.mul_(2.0)

    theirs = trained(ByHand(), module=constant(sgd), strategy=federated(), max_steps=6)
    assert torch.equal(weights(ours), weights(theirs))
    assert callback.record.spans == [[0, 1]]


def test_the_executor_does_not_matter() -> None:
    def run(executor: str) -> tuple[Tensor, CriticalPhase]:
        callback = CriticalPhase(relative_change(0.05, window=3), scale=1.5, noise_every=2)
        strategy = federated(executor=executor, local_epochs=2)
        module = trained(callback, module=Net(dropout=0.0), strategy=strategy, max_steps=8)
        return weights(module), callback

    (one, first), (other, second) = run("sequential"), run("vectorized")
    assert torch.allclose(one, other, atol=1e-5)
    assert first.record.spans == second.record.spans
    assert first.noise_scale.square == pytest.approx(second.noise_scale.square, rel=1e-3)


def test_others_can_follow_the_phase() -> None:
    """A sampler that asks more clients while the phase is critical, in time for the next round."""
    callback = phase(scale=1.0)
    cohorts: list[int] = []

    def more_when_critical(*, clients_per_round: int, **keys: Any) -> Any:
        return uniform(clients_per_round=6 if callback.critical else clients_per_round, **keys)

    class Cohorts(RoundEvents):
        def on_round_start(self, trainer: Any, module: Any, round: int, clients: Any) -> None:
            cohorts.append(len(clients))

    strategy = federated(clients_per_round=2, sampler=more_when_critical)
    trained(callback, Cohorts(), strategy=strategy, max_steps=8)
    assert cohorts == [6] * (WARM_UP + 1) + [2] * (7 - WARM_UP)


def test_local_steps_can_follow_the_phase() -> None:
    """Few local steps and everybody while the phase is critical, then many steps of few; the same after a restart."""

    def run(rounds: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Tensor, list[tuple[int, int]]]:
        callback, seen = phase(detector=relative_change(0.05, window=3), scale=1.5), []

        def cohort(*, clients_per_round: int, **keys: Any) -> Any:
            return uniform(clients_per_round=6 if callback.critical else clients_per_round, **keys)

        class Seen(RoundEvents):
            def on_round_end(self, trainer: Any, module: Any, record: Any) -> None:
                seen.append((len(record.clients), int(record.local_steps.max())))

        strategy = federated(
            local_epochs=None, local_steps=lambda round: 1 if callback.critical else 4, clients_per_round=2,
            sampler=cohort,
        )  # fmt: skip
        run = trainer(callback, Seen(), strategy=strategy, max_steps=-1, max_epochs=rounds)
        module = Net(lambda p: torch.optim.Adam(p, lr=0.003), dropout=0.0)
        run.fit(module, data(), ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
        critical = {at for first, last in callback.record.spans for at in range(first, last + 1)}
        # What a round was like follows from what was known when it began.
        expected = [(6, 1) if at == 0 or at - 1 in critical else (2, 4) for at in range(rounds)]
        assert seen == expected[-len(seen) :]
        return run, weights(module), seen

    _, whole, seen = run(12)
    assert set(seen) == {(6, 1), (2, 4)}
    stopped, _, _ = run(7)
    stopped.save_checkpoint("stop.ckpt")
    _, resumed, _ = run(12, Path("stop.ckpt"))
    assert torch.equal(resumed, whole)


def test_a_function_that_always_says_the_same_is_a_number() -> None:
    number = trained(strategy=federated(local_epochs=None, local_steps=3), max_steps=4)
    function = trained(strategy=federated(local_epochs=None, local_steps=lambda round: 3), max_steps=4)
    assert torch.equal(weights(number), weights(function))
    with pytest.raises(ValueError, match=r"local_steps\(2\)=0: pass an integer of at least 1"):
        trained(strategy=federated(local_epochs=None, local_steps=lambda round: 2 - round), max_steps=4)


# ---- logs and checkpoints


def test_everything_is_logged_and_drawn(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    callback = CriticalPhase(relative_change(0.05, window=3), noise_every=1)
    trained(callback, module=Net(dropout=0.0), strategy=one_step(6), logger=logger, max_steps=30)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "phase/critical", "phase/grad_norm", "phase/relative_change", "phase/threshold", "phase/scale",
        "phase/noise_scale", "phase/noise_scale_low", "phase/noise_scale_high", "phase/critical_batch",
        "phase/critical_cohort",
    } <= scalars  # fmt: skip
    critical = [event.value for event in events.Scalars("phase/critical")]
    assert len(critical) == 30
    shaded = [round for first, last in callback.record.spans for round in range(first, last + 1)]
    assert [round for round, value in enumerate(critical) if value] == shaded
    assert "phase/course" in events.Tags()["images"]
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    shown = {tag for chart in charts for tag in chart.multiline.tag}
    for series in (series for chart in charts for series in chart.margin.series):
        shown |= {series.value, series.lower, series.upper}
    # Tags of a chart are regular expressions.
    assert all(any(re.match(tag, name) for tag in shown) for name in scalars if name.startswith("phase/"))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("auto", {"every_n_steps": 3, "noise_every": 3}),
        ("auto", {"detector": accordion(interval=1, accumulate=3)}),
        ("auto", {"action": "noise", "target_batch": 4, "noise_in": "all"}),
        ("federated", {"noise_every": 2}),
        ("federated", {"level": "step"}),
        ("federated", {"detector": accordion(interval=1, accumulate=3)}),
        ("federated", {"action": "noise", "target_batch": 4, "noise_in": "all"}),
        ("federated", {"action": "noise", "target_batch": 4, "noise_in": "all", "noise": "diagonal"}),
        ("federated", {"detector": page_hinkley(hold=2)}),
    ],
)
@pytest.mark.parametrize("stop", [4, 8])
def test_resuming_is_exact(strategy: str, options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    def run(steps: int, checkpoint: Path | None = None) -> tuple[Tensor, CriticalPhase, pl.Trainer]:
        callback = phase(**{"detector": relative_change(0.05, window=3), "scale": 1.5, **options})
        kind = federated() if strategy == "federated" else "auto"
        # Plain training goes on exactly from the end of an epoch, of 4 steps.
        run = trainer(callback, strategy=kind, max_steps=-1, max_epochs=steps // 4 if strategy == "auto" else steps)
        module = Net(lambda p: torch.optim.Adam(p, lr=0.01), dropout=0.0)
        run.fit(module, data(32), ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
        return weights(module), callback, run

    whole, never, _ = run(STEPS)
    _, _, stopped = run(stop)
    stopped.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback, _ = run(STEPS, tmp_path / "stop.ckpt")
    assert torch.equal(resumed, whole)
    assert str(callback.record.rows) == str(never.record.rows)
    assert callback.record.spans == never.record.spans
    assert str(callback.noise_scale) == str(never.noise_scale)


def test_a_second_run_begins_anew_and_a_longer_one_goes_on() -> None:
    callback = phase(every_n_steps=5)
    trained(callback, max_steps=6)
    trained(callback)
    assert [row[0] for row in callback.record.rows] == list(range(10))  # two wait to be read
    run = trainer(callback, max_steps=-1, max_epochs=1)
    module = Net()
    run.fit(module, data())
    run.fit_loop.max_epochs = 2
    run.fit(module, data())
    assert [row[0] for row in callback.record.rows] == list(range(20))


def test_a_round_that_fails_was_not_judged(tmp_path: Path) -> None:
    class Save(Callback):
        def on_server_step(self, trainer: pl.Trainer, module: Any, step: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    callback = phase(scale=2.0)
    trained(callback, Save(), strategy=federated(), max_steps=8)
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)["callbacks"]["CriticalPhase"]
    assert len(state["record"]["rows"]) == 5
    assert dict(state["keeper"]["states"])[-1]["seen"] == 5


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": 0.3, "detector": relative_change()}, "threshold=0.3: .*Detector"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"detector": "relativ_change"}, r"detector='relativ_change' .*Did you mean 'relative_change'\?"),
        ({"action": "scal"}, "action='scal'"),
        ({"level": "epoch"}, "level='epoch'"),
        ({"action": "noise"}, "target_batch=None"),
        ({"target_batch": 32}, "target_batch=32"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"noise_every": 0}, "noise_every=0"),
        ({"noise": "gaussian"}, "noise='gaussian': .*'diagonal', or None"),
        ({"scale": math.nan}, "scale=nan"),
        ({"scale": lambda phase: 0.0}, "scale=.* 0.0 for Phase.critical=True"),
        ({"scale": lambda phase: None if phase.critical else 2.0}, "scale=.* None for Phase"),
        ({"action": "noise", "target_batch": 0}, "target_batch=0"),
        ({"noise_in": "quiet"}, "noise_in='quiet'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CriticalPhase(**options)


def test_a_scale_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="scale='2'"):
        CriticalPhase(scale="2")  # type: ignore[arg-type]


def test_a_detector_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="detector=<built-in function print>"):
        CriticalPhase(detector=print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "strategy", "message"),
    [
        ({"detector": "federated_gradient_norm"}, "auto", "detector='federated_gradient_norm'"),
        ({"detector": fisher_trace(), "noise_every": None}, "auto", "noise_every=None: detector 'fisher_trace'"),
        ({"detector": fisher_trace(), "noise_every": None}, "federated", "noise_every=None"),
        ({"action": "noise", "target_batch": 4, "noise": "reweighting"}, "auto", "noise='reweighting'"),
        ({"action": "noise", "target_batch": 4, "level": "step"}, "federated", "level='step'.*action='noise'"),
        ({"detector": accordion(accumulate=2), "level": "step"}, "federated", "level='step': "),
        ({"scale": adascale(64, 8), "noise_every": None}, "auto", "noise_every=None: the scale rule"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options: dict[str, Any], strategy: str, message: str) -> None:
    kind = federated() if strategy == "federated" else "auto"
    with pytest.raises(ValueError, match=message):
        trained(CriticalPhase(**options), strategy=kind)


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_steps_that_cannot_be_seen_are_explained_once(strategy: str) -> None:
    class Own(Net):
        """An optimizer that the Trainer does not know."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.head.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.own.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1]))
            self.own.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.body.parameters(), lr=0.1)

    kind = federated() if strategy == "federated" else "auto"
    options: dict[str, Any] = {"strategy": kind, "max_epochs": 6, "max_steps": -1}
    callback = phase(level="step")
    with pytest.warns(UserWarning, match=r"no gradients were seen in \d+ batches.*configure_optimizers") as said:
        trained(callback, module=Own(), **options)
    assert len([each for each in said if "no gradients" in str(each.message)]) == 1
    assert callback.record.summary("step") == "no step was observed"


class Table(Net):
    """A table whose gradient is sparse, or the same dense."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.table = nn.Embedding(10, 12, sparse=sparse)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.body(self.table(batch[1]))).square().mean()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("auto", {"action": "observe"}),
        ("auto", {"scale": 2.0}),
        ("auto", {"detector": accordion(interval=2, accumulate=2)}),
        ("federated", {"action": "observe", "level": "step"}),
        ("federated", {"scale": 2.0}),
    ],
)
def test_sparse_gradients_count_as_dense_ones(strategy: str, options: dict[str, Any]) -> None:
    found = []
    for sparse in (True, False):
        callback = phase(**options)
        module = trained(callback, module=Table(sparse), strategy=federated() if strategy == "federated" else "auto")
        norms = torch.tensor([row[1] for row in callback.record.rows])
        assert len(norms) > 1
        found.append((weights(module), norms))
    torch.testing.assert_close(found[0], found[1])


def test_noise_on_sparse_gradients_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"action='noise': .*sparse=False"):
        trained(phase(action="noise", target_batch=4), module=Table())


def test_step_lengths_that_nothing_changes_are_refused() -> None:
    rprop = lambda p: torch.optim.Rprop(p, lr=0.01)  # noqa: E731
    with pytest.raises(ValueError, match=r"action='scale': .*Rprop"):
        trained(phase(), module=constant(rprop))
    trained(phase(action="observe"), module=constant(rprop))


def test_noise_that_cannot_be_measured_is_refused_where_it_is_needed() -> None:
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"the scale rule .*automatic optimization"):
        trained(CriticalPhase(scale=adascale(64, 8)), module=module)
    # Where there are clients, their updates show it.
    callback = CriticalPhase(always_after(), scale=adascale(96, 16), noise_every=None)
    still = lambda p: torch.optim.SGD(p, lr=1e-6)  # noqa: E731
    trained(callback, module=constant(still), strategy=one_step(6), max_steps=60)
    assert 1.0 < callback.scale <= 6.0


def test_batches_that_cannot_be_cut_are_said_once(recwarn: pytest.WarningsRecorder) -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["x"], batch["y"]], batch_idx)

    rows = [{"x": torch.randn(8, 12), "y": torch.zeros(8, dtype=torch.long), "extra": torch.randn(3)}] * STEPS
    run = trainer(phase(noise_every=1))
    run.fit(Odd(), DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    said = [str(w.message) for w in recwarn if "noise of single samples is not measured" in str(w.message)]
    assert said
    assert "pass noise_every=None" in said[0]
