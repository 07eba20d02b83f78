"""Laws 1 and 4 together: neither the number of ranks nor how they train their clients matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import processes
from tests.laws import reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectorized")
    kinds = [("sequential", 1), *((executor, ranks) for executor in ("vectorized", "eager") for ranks in (1, 2, 3))]
    kinds += [("torn", 2)]
    for ended in processes.run_ranks([("vectorized.py", ranks, kind, ranks, folder) for kind, ranks in kinds], folder):
        processes.assert_well(ended)
    return folder


@pytest.mark.parametrize("executor", ["vectorized", "eager"])
def test_ranks_and_executors_agree(executor: str, folder: Path) -> None:
    expected = torch.load(folder / "sequential-1-0.pt")["weights"]
    for ranks in (1, 2, 3):
        ends = [torch.load(folder / f"{executor}-{ranks}-{rank}.pt") for rank in range(ranks)]
        assert {end["kind"] for end in ends} == {"vectorized"}
        for end in ends:
            assert reference.difference(end["weights"], ends[0]["weights"]) == 0.0
            assert reference.difference(end["weights"], expected) < 1e-9


def test_ranks_on_different_machines_choose_the_same(folder: Path) -> None:
    ends = [torch.load(folder / f"torn-2-{rank}.pt") for rank in range(2)]
    assert ends[0]["gain"] < 1.0 < ends[1]["gain"], "alone, each would have chosen another one"
    assert ends[0]["kind"] == ends[1]["kind"] is not None
    assert reference.difference(ends[0]["weights"], ends[1]["weights"]) == 0.0
