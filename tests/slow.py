"""Tests that take long, which `make test-fast` leaves out: those of slow.txt, and whoever is marked ``slow``.

``python -m pytest -n 2 -p tests.slow`` runs the tests and writes slow.txt as they were; functions that did not run stay
as they are listed. Do so on a machine that does nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

LIST = Path(__file__).with_suffix(".txt")
CASE, ALL_CASES = 0.5, 2.5
"""A test function is slow if one of its cases takes this many seconds, or all of them together."""

_seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))


def function_of(test: str) -> str:
    """Return a test's file below tests/ and its function.

    Example:
        >>> function_of("tests/unit/test_a.py::test_b[1-2]")
        'unit/test_a.py::test_b'
    """
    return test.removeprefix("tests/").partition("[")[0]


def listed() -> set[str]:
    """Return the functions of slow.txt."""
    return set(LIST.read_text().split())


def slow_of(seconds: Mapping[str, Mapping[str, float]], before: Collection[str] = ()) -> list[str]:
    """Return the slow functions, of the seconds of each function's cases; those that did not run are as before."""
    ran = {
        function
        for function, cases in seconds.items()
        if function.startswith(("dist/", "features/", "fuzz/", "laws/", "projects/", "unit/"))
        and (max(cases.values()) > CASE or sum(cases.values()) > ALL_CASES)
    }
    return sorted(ran | (set(before) - seconds.keys()))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what a test takes; as a plugin only."""
    _seconds[function_of(report.nodeid)][report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the list; as a plugin only, and once with workers."""
    if not hasattr(session.config, "workerinput"):
        LIST.write_text("".join(f"{function}\n" for function in slow_of(_seconds, listed())))
