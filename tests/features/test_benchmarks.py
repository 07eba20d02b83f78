"""The benchmark's own loops, referee and judgements; peers are left out, for they need environments of their own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report, tasks
from benchmarks.contenders import BY_NAME, Contender
from benchmarks.contest import Task, Turns
from benchmarks.goals import Goal, verdict
from benchmarks.referee import Result, compete
from tests import pythons

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="contenders are pinned to a core as Linux does it")
DIGITS = ("floor", "tuned", "loaders", "trainer", "auto", "sequential", "vectorized")


@pytest.mark.slow
def test_our_own_contenders_compete_on_digits(tmp_path: Path) -> None:
    command = ["--fast", "--tasks", "digits", "--contenders", ",".join(DIGITS), "--output", str(tmp_path)]
    done = pythons.run("-m", "tests.features.forked_contest", *command, folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    section = json.loads((tmp_path / "benchmarks.json").read_text())["sections"]["digits"]
    rows = {row["name"]: row for row in section["rows"]}
    assert tuple(rows) == DIGITS
    for row in rows.values():
        assert not row["not_run"]
        assert not row["refused"]
        assert row["seconds"][0] > 0
        assert row["accuracy"][0] > 0.8  # the two turns of a fast run are 72 rounds with the warm-up
    # The same algorithm on the same batches, written in two ways.
    assert rows["tuned"]["accuracy"] == rows["floor"]["accuracy"]
    table = (tmp_path / "benchmarks.md").read_text()
    assert all(row["label"] in table for row in rows.values())
    assert "| digits: at most 0.4 of pfl |  | not run: pfl did not take part |" in table
    assert table.split("## Digits")[1].strip() in done.stdout


@pytest.mark.parametrize("data", [tasks.digits, tasks.images, lambda: tasks.vectors(100, 10)])
def test_every_class_and_sample_has_its_place(data: Callable[[], tasks.Data]) -> None:
    made = data()
    assert set(made.labels) == set(made.test_labels) == set(range(10))
    assert sorted(np.concatenate(made.clients)) == list(range(len(made.labels)))
    assert np.isfinite(made.inputs).all()


def test_a_task_survives_its_file(tmp_path: Path) -> None:
    prepared = tasks.prepare("digits", tasks.RECIPES["digits"], fast=True)
    prepared.task.save(str(tmp_path / "task.npz"))
    loaded = Task.load(str(tmp_path / "task.npz"))
    assert loaded.settings == prepared.task.settings
    assert loaded.cohorts.shape == (loaded.turns.total, 10)
    assert all((np.diff(cohort) > 0).all() for cohort in loaded.cohorts)
    for name, value in prepared.task.initial.items():
        np.testing.assert_array_equal(loaded.initial[name], value)


def test_one_that_fails_does_not_run_and_the_others_do() -> None:
    recipe = tasks.RECIPES["digits"]._replace(turns=Turns(warm_up=1, number=2, rounds=1))
    broken = Contender("broken", "broken", "floor", "benchmarks.floors", {"loop": "no such loop"})
    results = compete(tasks.prepare("digits", recipe), [BY_NAME["floor"], broken], 1, lambda text: None)
    assert results["broken"].failure == "KeyError: 'no such loop'"
    assert len(results["floor"].medians) == 1


def result(*accuracy: float, failure: str = "") -> Result:
    ones = [1.0] * len(accuracy)
    return Result([[one] for one in ones], ones, ones, list(accuracy), [], {}, failure)


@pytest.mark.parametrize(
    ("floor", "mine", "refused"),
    [
        ([0.90, 0.91, 0.92], [0.91, 0.90, 0.90], False),
        ([0.90, 0.91, 0.92], [0.80, 0.81, 0.79], True),
        ([0.90, 0.91, 0.92], [0.98, 0.99, 0.98], True),  # better is no more the same training than worse
        ([0.70, 0.90, 0.80], [0.70, 0.70, 0.70], False),  # the floor itself is as far off from seed to seed
        ([0.90], [0.85], False),  # one repeat says little
        ([0.90], [0.50], True),
    ],
)
def test_only_equal_accuracy_counts(floor: list[float], mine: list[float], refused: bool) -> None:
    results = {"floor": result(*floor), "tuned": result(*mine), "trainer": result(*mine)}
    assert bool(report.refusal(BY_NAME["tuned"], results, test_labels=1000)) is refused
    assert not report.refusal(BY_NAME["trainer"], results, test_labels=1000)  # central training is another thing


def test_what_is_spent_once_is_told_apart_from_the_rounds() -> None:
    warmed_up = result(0.9, 0.9, 0.9)._replace(warm_up=[31.0, 33.0, 32.0])  # of rounds that take a second later on
    assert report.once(warmed_up, Turns(warm_up=30, number=1, rounds=1)) == 3.0
    assert report.once(result(failure="not installed"), Turns(warm_up=30, number=1, rounds=1)) is None


def test_without_a_floor_nothing_counts() -> None:
    results = {"floor": result(failure="not installed"), "tuned": result(0.9)}
    assert "no floor" in report.refusal(BY_NAME["tuned"], results, test_labels=1000)


def section(**rows: dict[str, Any]) -> dict[str, Any]:
    blank = {"not_run": "", "refused": "", "start_up": [1.0], "utilisation": []}
    return {"digits": {"rows": [{"name": name, **blank, **row} for name, row in rows.items()]}}


@pytest.mark.parametrize(
    ("sections", "measured", "word"),
    [
        (
            section(auto={"seconds": [1.0, 2.0, 9.0]}, floor={"seconds": [2.0, 4.0, 2.0]}),
            "0.50",
            "met (3 of 5 repeats)",
        ),
        (section(auto={"seconds": [2.8]}, floor={"seconds": [2.0]}), "1.40", "**missed** by a factor of 2.00"),
        (section(auto={"seconds": [1.0], "refused": "worse"}, floor={"seconds": [2.0]}), "", "not judged: auto is"),
        (section(auto={"seconds": [], "not_run": "no CUDA"}, floor={"seconds": [2.0]}), "", "not run: auto: no CUDA"),
        (section(floor={"seconds": [2.0]}), "", "not run: auto did not take part"),
        ({"digits": {"not_run": "no data", "rows": []}}, "", "not run: no data"),
        ({}, "", "not run"),
    ],
)
def test_goals_are_judged_by_what_was_measured(sections: dict[str, Any], measured: str, word: str) -> None:
    found = verdict(Goal("fast", "digits", "auto", "floor", "at most", 0.7), sections)
    assert found.measured == measured
    assert found.word.startswith(word)


def test_only_a_full_run_of_unchanged_sources_counts_without_reservation() -> None:
    goal = Goal("fast", "digits", "auto", "floor", "at most", 0.7)
    full = section(auto={"seconds": [1.0] * 5}, floor={"seconds": [2.0] * 5})
    assert verdict(goal, full).word == "met"
    full["digits"]["source_changed"] = True
    assert verdict(goal, full).word == "met (the sources changed meanwhile)"


def test_a_goal_may_ask_for_a_measure_itself() -> None:
    goal = Goal("busy", "digits", "auto", "", "at least", 0.85, "utilisation")
    busy = section(auto={"seconds": [1.0], "utilisation": [0.9]})
    assert verdict(goal, busy) == ("0.90", "met (1 of 5 repeats)")
    assert verdict(goal, section(auto={"seconds": [1.0]})).word == "not judged: no utilisation was measured"


def test_the_probe_is_compared_with_the_truth(tmp_path: Path) -> None:
    table = tmp_path / "probe.md"
    command = [
        "-m",
        "benchmarks.probe",
        "--models",
        "gpt",
        "--budget",
        str(2**25),
        "--output",
        str(table),
    ]
    done = pythons.run(*command, folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| gpt")]
    batches = {how.split(",")[0] + how.split(",")[1][:6]: batch for _, how, batch, *_ in rows}
    true = int(batches["truth by bi"])
    assert 0.6 * true <= int(batches["MaxBatchProbe verif"]) <= true
    # In so little memory Lightning's own search may fail, at an error that it does not take for out-of-memory.
    assert batches["BatchSizeFinder power"] == "none" or int(batches["BatchSizeFinder power"]) <= true


@pytest.mark.parametrize(
    ("name", "bars", "more"),
    [
        ("phases", 30, []),
        ("phase_study", 30, ["--workers", "1"]),
        ("accounting", 30, []),
        ("sizing", 23, ["--tasks", "digits", "--folder", "runs"]),  # a row of one task, below its head
    ],
)
def test_other_benchmarks_run(name: str, bars: int, more: list[str], tmp_path: Path) -> None:
    more = [str(tmp_path / each) if each == "runs" else each for each in more]
    command = ["-m", f"benchmarks.{name}", "--fast", "--output", str(tmp_path), *more]
    done = pythons.run(*command, folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / f"{name}.md").read_text()
    assert report.count("|") > bars
    for picture in re.findall(r"\]\((.*\.png)\)", report):
        assert (tmp_path / picture).stat().st_size > 10_000
