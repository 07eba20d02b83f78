"""Several Trainers of one script: any number of processes draws, trains and decides as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import processes
from tests.dist.test_ranks import TIMES, assert_same

REPETITIONS = range(2)


def run(folder: Path, start_method: str, devices: int, ranks: int = 1, repetitions: int = 2) -> list[dict[str, Any]]:
    (ended,) = processes.run_ranks([("several.py", ranks, folder, start_method, devices, repetitions)], folder)
    processes.assert_well(ended)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("several-*.pt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run(tmp_path_factory.mktemp("one"), "popen", 1)
    return found


def test_repetitions_after_one_seed_differ(one: dict[str, Any]) -> None:
    losses = {one[f"loss {repetition}"] for repetition in REPETITIONS}
    assert len(losses) == len(REPETITIONS)


def test_two_processes_draw_train_and_validate_as_one_does(one: dict[str, Any], tmp_path: Path) -> None:
    """Also where their clocks disagree on when it is time to validate."""
    ranks = run(tmp_path, "popen", 2, ranks=2)
    assert len(ranks) == 2
    for found in ranks:
        for repetition in REPETITIONS:
            assert_same(found[f"fit {repetition}"], one[f"fit {repetition}"])
            assert found[f"validated {repetition}"] == one[f"validated {repetition}"] == [2, 4, 6]
            assert found[f"loss {repetition}"] == pytest.approx(one[f"loss {repetition}"], rel=1e-6)
        assert torch.equal(found["drawn"], one["drawn"])


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_other_processes_get_strategy_and_callbacks(start_method: str, one: dict[str, Any], tmp_path: Path) -> None:
    """By pickling, with "spawn"; with "fork" a second Trainer uses the same object.

    Weights and metrics come back; what callbacks note stays in the other processes, as with Lightning's DDP.
    """
    (main,) = run(tmp_path, start_method, 2, repetitions=1)
    assert not main["validated 0"]  # it did not train itself
    assert_same(main["fit 0"], one["fit 0"])
    of_rounds = {name for name in one["logged 0"] if name.startswith("round/")} - TIMES
    assert of_rounds
    for name in of_rounds:
        assert main["logged 0"][name] == pytest.approx(one["logged 0"][name], rel=1e-6)
    if start_method == "fork":
        assert main["loss 0"] == pytest.approx(one["loss 0"], rel=1e-6)
