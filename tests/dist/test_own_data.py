"""What clients' own data say of their own models does not depend on ranks, nor on a restart on other ones; nor does
what an aggregator keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six rounds, and one that was stopped on two ranks after four and went on on one and on three.

    And one of which a rank fails.
    """
    folder = tmp_path_factory.mktemp("own_data")
    runs: list[tuple[int | str, ...]] = [(1, 6, "-", "whole"), (2, 4, "-", "half")]
    runs += [(1, 6, "half", "on_1"), (3, 6, "half", "on_3")]
    runs.append((2, 4, "-", "failed", "FAILS"))
    for ended in processes.run_ranks([("own_data.py", ranks, folder, ranks, *rest) for ranks, *rest in runs], folder):
        processes.assert_well(ended)
    return folder


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


@pytest.mark.parametrize("ranks", [1, 3])
def test_personal_models_move_with_their_clients(folder: Path, ranks: int) -> None:
    own, shared, weights = torch.load(folder / "whole.pt", weights_only=True)
    assert own["round"] == shared["round"] == 5
    assert len(own["clients"]) == 9
    assert len(set(own["values"]["val_loss"].tolist())) == 9
    for left, right in zip(
        torch.load(folder / f"on_{ranks}.pt", weights_only=True), (own, shared, weights), strict=True
    ):
        assert equal(left, right)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_aggregators_state_moves_to_other_numbers_of_ranks(folder: Path, ranks: int) -> None:
    half, whole, resumed = (
        torch.load(folder / f"{name}.ckpt", weights_only=True)["federated"]["server"]["aggregator"]
        for name in ("half", "whole", f"on_{ranks}")
    )
    assert float(half.norm()) > 0
    assert not torch.equal(half, whole)
    assert torch.equal(resumed, whole)


def test_a_rank_that_fails_takes_the_others_with_it(folder: Path) -> None:
    assert (folder / "failed-1.txt").read_text() == "KeyError: 'lost'"
    assert "an exception ended the evaluation of round 1 on another rank" in (folder / "failed-0.txt").read_text()
