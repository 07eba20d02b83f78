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


def found(kind: str, budgets: tuple[int, int], folder: Path) -> list[dict[str, Any]]:
    script = processes.HERE / "probing.py"
    processes.run([[script, kind, *budgets, folder]], [processes.environment()], folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "federated"])
def test_the_smallest_of_all_ranks(kind: str, tmp_path: Path) -> None:
    model = estimate_memory(Classifier(mlp()), vectors(2), extras=EXTRAS[kind])
    first, second = found(kind, (model.peak(60), model.peak(30)), tmp_path)
    assert first["max_batch"] == second["max_batch"] == 30
    assert (first["limited_by"], second["limited_by"]) == ("another rank", "memory")
    for rank in (first, second):
        assert rank["sizes"] == [30] * 6 + [20]  # 200 samples each


@pytest.mark.parametrize("kind", ["ddp", "federated"])
def test_one_rank_without_room_for_a_sample(kind: str, tmp_path: Path) -> None:
    first, second = found(kind, (10**8, 1000), tmp_path)
    assert "failed on another rank" in first["error"]
    assert "a step with one sample takes" in second["error"]
