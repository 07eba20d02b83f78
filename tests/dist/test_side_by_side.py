"""Laws 1 and 4 together: neither the number of ranks nor how they train their clients matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import processes
from tests.laws import reference


@pytest.mark.parametrize("executor", ["vectorized", "auto"])
def test_ranks_and_executors_agree(executor: str, tmp_path: Path) -> None:
    for kind, ranks in (("sequential", 1), (executor, 1), (executor, 2), (executor, 3)):
        script = processes.HERE / "side_by_side.py"
        processes.run_well([[script, kind, ranks, tmp_path]], [processes.environment()], tmp_path)
    expected = torch.load(tmp_path / "sequential-1-0.pt")["weights"]
    for ranks in (1, 2, 3):
        ends = [torch.load(tmp_path / f"{executor}-{ranks}-{rank}.pt") for rank in range(ranks)]
        assert {end["kind"] for end in ends} == {"vectorized"}
        for end in ends:
            assert reference.difference(end["weights"], ends[0]["weights"]) == 0.0
            assert reference.difference(end["weights"], expected) < 1e-9
