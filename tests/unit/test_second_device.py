"""The library on a second device whose tensors have no contents: mixed devices, waits and copies show without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "second_device"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def test_there_are_files() -> None:
    assert FILES


@pytest.mark.parametrize("name", FILES)
def test_on_a_second_device(name: str) -> None:
    """In a process of its own, since torch cannot forget a device."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / name)],
        env={**os.environ, "FEDSCALE_SECOND_DEVICE": "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
