"""Plain DDP with CriticalPhase and ComputeAccounting trains as one process with as large a batch; ranks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import phases, processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("phases")
    (ended,) = processes.run_ranks([("phases.py", 2, 2, folder)], folder)
    processes.assert_well(ended)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks_decide_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["rows"].nan_to_num(), second["rows"].nan_to_num())
    assert first["spans"] == second["spans"]
    assert first["noise"] == second["noise"]
    assert first["ledger"] == second["ledger"]


def test_two_ranks_are_one_with_twice_the_batch(ranks: list[dict[str, Any]]) -> None:
    # DDP gives the ranks every other sample; the batches of both together are those of one process.
    alone = phases.run(1)
    assert len({tuple(span) for span in alone["spans"]}) > 1  # phases came and went
    assert torch.allclose(ranks[0]["rows"].nan_to_num(), alone["rows"].nan_to_num(), rtol=1e-5)
    assert ranks[0]["spans"] == alone["spans"]
    batches = {"steps": 2 * alone["ledger"]["steps"], "counted": 2 * alone["ledger"]["counted"]}  # of half the size
    assert ranks[0]["ledger"] == {**alone["ledger"], **batches}
    assert ranks[0]["position"] == alone["position"]
    assert torch.allclose(ranks[0]["weights"], alone["weights"], rtol=1e-9)


def test_the_noise_is_that_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    # Halves differ, since ranks cut batches of their own, but the same quantities are measured.
    square, trace, looks = ranks[0]["noise"]
    alone = phases.run(1)["noise"]
    assert looks == alone[2] == 30
    assert square == pytest.approx(alone[0], rel=0.5)
    assert trace == pytest.approx(alone[1], rel=0.25)


def test_several_optimizers_are_judged_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["two"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["rows"], second["rows"])
    alone = phases.run_two_optimizers(1)
    assert first["spans"] == second["spans"] == alone["spans"] != []
    assert len(alone["rows"]) == 44  # of 30 steps of one and 15 of the other, every four
    assert torch.allclose(first["rows"], alone["rows"], rtol=1e-5)
    assert torch.allclose(first["weights"], alone["weights"], rtol=1e-9)
