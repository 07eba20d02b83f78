"""The library on a second device whose tensors have no contents: mixed devices, waits and copies show without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

from tests import pythons

FOLDER = Path(__file__).parents[1] / "second_device"


def test_on_a_second_device() -> None:
    """In a process of its own, since torch cannot forget a device."""
    assert sorted(FOLDER.glob("test_*.py"))
    done = pythons.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", FOLDER,
        environment={**os.environ, "FEDSCALE_SECOND_DEVICE": "1"}, folder=FOLDER.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
