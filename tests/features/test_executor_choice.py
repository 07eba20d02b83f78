"""What "auto" chooses: by a model of the step, not by a clock."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.core.executors import ExecutorChoice, ExecutorTiming
from lightning_fedscale.core.executors.fast_step import FastStep
from lightning_fedscale.core.executors.machine import BUILT_IN, Machine
from lightning_fedscale.core.executors.vectorized import executor as vectorized
from lightning_fedscale.core.executors.vectorized.batched_step import BatchedStep
from lightning_fedscale.core.executors.vectorized.captured_steps import CapturedSteps
from lightning_fedscale.core.executors.vectorized.wave import Wave
from tests.clock import Clock
from tests.laws import reference

SMALL_CALLS = Machine(1e-12, 6e-12, 4e-11)
"""Calls take next to no time, so that nothing is gained by sharing them."""


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Run:
    """A run under "auto" whose clients have as many samples each, and what it says."""

    def __init__(
        self,
        module: pl.LightningModule | None = None,
        *,
        clients: int = 10,
        rounds: int = 8,
        partition: Partition | None = None,
        ckpt_path: Any = None,
        logger: Any = False,
    ) -> None:
        self.module = Net() if module is None else module
        self.strategy = FederatedStrategy(
            partitioner=partition or reference.equal_clients(clients, 200 // clients), verify_executor=False
        )
        self.trainer = reference.quiet_trainer(max_epochs=rounds, strategy=self.strategy, logger=logger)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.trainer.fit(self.module, reference.loader(reference.dataset()), ckpt_path=ckpt_path)
        self.warnings = [text for each in caught if (text := str(each.message)).startswith("executor=")]

    @property
    def choice(self) -> ExecutorChoice:
        assert self.strategy._federation is not None
        return self.strategy._federation.fit.executor


def slow(monkeypatch: pytest.MonkeyPatch, clock: Clock, owner: Any, name: str) -> None:
    """A minute passes whenever this method is called."""
    original = getattr(owner, name)

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += 60
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, slowly)


def test_a_clock_that_contradicts_changes_no_choice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Run()
    assert expected.choice.kind == "vectorized"
    assert not expected.warnings
    slow(monkeypatch, clock, Wave, "step")
    contradicted = Run()
    assert contradicted.choice.chosen == expected.choice.chosen
    torch.testing.assert_close(contradicted.module.state_dict(), expected.module.state_dict(), rtol=0, atol=0)
    (warning,) = contradicted.warnings
    assert "'vectorized'" in warning
    assert "executor='sequential'" in warning


def test_nor_does_it_in_the_other_direction(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.tick = 1e-9
    expected = Run(clients=2)
    assert expected.choice.kind == "sequential"
    assert not expected.warnings
    slow(monkeypatch, clock, FastStep, "step")
    contradicted = Run(clients=2)
    assert contradicted.choice.chosen == expected.choice.chosen
    (warning,) = contradicted.warnings
    assert "'sequential'" in warning
    assert "executor='vectorized'" in warning


def test_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "machine_of", lambda device: SMALL_CALLS)
    tried: list[BatchedStep] = []
    original = BatchedStep.run

    def noted(self: BatchedStep, *args: Any, **kwargs: Any) -> Any:
        tried.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BatchedStep, "run", noted)
    run = Run()
    assert run.choice.kind == "sequential"
    assert "at most" in run.choice.reason
    assert not tried, "what cannot gain is not tried"
    assert not run.warnings


def test_clients_that_share_no_steps_gain_nothing() -> None:
    """Each client has another number of samples, so that the last batch of each has another size."""
    assert Run(clients=5).choice.kind == "vectorized"
    run = Run(partition=Partition.from_lists([range(i * 30, i * 30 + 1 + i) for i in range(5)]))
    assert run.choice.kind == "sequential"
    assert run.choice._forecast is not None
    assert run.choice._forecast.clients == 1.0


def test_steps_that_cannot_be_captured_count_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(clients=4, rounds=2).choice.kind == "vectorized"
    monkeypatch.setattr(CapturedSteps, "is_due", lambda *_: False)
    run = Run(clients=4, rounds=2)
    assert run.choice._forecast is not None
    assert not run.choice._forecast.captured
    assert run.choice.kind == "sequential"


def test_a_choice_is_reported_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = Run(rounds=3)
    (said,) = [record.message for record in caplog.records if record.message.startswith("Executor:")]
    for fact in ("'vectorized'", run.choice.reason, "operators", "10 clients", BUILT_IN["cpu"].source):
        assert fact in said


def test_a_resumed_run_keeps_the_choice(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Run(rounds=3)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr(vectorized, "machine_of", lambda device: SMALL_CALLS)
    resumed = Run(rounds=6, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.choice.kind == half.choice.kind == "vectorized"
    assert "interrupted" in resumed.choice.reason
    assert Run(rounds=3).choice.kind == "sequential"


class Settings(pl.loggers.logger.DummyLogger):
    """Keeps settings, which like MLflow's never change."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        assert all(self.settings.get(name, value) == value for name, value in dict(params).items())
        self.settings |= dict(params)


def test_the_choice_is_among_the_settings() -> None:
    logger = Settings()
    run = Run(rounds=2, logger=logger)
    assert logger.settings["federated/executor"] == "auto"
    assert logger.settings["federated/executor.chosen"] == "vectorized"
    assert logger.settings["federated/executor.reason"] == run.choice.reason


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        ([(1, 1, 4.0, 1.0), (1, 1, 4.0, 3.9)], "vectorized"),
        ([(1, 1, 4.0, 3.9), (1, 1, 4.0, 3.8), (1, 1, 2.0, 1.0)], "sequential"),
        ([(1, 1, 4.0, 1.0), (1, 0, 0.0, 0.0)], "sequential"),
        ([(1, 1, 4.0, 1.0), (0, 0, 0.0, 0.0)], "vectorized"),
        ([(0, 0, 0.0, 0.0)], None),
    ],
)
def test_all_ranks_decide_by_the_sum(ranks: list[tuple[float, ...]], kind: str | None) -> None:
    class Parts:
        reason = None

        def close(self) -> None:
            """Hold nothing."""

    total = ExecutorTiming(*map(sum, zip(*(ExecutorTiming(*rank) for rank in ranks), strict=True)))
    choices = [ExecutorChoice("auto", Parts(), Parts()) for _ in ranks]  # type: ignore[arg-type]
    for choice in choices:
        choice.choose(total)
    assert {choice.kind for choice in choices} == {kind}
