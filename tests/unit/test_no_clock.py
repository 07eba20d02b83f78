"""No test asks what time it is, waits for a while, or ends something after a while: under load it would fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MAY = {
    "browser.py": "asks a page again and again until it is there, without a limit",
    "clock.py": "is the clock",
    "compat.py": "says how long a command took",
    "dist/several.py": "gives the Trainer a clock that it moves itself",
    "laws/test_captured_steps.py": "steps that read the time, which must not be captured",
    "unit/test_guards.py": "code that reads the time, which cannot be guarded",
    "lightning_suite/__main__.py": "ends a test of somebody else's that trains for ever",
    "projects/from_nothing.py": "says how long a command took",
    "unit/test_no_clock.py": "names what is forbidden",
}
"""Files that do, and why no verdict depends on it."""

# In the text, so that programs which a test writes and runs are searched too.
READS = re.compile(
    r"\b(?:perf_counter|monotonic|process_time|thread_time|getrusage|psutil|timeit|utcnow|setitimer)(?:_ns)?\b"
    r"|\btime\.time(?:_ns)?\b|\bsleep\(|\b(?:datetime|date)\.(?:now|today)\(|\bsignal\.alarm\b|\bthreading\.Timer\b"
    r"|\bmark\.timeout\b|\bfrom time import\b"
)
# Calls that wait for another process or thread, and how many arguments each has before its limit.
WAITS = {
    "acquire": 1, "call": None, "check_call": None, "check_output": None, "communicate": 1, "get": None, "join": 0,
    "open": None, "result": 0, "run": None, "select": 3, "urlopen": 2, "wait": 0, "wait_for": 1,
}  # fmt: skip


def reads(source: str) -> list[str]:
    """Where a source reads a clock."""
    return [f"{n}: {line.strip()}" for n, line in enumerate(source.splitlines(), 1) if READS.search(line)]


def limits(source: str) -> list[str]:
    """Where a source sets a limit to how long something may take."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in WAITS:
            continue
        before = WAITS[name] if isinstance(node.func, ast.Attribute) else None
        given = before is not None and len(node.args) > before and _is_number(node.args[before])
        if given or any(keyword.arg == "timeout" for keyword in node.keywords):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def test_the_clock_of_the_machine_plays_no_part() -> None:
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        source, name = path.read_text("utf8"), path.relative_to(TESTS).as_posix()
        if lines := [*(reads(source) if name not in MAY else []), *limits(source)]:
            found[name] = lines
    assert found == {}, "take the fixture `clock` for times, and leave limits to pytest's own"
    assert all((TESTS / name).is_file() for name in MAY)


def test_the_one_limit_is_generous(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) >= 1800


@pytest.mark.parametrize(
    "source",
    [
        "started = time.perf_counter()", "now = time.time()", "from time import perf_counter_ns", "time.sleep(1)",
        'CODE = """\nimport time\ntime.sleep(0.1)\n"""', "datetime.now()", "@pytest.mark.timeout(5)",
        "resource.getrusage(resource.RUSAGE_SELF)", "from time import time",
    ],
)  # fmt: skip
def test_what_reads_a_clock_is_found(source: str) -> None:
    assert reads(source)


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(command, timeout=280)", "process.wait(10)", "thread.join(5.0)", "opener.open(url, timeout=5)",
        "subprocess.check_output(command, timeout=LIMIT)", "select.select([pipe], [], [], 3)", "queue.get(timeout=1)",
    ],
)  # fmt: skip
def test_what_sets_a_limit_is_found(source: str) -> None:
    assert limits(source)


@pytest.mark.parametrize(
    "source",
    [
        "process.wait()", "', '.join(names)", "subprocess.run(command, check=True)", "clock.now += 60",
        "sequential(timeout=timedelta(minutes=1))", "Timer('00:00:01')", "records[0].seconds", "result(0.9)",
    ],
)  # fmt: skip
def test_anything_else_is_not(source: str) -> None:
    assert not reads(source)
    assert not limits(source)
