"""Groups of processes are dear: each is started once, runs everything, and many tests look at what it saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from tests.dist import processes, scenarios

Ranks: TypeAlias = list[dict[str, Any]]
"""For each rank, what `scenarios.fit` returned by name of the scenario."""


def load(folder: Path, world_size: int) -> Ranks:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """All scenarios on a number of ranks, started by Lightning's popen."""

    @cache
    def started(world_size: int) -> Ranks:
        folder = tmp_path_factory.mktemp(f"ranks-{world_size}")
        command = [processes.HERE / "train.py", folder, "popen", world_size, 1, *scenarios.SCENARIOS]
        processes.run_well([command], [processes.environment()], folder)
        return load(folder, world_size)

    return started
