"""The command that runs Lightning's own tests by rounds, on a small suite made here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.messages import collect
from tests.lightning_suite import __main__ as command
from tests.lightning_suite.reasons import (
    BY_DESIGN,
    DIFFERS,
    REFUSED,
    SUBSETS,
    Outcome,
    classify,
    judge,
    read,
    table,
)

PASSED, FAILED = Outcome("passed"), Outcome("failed", said="AssertionError: assert 1 == 2")

SUITE = """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomIterableDataset
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader


class Noting(BoringModel):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        return super().training_step(batch, batch_idx)


def fit(model, *loaders, **kwargs):
    trainer = Trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, **kwargs)
    trainer.fit(model, *loaders)
    return trainer


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_counts_batches(accelerator):
    trainer = fit(BoringModel(), accelerator=accelerator)
    assert trainer.global_step == 6
    assert trainer.num_training_batches == 3


def test_knows_the_batch():
    model = Noting()
    fit(model)
    assert model.seen == [0, 1, 2, 0, 1, 2]


def test_logs_nothing():
    assert not fit(BoringModel()).callback_metrics


def test_iterable():
    with pytest.raises(StopIteration):
        fit(BoringModel(), DataLoader(RandomIterableDataset(32, 64)))
        raise StopIteration


def test_looks_at_the_strategy():
    assert isinstance(fit(BoringModel()).strategy, SingleDeviceStrategy)


def test_fails_in_any_case():
    fit(BoringModel())
    raise AssertionError


def test_was_run_before():
    raise AssertionError("and is not run again")


def test_builds_no_trainer_for_one_cpu():
    assert isinstance(Trainer(strategy="ddp", accelerator="cpu", devices=2, logger=False).global_step, int)
"""


def test_a_failure_is_a_defect_unless_there_is_a_reason() -> None:
    refused = Outcome("failed", said="ValueError: training_step(self, dataloader_iter) is not supported: clients are")
    assert classify("tests_pytorch/loops/test_a.py::test_b", refused, FAILED) in REFUSED
    assert classify("tests_pytorch/loops/test_a.py::test_workers_are_shutdown[False-True]", FAILED, FAILED) in DIFFERS
    assert classify("tests_pytorch/loops/test_a.py::test_b", FAILED, PASSED) is BY_DESIGN
    assert classify("tests_pytorch/loops/test_a.py::test_b", FAILED, FAILED) is None
    assert classify("tests_pytorch/loops/test_a.py::test_b", FAILED, None) is None


def test_what_is_refused_is_a_message_of_the_package() -> None:
    texts = [message.text for message in collect() if message.kind.endswith("Error")]
    said = [reason.said for reason in REFUSED if not reason.tests]
    assert len(said) > 5
    assert [pattern for pattern in said if not any(re.search(pattern, text) for text in texts)] == []


def test_every_reason_says_what_it_is_about() -> None:
    assert all(reason.why and (reason.tests or reason.said) for reason in (*REFUSED, *DIFFERS))
    assert len({reason.why for reason in (*REFUSED, *DIFFERS)}) == len(REFUSED) + len(DIFFERS)


def test_the_last_outcome_counts_and_a_failure_stays() -> None:
    lines = [("a", "failed"), ("a", "passed"), ("b", "passed"), ("b", "failed"), ("c", "rerun"), ("c", "passed")]
    written = "\n".join(json.dumps({"test": t, "outcome": o, "trainers": 1, "said": ""}) for t, o in lines)
    assert {name: outcome.outcome for name, outcome in read(written).items()} == {
        "a": "failed", "b": "failed", "c": "passed",
    }  # fmt: skip


def test_only_what_uses_the_strategy_and_passes_without_it_is_counted() -> None:
    folder = "tests_pytorch/loops/test_a.py::"
    found = judge(
        {
            folder + "passes": PASSED,
            folder + "defect": FAILED,
            folder + "fails_in_any_case": FAILED,
            folder + "no_trainer": Outcome("passed", trainers=0),
            folder + "skipped": Outcome("skipped"),
            "tests_pytorch/models/test_hooks.py::passes": PASSED,
            "tests_pytorch/trainer/logging_/test_a.py::adds": FAILED,
        },
        {
            folder + "defect": PASSED,
            folder + "fails_in_any_case": FAILED,
            "tests_pytorch/trainer/logging_/test_a.py::adds": PASSED,
        },
        {folder + "defect": FAILED, "tests_pytorch/trainer/logging_/test_a.py::adds": PASSED},
    )
    shown = table(found).splitlines()
    assert shown[2:6] == [
        "| loops | 2 | 1 | 0 | 0 | 1 |",
        "| hooks | 1 | 1 | 0 | 0 | 0 |",
        "| logging | 1 | 0 | 0 | 1 | 0 |",
        "| all | 4 | 2 | 0 | 1 | 1 |",
    ]
    assert shown[-1] == f"defect: {folder}defect: AssertionError: assert 1 == 2"
    assert [result.test for result in found if result.is_defect] == [folder + "defect"]


def test_without_sources_or_packages_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main([str(tmp_path)]) == 0
    assert "skipped: " in (said := capsys.readouterr().out)
    assert "unpack src, tests, requirements and pyproject.toml" in said
    (tmp_path / "tests" / "tests_pytorch").mkdir(parents=True)
    monkeypatch.setattr(command, "NEEDED", ("pytest", "no_such_package"))
    assert command.main([str(tmp_path), "loops"]) == 0
    assert capsys.readouterr().out == "skipped: not installed: no_such_package\n"
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tmp_path), "loop"])
    said = capsys.readouterr().err
    assert [name for name in ("loop: no such subset", *SUBSETS) if name not in said] == []


@pytest.mark.slow
def test_a_suite_of_the_same_shape_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "NEEDED", ())
    folder = tmp_path / "tests" / "tests_pytorch" / "loops"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (folder / "test_small.py").write_text(SUITE)
    kept = tmp_path / "kept"
    kept.mkdir()
    known = {"test": "tests_pytorch/loops/test_small.py::test_was_run_before", "outcome": "passed", "trainers": 1}
    (kept / "federated.jsonl").write_text(json.dumps({**known, "said": ""}) + "\n")
    assert command.main([str(tmp_path), "loops", "--keep", str(kept)]) == 1
    said = capsys.readouterr().out
    assert "| loops | 7 | 3 | 1 | 2 | 1 |" in said
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("defect")] == [
        "tests_pytorch/loops/test_small.py::test_looks_at_the_strategy"
    ]
    assert f"refused, 1: {REFUSED[0].why}" in said
    assert f"differs, 2: {BY_DESIGN.why}" in said
