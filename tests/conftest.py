"""Every test runs in its own empty folder and leaves the process as it found it."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from absl import logging as absl_logging
from hypothesis import HealthCheck, settings
from lightning.fabric.utilities import registry

from tests import clock as clocks
from tests import slow

# Of dp-accounting. It keeps the first error stream that it sees, which is pytest's, and closes it as soon as Hydra sets
# up logging anew; Python's own it leaves open.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# Every Trainer asks for them, and Python would read the metadata of all packages each time.
vars(registry)["entry_points"] = functools.cache(entry_points)

# No test may fail by the clock, and the same commit must always give the same verdict.
settings.register_profile(
    "lightning_fedscale", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lightning_fedscale")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long."""
    names = slow.listed()
    for item in items:
        if slow.is_slow(item.nodeid, names):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what stays for good: millions of objects of torch and of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and checkpoints never land in the source tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """One thread, no screen; afterwards no process group and none of the variables that Lightning sets."""
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, MPLBACKEND="Agg"):
        yield
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> clocks.Clock:
    """Times that the package and Lightning measure are counts: no warning depends on the machine."""
    return clocks.install(monkeypatch.setattr)
