"""Law 2, interruption does not matter: killed by SIGKILL at any moment and resumed equals never killed, bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.dist import processes
from tests.dist.interrupted import DEATHS, EPOCHS, ROUNDS_PER_EPOCH
from tests.laws import reference
from tests.strategies import sequential

ROUNDS = EPOCHS * ROUNDS_PER_EPOCH
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    processes.run_well([[processes.HERE / "interrupted.py", folder]], [processes.environment()], folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def last(folder: Path, run: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / run / "last.ckpt", weights_only=True)
    return checkpoint


def assert_equal(left: Any, right: Any, where: str) -> None:
    assert type(left) is type(right), where
    if isinstance(left, Mapping):
        assert list(left) == list(right), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def test_every_death_was_one_by_sigkill(report: dict[str, Any]) -> None:
    assert report["never"] == [0]
    assert report["often"] == [0, 0]
    assert len(report["deaths"]) == len(DEATHS) >= 10
    for death in report["deaths"]:
        if death["only"] is None:
            assert death["codes"] == [KILLED] * death["ranks"]
        else:
            # The rank that was left did not wait for ever: its collective failed.
            assert death["codes"][death["only"]] == KILLED
            assert death["codes"][1 - death["only"]] == 1


def test_the_run_went_through_both_numbers_of_ranks_and_to_its_end(folder: Path, report: dict[str, Any]) -> None:
    # Round of the last checkpoint after each death: it never goes back, and there was always one left to go on to.
    rounds = [death["round"] for death in report["deaths"]]
    assert rounds[:2] == [None, None]  # killed while writing the very first files
    assert None not in rounds[2:]
    assert rounds[2:] == sorted(rounds[2:])
    assert 0 < rounds[2] < rounds[-1] < ROUNDS
    # Each stretch with another number of ranks than before went on from where the other had stopped.
    moved = {
        (before["ranks"], after["ranks"])
        for before, after in zip(report["deaths"], report["deaths"][1:], strict=False)
        if (after["round"] or 0) > (before["round"] or 0)
    }
    assert {(1, 1), (1, 2), (2, 2), (2, 1)} <= moved
    assert last(folder, "often")["global_step"] == last(folder, "never")["global_step"] == ROUNDS


def test_final_weights_are_those_of_the_run_that_was_never_killed(folder: Path) -> None:
    often, never = last(folder, "often")["state_dict"], last(folder, "never")["state_dict"]
    assert_equal(often, never, "state_dict")
    assert all(math.isfinite(float(value.sum())) for value in often.values())


@pytest.mark.parametrize("part", ["federated", "optimizer_states", "lr_schedulers", "global_step", "epoch"])
def test_everything_else_in_the_last_checkpoint_is_the_same_too(part: str, folder: Path) -> None:
    assert_equal(last(folder, "often")[part], last(folder, "never")[part], part)


def test_the_checkpoint_held_what_this_run_could_lose(folder: Path) -> None:
    """Otherwise the tests above would pass without any of it being saved."""
    federated = last(folder, "never")["federated"]
    cursors, optimizers = federated["clients"]["cursors"], federated["clients"]["optimizers"]
    assert len(cursors) == len(optimizers) > 4
    assert len({tuple(row[1:]) for row in cursors.tolist()}) > 1
    assert all(float(state[0]["state"][0]["exp_avg"].abs().sum()) > 0 for state in optimizers.values())
    assert any(
        float(state["momentum_buffer"].abs().sum()) > 0 for state in federated["server"]["optimizer"]["state"].values()
    )
    assert [schedule["last_epoch"] for schedule in last(folder, "never")["lr_schedulers"]] == [EPOCHS, ROUNDS]


def test_what_was_spent_is_counted_once(folder: Path) -> None:
    ledgers = []
    for run in ("often", "never"):
        (key,) = [key for key in last(folder, run)["callbacks"] if "ComputeAccounting" in key]
        ledgers.append({**last(folder, run)["callbacks"][key]["ledger"], "seconds": 0.0, "energy": 0.0, "meters": 0.0})
    often, never = (ledger.pop("counted") for ledger in ledgers)
    assert often >= never > 0  # each process counts the first steps of its own, which cost as much as all others
    assert ledgers[0]["updates"] == ROUNDS
    assert ledgers[0]["flops"]["forward"] > 0
    assert len(ledgers[0]["clients"]["ids"]) > 4
    assert_equal(ledgers[0], ledgers[1], "ledger")


def test_a_torn_write_leaves_the_checkpoint_before_it(report: dict[str, Any]) -> None:
    """``report`` holds the round of last.ckpt after each death only because it could be loaded."""
    torn = [death for death in report["deaths"] if death["moment"] == "half written" and death["count"] % 2 == 0]
    assert [death["part"] for death in torn] == ["torn"] * 3
    assert [death["ranks"] for death in torn] == [1, 1, 2]
    # Killed while writing round n's file: round n - 1 is there. Killed once it was renamed: round n is.
    rounds = [0, *(death["round"] or 0 for death in report["deaths"])]
    for before, after, death in zip(rounds, rounds[1:], report["deaths"], strict=False):
        if death["moment"] in ("half written", "rename") and death["count"] == 4:
            assert after == before + 1
        if death["moment"] == "renamed" and death["count"] == 4:
            assert after == before + 2


class Scheduled(reference.Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "epoch"},
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"},
        ]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


class Interrupted(Exception):
    pass


class Cut(pl.Callback):
    """Writes a checkpoint when a hook runs after a given round, and interrupts there."""

    def __init__(self, hook: str, round: int, path: Path, events: list[tuple[Any, ...]]) -> None:
        self._hook, self._round, self._path, self._events = hook, round, path, events

    def _pass(self, hook: str, trainer: pl.Trainer, *details: Any) -> None:
        self._events.append((hook, trainer.global_step, trainer.current_epoch, *details))
        if (hook, trainer.global_step) == (self._hook, self._round):
            trainer.save_checkpoint(self._path)
            raise Interrupted

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pass("epoch start", trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pass("round", trainer, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pass("validation", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pass("epoch end", trainer)


def run_with_cuts(
    cuts: tuple[int, ...], hook: str, rounds_per_epoch: int, limit: dict[str, int], validate: bool, path: Path
) -> tuple[list[tuple[Any, ...]], list[int], dict[str, Tensor]]:
    """What happened, the final counters, the final weights."""
    events: list[tuple[Any, ...]] = []
    resume: Path | None = None
    for cut in (*cuts, -1):
        module = reference.make_module()
        module.__class__ = Scheduled
        trainer = reference.quiet_trainer(
            strategy=sequential(2, rounds_per_epoch=rounds_per_epoch),
            callbacks=[Cut(hook, cut, path, events)],
            **limit,
        )
        loader = reference.loader(reference.dataset(16))
        held_out = reference.loader(reference.dataset(8), shuffle=False) if validate else None
        if cut == -1:
            trainer.fit(module, loader, held_out, ckpt_path=resume)
        else:
            with pytest.raises(Interrupted):
                trainer.fit(module, loader, held_out, ckpt_path=resume)
        resume = path
    counters = [
        trainer.global_step,
        trainer.current_epoch,
        trainer.fit_loop.epoch_loop._batches_that_stepped,
        *(config.scheduler.last_epoch for config in trainer.lr_scheduler_configs),
    ]
    return events, counters, module.state_dict()


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize("rounds_per_epoch", [1, 2])
def test_every_pair_of_interruptions_leaves_the_right_number_of_rounds_and_epochs(
    rounds_per_epoch: int, limit: str, validate: bool, tmp_path: Path
) -> None:
    """A plain Trainer that is twice resumed from the last batch of an epoch trains for too long."""
    epochs = 3
    rounds = rounds_per_epoch * epochs
    until = {"max_epochs": epochs} if limit == "max_epochs" else {"max_epochs": -1, "max_steps": rounds}
    path = tmp_path / "cut.ckpt"
    expected, counters, weights = run_with_cuts((), "", rounds_per_epoch, until, validate, path)
    assert [event[1:] for event in expected if event[0] == "round"] == [
        (n + 1, n // rounds_per_epoch, n % rounds_per_epoch) for n in range(rounds)
    ]
    assert counters == [rounds, epochs, rounds, epochs, rounds]
    for hook in ("round", "validation", "epoch end") if validate else ("round", "epoch end"):
        moments = [event[1] for event in expected if event[0] == hook and event[1] < rounds]
        for cuts in itertools.combinations(moments, 2):
            events, counted, got = run_with_cuts(cuts, hook, rounds_per_epoch, until, validate, path)
            assert counted == counters, (hook, cuts)
            assert_equal(got, weights, f"{hook} {cuts}")
            if hook == "round":
                # As with Lightning, metrics are not in the checkpoint: what an epoch cut off after its last round would
                # have done with them is not made up for.
                assert [e for e in events if e[0] in ("epoch start", "round")] == [
                    e for e in expected if e[0] in ("epoch start", "round")
                ], cuts
            else:
                assert events == expected, (hook, cuts)
