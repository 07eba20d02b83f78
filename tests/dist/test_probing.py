"""All ranks train with the batch that fits on every one of them, and a rank that fails does not keep the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_fedscale.devices import SIMULATED, estimate_memory
from tests.dist import processes
from tests.networks import Classifier, mlp, vectors

EXTRAS = {"ddp": {"gradient buckets": 4}, "federated": SIMULATED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, runs = tmp_path_factory.mktemp("probing"), []
    for kind, extras in EXTRAS.items():
        model = estimate_memory(Classifier(mlp()), vectors(2), extras=extras)
        for name, budgets, use in (
            ("enough", (model.peak(60), model.peak(30)), "apply"),
            ("none", (10**8, 1000), "apply"),
            ("none but asked", (10**8, 1000), "report"),
        ):
            (into := folder / f"{kind}-{name}").mkdir()
            runs.append(("probing.py", 2, kind, *budgets, use, into))
    processes.run_ranks(runs, folder)
    return folder


def found(folder: Path, kind: str, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{kind}-{name}" / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "federated"])
def test_the_smallest_of_all_ranks(kind: str, folder: Path) -> None:
    first, second = found(folder, kind, "enough")
    assert first["max_batch"] == second["max_batch"] == 30
    assert (first["limited_by"], second["limited_by"]) == ("another rank", "memory")
    for rank in (first, second):
        assert rank["sizes"] == [30] * 6 + [20]  # 200 samples each


@pytest.mark.parametrize("kind", ["ddp", "federated"])
def test_one_rank_without_room_for_a_sample(kind: str, folder: Path) -> None:
    first, second = found(folder, kind, "none")
    assert "MaxBatchProbe: the probe failed on rank" in first["error"]
    assert "a step with one sample takes" in second["error"]


@pytest.mark.parametrize("kind", ["ddp", "federated"])
def test_one_rank_that_fails_and_only_reports_ends_no_training(kind: str, folder: Path) -> None:
    first, second = found(folder, kind, "none but asked")
    (line,) = (line for line in first["told"] if "MaxBatchProbe" in line)
    assert "MaxBatchProbe: nothing was probed" in line
    assert "failed on rank 1: budget=" in line
    assert line.count("MaxBatchProbe: ") == 1
    assert not any("MaxBatchProbe" in line for line in second["told"])  # one line for all ranks
    for rank in (first, second):
        assert rank["sizes"] == [4] * 50
