"""What clients' own data say of their own models does not depend on ranks, nor on a restart on other ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import processes


def run(folder: Path, *arguments: object) -> None:
    processes.run_well([[processes.HERE / "own_data.py", folder, *arguments]], [processes.environment()], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six rounds, and one that was stopped on two ranks after four and went on on one and on three."""
    folder = tmp_path_factory.mktemp("own_data")
    run(folder, 1, 6, "-", "whole")
    run(folder, 2, 4, "-", "half")
    for ranks in (1, 3):
        run(folder, ranks, 6, "half", f"on_{ranks}")
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
    for left, right in zip(torch.load(folder / f"on_{ranks}.pt", weights_only=True), (own, shared, weights), strict=True):
        assert equal(left, right)


def test_a_rank_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    run(tmp_path, 2, 4, "-", "failed", "FAILS")
    assert (tmp_path / "failed-1.txt").read_text() == "KeyError: 'lost'"
    assert "an exception ended the evaluation of round 1 on another rank" in (tmp_path / "failed-0.txt").read_text()
