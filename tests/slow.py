"""Tests that take long, which `make test-fast` leaves out: of slow.txt, all that start ranks, and whoever is marked.

``python -m pytest -n 2 -p tests.slow`` runs the tests and writes slow.txt as they were; functions that did not run stay
as they are listed. Do so on a machine that does nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

LIST = Path(__file__).with_suffix(".txt")
CASE, ALL_CASES = 0.3, 1.5
"""A test function is slow if one of its cases takes this many seconds, or all of them together."""

RANKS = "dist/"
"""What all tests of this folder share takes half a minute."""

_seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
_shared: defaultdict[str, float] = defaultdict(float)


def function_of(test: str) -> str:
    """Return a test's file below tests/ and its function.

    Example:
        >>> function_of("tests/unit/test_a.py::test_b[1-2]")
        'unit/test_a.py::test_b'
    """
    return test.removeprefix("tests/").partition("[")[0]


def listed() -> set[str]:
    """Return the functions and files of slow.txt."""
    return set(LIST.read_text().split())


def is_slow(test: str, names: Collection[str]) -> bool:
    """Return whether a test is slow by these names of functions and files.

    Example:
        >>> is_slow("tests/unit/test_a.py::test_b[1-2]", {"unit/test_a.py"})
        True
    """
    function = function_of(test)
    return function.startswith(RANKS) or function in names or function.partition("::")[0] in names


def slow_of(
    seconds: Mapping[str, Mapping[str, float]], shared: Mapping[str, float], before: Collection[str] = ()
) -> list[str]:
    """Return the slow functions and files; what did not run is as before.

    Args:
        seconds: of each function's cases.
        shared: seconds of the longest setup of each file: whichever of its tests ran first, the others need it too.
        before: the list before.
    """
    files = {file for file, longest in shared.items() if longest > ALL_CASES}
    ran = {
        function for function, cases in seconds.items() if max(cases.values()) > CASE or sum(cases.values()) > ALL_CASES
    }
    kept = {name for name in before if name not in seconds and name not in shared}
    found = {name for name in ran | kept if name.partition("::")[0] not in files} | files
    return sorted(name for name in found if name.startswith(("features/", "fuzz/", "laws/", "projects/", "unit/")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what a test takes; as a plugin only."""
    function = function_of(report.nodeid)
    file = function.partition("::")[0]
    _shared[file] = max(_shared[file], report.duration if report.when == "setup" else 0.0)
    _seconds[function][report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the list; as a plugin only, and once with workers."""
    if not hasattr(session.config, "workerinput"):
        LIST.write_text("".join(f"{function}\n" for function in slow_of(_seconds, _shared, listed())))
