"""The record of a run: guarded checks, a budget of seconds, and the page that is written after each part."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PASS, FAIL, INFO, SKIP = "PASS", "FAIL", "INFO", "SKIP"

NOT_SHOWN = (
    "several GPUs: one process per device, and clients' states that move between devices",
    "NCCL: it refuses one GPU for two processes, which therefore talk over gloo",
    "NVLink: the speed of the collective, and of states that move",
    "MIG: a slice of a device, its free memory and its energy counter",
)
"""What one device cannot show."""


class Found(NamedTuple):
    """The result of a check.

    Attributes:
        text: what was found.
        good: whether it is as expected; None for a number that is only reported.
    """

    text: str
    good: bool | None = None


class Row(NamedTuple):
    """A line of the table."""

    part: str
    check: str
    verdict: str
    found: str
    expected: str
    seconds: float


class TimeIsUp(BaseException):
    """Ends a check at the end of its part.

    It is no Exception, so that neither Lightning nor the executor takes it for an error of the module.
    """


Alarm = Callable[[float], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the main thread after so many seconds inside the context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """Runs checks within a budget of seconds, prints a line for each, and writes the page.

    Args:
        output: the page; its numbers are stored beside it as JSON.
        seconds: budget of the whole run. A part may use its share, and what earlier parts left.
        facts: device and versions.
        now: the clock, in seconds.
        alarm: interrupts a check that outlasts its part.
    """

    def __init__(
        self,
        output: Path,
        seconds: float,
        facts: dict[str, str],
        now: Callable[[], float] = time.monotonic,
        alarm: Alarm = alarm,
    ) -> None:
        self._output, self._facts, self._now, self._alarm = output, facts, now, alarm
        self._begun, self._seconds = now(), seconds
        self._end, self._part = self._begun + seconds, ""
        self.rows: list[Row] = []

    @contextlib.contextmanager
    def part(self, title: str, until: float) -> Iterator[None]:
        """Run a part of the checks, which ends at this share of the budget at the latest; write the page after it."""
        self._part, self._end = title, self._begun + until * self._seconds
        print(f"\n## {title}", flush=True)
        try:
            yield
        except Exception as error:
            self._add("the part itself", FAIL, last_line(error), "no error", 0.0)
        finally:
            self.write()

    @property
    def left(self) -> float:
        """Seconds left for this part."""
        return self._end - self._now()

    def check(self, name: str, expected: str, function: Callable[[], Found]) -> None:
        """Run a check and add its row: an exception is a FAIL, and a check without time for it is a SKIP."""
        if self.left <= 0:
            self._add(name, SKIP, "no time left", expected, 0.0)
            return
        begun = self._now()
        try:
            with self._alarm(self.left):
                found = function()
            verdict = INFO if found.good is None else PASS if found.good else FAIL
            text = found.text
        except TimeIsUp:
            verdict, text = SKIP, "cut off: no time left"
        except Exception as error:
            verdict, text = FAIL, last_line(error)
        except SystemExit as error:
            verdict, text = FAIL, f"SystemExit: {error.code}"
        self._add(name, verdict, text, expected, self._now() - begun)

    def skip(self, name: str, reason: str) -> None:
        """Add the row of a check that has no meaning here."""
        self._add(name, SKIP, reason, "", 0.0)

    def _add(self, check: str, verdict: str, found: str, expected: str, seconds: float) -> None:
        row = Row(self._part, check, verdict, found, expected, round(seconds, 2))
        self.rows.append(row)
        print(f"{verdict} {check}: {found}" + (f" (expected: {expected})" if expected else ""), flush=True)

    def write(self) -> None:
        """Write the page and the JSON beside it."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Any] = {
            **self._facts,
            "seconds": round(self._now() - self._begun, 1),
            "rows": [row._asdict() for row in self.rows],
            "not_shown": NOT_SHOWN,
        }
        self._output.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n")
        self._output.write_text(page(self.rows, self._facts, stored["seconds"]))


def last_line(error: BaseException) -> str:
    """The type of an error and the last line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"[:300]


def page(rows: list[Row], facts: dict[str, str], seconds: float) -> str:
    """The table in Markdown."""
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, FAIL, INFO, SKIP)}
    lines = ["# On a device\n", "Made by `make gpu`: " + ", ".join(f"{key} {value}" for key, value in facts.items())]
    lines.append(f"\n{', '.join(f'{number} {verdict}' for verdict, number in count.items())}; {seconds:.0f} seconds.")
    for part in dict.fromkeys(row.part for row in rows):
        lines += [f"\n## {part}\n", "| | check | found | expected | seconds |", "|---|---|---|---|---:|"]
        lines += [
            f"| {row.verdict} | {cell(row.check)} | {cell(row.found)} | {cell(row.expected)} | {row.seconds:.1f} |"
            for row in rows
            if row.part == part
        ]
    skipped = [f"- {row.part}: {row.check} ({row.found})" for row in rows if row.verdict == SKIP]
    lines += ["\n## Skipped\n", *(skipped or ["Nothing."])]
    lines += ["\n## What one device cannot show\n", *(f"- {each}" for each in NOT_SHOWN)]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
