"""Copies of one Python do what a new Python does, and outlive the death of the one that they are copies of."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pythons


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('refused')", 1, "refused"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("input()", 1, "EOFError: EOF when reading a line"),  # nobody waits for an input that never comes
    ],
)
def test_exit_codes(program: str, code: int, error: str) -> None:
    done = pythons.run("-c", program)
    assert done.returncode == code
    assert done.stderr.strip().rpartition("\n")[2] == error


def test_a_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"], stdin=-1, stdout=-1, text=True)
    gone.wait()
    monkeypatch.setattr(pythons, "_server", functools.cache(lambda: gone))
    with pytest.raises(RuntimeError, match=r"ended with 5; the next command starts another"):
        pythons.run("-c", "pass")


def test_a_server_that_dies_fails_one_command_and_leaves_nothing(tmp_path: Path) -> None:
    pythons.run("-c", "pass")
    server, opened = pythons._server(), len(list(Path("/proc/self/fd").iterdir()))
    program = f"import os, signal; open('{tmp_path}/id', 'w').write(str(os.getpid())); os.kill(os.getppid(), 9)"
    with pytest.raises(RuntimeError, match=r"ended with -9"):
        pythons.run("-c", f"{program}; signal.pause()")
    assert server.returncode == -9  # no zombie
    with contextlib.suppress(ProcessLookupError):
        child = os.pidfd_open(int((tmp_path / "id").read_text()))
        select.select([child], [], [])  # for ever if it lives on
        os.close(child)
    assert pythons.run("-c", "print(6 * 7)").stdout == "42\n"
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
