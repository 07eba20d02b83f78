"""`make gpu`: the script runs to its end on the CPU, and its guard and budget of seconds hold whatever checks do."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import FAIL, INFO, NOT_SHOWN, PASS, SKIP, Found, Record, TimeIsUp, alarm
from benchmarks.gpu.waits import Share, shares, watching
from tests import pythons


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    # So many seconds that nothing is cut off on a busy machine.
    options = ["--device", "cpu", "--fast", "--seconds", "100000", "--output", str(page)]
    done = pythons.run("-m", "benchmarks.gpu", *options, folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    stored = json.loads(page.with_suffix(".json").read_text())
    rows = stored["rows"]
    assert [row for row in rows if row["verdict"] == FAIL] == []
    assert [row for row in rows if row["verdict"] == SKIP and "time" in row["found"]] == []
    ran = Counter(row["part"] for row in rows if row["verdict"] in (PASS, INFO))
    assert set(script.PARTS) - set(ran) == {"Waits for the device"}  # a CPU has none
    vectorized = [row["found"] for row in rows if row["check"].startswith("executors")]
    assert len(vectorized) == 8
    assert all("vectorized" in found for found in vectorized)
    assert stored["device"] == "cpu"
    assert stored["torch"] == torch.__version__
    written = page.read_text()
    for row in rows:
        assert f"| {row['verdict']} | {row['check']} |" in written
        assert f"{row['verdict']} {row['check']}: " in done.stdout
    assert all(each in written and each in done.stdout for each in NOT_SHOWN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--output", str(tmp_path / "gpu.md")])
    assert capsys.readouterr().out == "There is no CUDA device here: nothing was run.\n"
    assert not list(tmp_path.iterdir())


class Seconds:
    """A clock that checks move, and an alarm that rings by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> Found:
        """A check that takes so long."""
        self.now += seconds
        return Found("done", good=True)

    @contextlib.contextmanager
    def alarm(self, seconds: float) -> Iterator[None]:
        """Ends what took longer."""
        end = self.now + seconds
        yield
        if self.now > end:
            self.now = end
            raise TimeIsUp


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def record(tmp_path: Path, seconds: Seconds) -> Record:
    return Record(tmp_path / "gpu.md", 100.0, {"device": "made up"}, seconds, seconds.alarm)


def test_a_failure_is_a_row_and_the_rest_runs(record: Record, tmp_path: Path) -> None:
    def broken() -> Found:
        raise ValueError("first line\nlast | line\n")

    with record.part("one", until=0.5):
        record.check("broken", "no error", broken)
        record.check("wrong", "2", lambda: Found("1", good=False))
        record.check("exit", "", lambda: exit("no"))
        record.check("right", "1", lambda: Found("1", good=True))
        record.check("reported", "", lambda: Found("3"))
        raise RuntimeError("between two checks")
    with record.part("two", until=1.0):
        record.check("next", "1", lambda: Found("1", good=True))
    verdicts = [(row.check, row.verdict, row.found) for row in record.rows]
    assert verdicts == [
        ("broken", FAIL, "ValueError: last | line"),
        ("wrong", FAIL, "1"),
        ("exit", FAIL, "SystemExit: no"),
        ("right", PASS, "1"),
        ("reported", INFO, "3"),
        ("the part itself", FAIL, "RuntimeError: between two checks"),
        ("next", PASS, "1"),
    ]
    assert "| FAIL | broken | ValueError: last \\| line | no error | 0.0 |" in (tmp_path / "gpu.md").read_text()


def test_parts_end_in_time_and_what_was_left_out_is_listed(record: Record, seconds: Seconds, tmp_path: Path) -> None:
    with record.part("one", until=0.3):
        record.check("short", "", lambda: seconds.take(20))
        record.check("long", "", lambda: seconds.take(1000))
        record.check("late", "", lambda: seconds.take(1))
    assert seconds.now == 30.0
    with record.part("two", until=0.5):
        record.check("quick", "", lambda: seconds.take(5))
    with record.part("three", until=1.0):  # has what the second part left, too
        record.check("as long as is left", "", lambda: seconds.take(65))
    assert [row.verdict for row in record.rows] == [PASS, SKIP, SKIP, PASS, PASS]
    assert [row.seconds for row in record.rows] == [20.0, 10.0, 0.0, 5.0, 65.0]
    skipped = (tmp_path / "gpu.md").read_text().split("## Skipped\n")[1].split("##")[0]
    assert skipped.split("\n- ")[1:] == ["one: long (cut off: no time left)", "one: late (no time left)\n\n"]


def test_the_page_is_written_after_each_part_even_if_the_next_is_interrupted(record: Record, tmp_path: Path) -> None:
    def interrupted() -> Found:
        raise KeyboardInterrupt

    with record.part("one", until=0.5):
        record.check("first", "", lambda: Found("1", good=True))
    assert "| PASS | first |" in (tmp_path / "gpu.md").read_text()

    def second_part() -> None:
        with record.part("two", until=1.0):
            record.check("second", "", lambda: Found("2", good=True))
            record.check("third", "", interrupted)

    with pytest.raises(KeyboardInterrupt):
        second_part()
    assert "| PASS | second |" in (tmp_path / "gpu.md").read_text()


def test_the_alarm_ends_what_does_not_end() -> None:
    def endless() -> None:
        with alarm(0.01):
            while True:
                with contextlib.suppress(Exception):  # as the library does around a user's module
                    threading.Event().wait()

    with pytest.raises(TimeIsUp):
        endless()


def test_the_alarm_is_off_after_its_context() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with alarm(1000.0):
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_waits_are_divided_among_their_causes() -> None:
    assert shares(lambda clients, batches: 7 + 2 * clients + 3 * clients * batches) == Share(3.0, 2.0, 7.0)


def test_only_warnings_about_waits_are_counted() -> None:
    places = Counter[str]()
    with watching(places, Machine("cpu", fast=True)):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert places == {"elsewhere": 1}
