"""pytest plugin for Lightning's own tests: their Trainers get `FederatedStrategy`, and outcomes are written to a file.

A Trainer that would train on one CPU by Lightning's plain strategy gets one kept client and one batch a round instead:
one Trainer step is then one batch, and an epoch is one pass over the data. By law 3 nothing else may differ.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.callbacks import Callback

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.executors import sequential
from lightning_fedscale.core.executors.local_step import local_step
from lightning_fedscale.core.round import trainer_of_rounds
from lightning_fedscale.core.round.notifier import Notifier
from lightning_fedscale.core.round.run_settings_logger import RunSettingsLogger
from tests.lightning_suite.reasons import read

MODES = ("plain", "federated", "bare")
"""As Lightning means it; with the strategy; and with it, but without what rounds add by design."""

_ENDLESS = 10**9  # rounds in an epoch until the train loader is known


class OneBatchRounds(FederatedStrategy):
    """One kept client and one batch a round. ``rounds_per_epoch`` is read off the train loader once it is there."""

    bare = False

    def __init__(self) -> None:
        super().__init__(num_clients=1, local_steps=1, client_optimizer="keep", executor="sequential")

    def setup(self, trainer: Any) -> None:
        self._set_epoch(_ENDLESS)
        super().setup(trainer)

    def process_dataloader(self, dataloader: Any) -> Any:
        if self._federation is not None and self._trainer_of_fit.training:
            self._set_epoch(_batches(dataloader, self._share))
        return super().process_dataloader(dataloader)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        # The loader comes later; until then the number is that of the run that wrote the checkpoint.
        self._set_epoch(checkpoint.get("federated", {"settings": {}})["settings"].get("rounds_per_epoch", _ENDLESS))
        super().load_optimizer_state_dict(checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(dict(checkpoint) if self.bare else checkpoint, *args, **kwargs)

    def _set_epoch(self, rounds: int) -> None:
        owners: list[OneBatchRounds | RunSettingsLogger] = [self]
        if self._federation is not None:
            callbacks: list[Callback] = self._trainer_of_fit.callbacks  # type: ignore[attr-defined]
            owners += [each for each in callbacks if isinstance(each, RunSettingsLogger)]
        for owner in owners:
            owner._options = dataclasses.replace(owner._options, rounds_per_epoch=rounds)
        if self._federation is not None:
            fit = self._federation.fit
            fit.options = dataclasses.replace(fit.options, rounds_per_epoch=rounds)


def _batches(loader: Any, share: float | int) -> int:
    """How many batches a plain Trainer would see in an epoch."""
    try:
        total = len(loader)
    except Exception:
        return 1  # refused later
    return max(1, min(total, share) if isinstance(share, int) else int(total * share))


def _on_one_cpu(*, accelerator: Any = "auto", devices: Any = "auto", num_nodes: int = 1, **_: Any) -> bool:
    """Whether Lightning would choose its plain strategy on the CPU."""
    if accelerator == "auto":
        cpu = not any(kind.is_available() for kind in (CUDAAccelerator, MPSAccelerator, XLAAccelerator))
    else:
        cpu = accelerator == "cpu" or type(accelerator) is CPUAccelerator
    told_by_environment = any(name.startswith("PL_TRAINER_") for name in os.environ)
    return cpu and devices in ("auto", 1, "1") and num_nodes == 1 and not told_by_environment


class _Recorder:
    """Counts the Trainers of a test that got the strategy, and writes each test's outcome."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._trainers = 0

    def patch(self) -> None:
        original = Trainer.__init__

        @functools.wraps(original)
        def init(trainer: Trainer, **kwargs: Any) -> None:
            if kwargs.get("strategy", "auto") == "auto" and _on_one_cpu(**kwargs):
                kwargs["strategy"] = OneBatchRounds()
                self._trainers += 1
            original(trainer, **kwargs)

        Trainer.__init__ = init  # type: ignore[assignment, method-assign]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = read(self._file.read_text()) if self._file.exists() else {}
        items[:] = [item for item in items if item.nodeid not in known]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._trainers = 0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if report.when == "call" or report.failed:
            self._note(report, None if call.excinfo is None else call.excinfo.value)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report)

    def _note(self, report: Any, error: BaseException | None = None) -> None:
        said = []
        while error is not None:  # a refusal may be what came before the words of pytest.raises
            said.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        found = {"test": report.nodeid, "outcome": report.outcome, "trainers": self._trainers, "said": "; ".join(said)}
        with self._file.open("a") as file:
            file.write(json.dumps(found) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightning_suite")
    group.addoption("--mode", choices=MODES, default="federated", help="how Trainers train")
    group.addoption("--outcomes", type=Path, required=True, help="file that gets a line of JSON for every test")


def pytest_configure(config: pytest.Config) -> None:
    recorder, mode = _Recorder(config.getoption("outcomes")), config.getoption("mode")
    config.pluginmanager.register(recorder)
    if mode != "plain":
        recorder.patch()
    if mode == "bare":
        _take_out_what_rounds_add()


def _take_out_what_rounds_add() -> None:
    """No metrics and hyperparameters of rounds, no entry in checkpoints that hooks see, ``batch_idx`` of the epoch."""
    OneBatchRounds.bare = True
    Notifier._report = lambda self, record: self._log.points.send()  # type: ignore[method-assign]
    trainer_of_rounds.without_placeholder_metric = lambda logger: lambda: None  # type: ignore[attr-defined]
    for name in ("on_train_start", "on_train_batch_end", "on_train_end"):
        setattr(RunSettingsLogger, name, lambda self, *_: None)
    call = sequential.SequentialExecutor._call

    def numbered_step(trainer: Trainer, correction: Any = None) -> Any:
        own = local_step(trainer, correction)
        return SimpleNamespace(
            step=lambda batch, idx, **kwargs: own.step(batch, idx + trainer.fit_loop.epoch_loop.batch_idx, **kwargs)
        )

    def numbered_call(self: Any, hook: str, *values: Any) -> Any:
        return call(self, hook, *values[:-1], values[-1] + self._trainer.fit_loop.epoch_loop.batch_idx)

    sequential.local_step = numbered_step  # type: ignore[attr-defined]
    sequential.SequentialExecutor._call = numbered_call  # type: ignore[method-assign]
