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
    """All scenarios on a number of ranks: two are started by Lightning's popen, three as torchrun would."""

    @cache
    def started(world_size: int) -> Ranks:
        folder = tmp_path_factory.mktemp(f"ranks-{world_size}")
        everything = folder, "popen", world_size, 1, *scenarios.SCENARIOS
        if world_size <= 2:
            processes.run_well([[processes.HERE / "train.py", *everything]], [processes.environment()], folder)
        else:
            (ended,) = processes.run_ranks([("train.py", world_size, *everything)], folder)
            processes.assert_well(ended)
        return load(folder, world_size)

    return started
