"""However Lightning's processes come to be, they train the same model as one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import processes
from tests.dist.conftest import Ranks, load
from tests.dist.test_ranks import TIMES, assert_same
from tests.laws import reference

NAMES = ("reset", "keep")
TRAIN = processes.HERE / "train.py"
REQUEUED = processes.HERE / "requeued.py"


def tasks(**extra: object) -> list[dict[str, str]]:
    """The environments of the two tasks of a job, each on its node, as srun sets them."""
    job = {
        "SLURM_JOB_ID": 4242,
        "SLURM_JOB_NAME": "federated",
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 1,
        "SLURM_NNODES": 2,
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": 0,
        "MASTER_PORT": processes.free_port(),
        **extra,
    }
    return [processes.environment(**job, SLURM_PROCID=task, SLURM_NODEID=task) for task in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    processes.run_well([[TRAIN, folder, "popen", 1, 1, *NAMES]], [processes.environment()], folder)
    return load(folder, 1)[0]


def assert_same_as_one_process(results: Ranks, one: dict[str, Any]) -> None:
    for name in NAMES:
        for number, rank in enumerate(results):
            assert (rank[name]["rank"], rank[name]["world_size"]) == (number, 2)
            assert_same(rank[name]["weights"], one[name]["weights"])
            for left, right in zip(rank[name]["metrics"], one[name]["metrics"], strict=True):
                assert {k: left[k] for k in left.keys() - TIMES} == {k: right[k] for k in right.keys() - TIMES}
            assert {rank for record in rank[name]["records"] for rank in record["ranks"]} == {0, 1}


def torchrun(*options: str) -> list[str]:
    port = processes.free_port()
    return ["-m", "torch.distributed.run", "--master_addr=127.0.0.1", f"--master_port={port}", *options]


# Processes that torchrun forks have imported everything; those of the command below are new ones, as usual.
FORKED = "--run-path", "--start-method=fork"


def test_torchrun_on_one_node(tmp_path: Path, one: dict[str, Any]) -> None:
    command = [*torchrun("--nproc_per_node=2", *FORKED), TRAIN, tmp_path, "popen", 2, 1, *NAMES]
    processes.run_well([command], [processes.environment()], tmp_path)
    assert_same_as_one_process(load(tmp_path, 2), one)


def test_torchrun_on_two_nodes(tmp_path: Path, one: dict[str, Any]) -> None:
    started = torchrun("--nnodes=2", "--nproc_per_node=1", *FORKED)
    processes.run_well(
        [[*started, f"--node_rank={node}", TRAIN, tmp_path, "popen", 1, 2, *NAMES] for node in range(2)],
        [processes.environment()] * 2,
        tmp_path,
    )
    assert_same_as_one_process(load(tmp_path, 2), one)


def test_the_command_under_torchrun_on_two_nodes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="pip install 'lightning-fedscale[examples]'")
    script = tmp_path / "fedscale.py"
    script.write_text("import sys\nfrom lightning_fedscale.cli import main\nsys.exit(main())\n")
    options = ["trainer.accelerator=cpu", "trainer.max_epochs=2", "model.width=8"]
    options += ["strategy.num_clients=3", "strategy.executor=sequential"]
    started = torchrun("--nnodes=2", "--nproc_per_node=1")
    together = [script, "train", *options, "trainer.num_nodes=2", "hydra.run.dir=together"]
    commands = [[*started, f"--node_rank={node}", *together] for node in range(2)]
    commands.append([script, "train", *options, "hydra.run.dir=alone"])
    ended = processes.run_well(commands, [processes.environment() for _ in commands], tmp_path)
    assert ["Run: " in each.output for each in ended] == [True, False, True]
    left, right = (
        torch.load(tmp_path / run / "checkpoints" / "epoch=1-step=2.ckpt", weights_only=True)["state_dict"]
        for run in ("together", "alone")
    )
    assert_same(left, right)
    ledgers = [json.loads((tmp_path / run / "position.json").read_text()) for run in ("together", "alone")]
    assert ledgers[0]["flops"] == ledgers[1]["flops"]


def test_slurm_on_two_nodes(tmp_path: Path, one: dict[str, Any]) -> None:
    processes.run_well([[TRAIN, tmp_path, "popen", 1, 2, *NAMES]] * 2, tasks(), tmp_path)
    assert_same_as_one_process(load(tmp_path, 2), one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    processes.run_well([[REQUEUED, folder, 1, 1]], [processes.environment()], folder)
    found: dict[str, Any] = torch.load(folder / "end-0.pt", weights_only=True)
    return found


@pytest.mark.parametrize("hears", [0, 1])
def test_a_signal_of_slurm_to_one_rank_is_one_to_all_and_the_run_goes_on_exactly(
    hears: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Lightning saves a checkpoint and has SLURM run the job again, which finds it: here at the end of the round."""
    (tmp_path / "bin").mkdir()
    scontrol, told = tmp_path / "bin" / "scontrol", tmp_path / "told"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>"{told}"\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    command = [REQUEUED, tmp_path, 1, 2]
    for one in processes.run_well([[*command, hears]] * 2, tasks(PATH=path), tmp_path):
        assert "round 2 ended" in one.output
        assert "round 3 ended" not in one.output
        assert "killed by SLURM" in one.output
    assert told.read_text() == "requeue 4242\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == saved["federated"]["round"] == 3
    processes.run_well([command] * 2, tasks(PATH=path), tmp_path)
    for rank in range(2):
        end = torch.load(tmp_path / f"end-{rank}.pt", weights_only=True)
        assert (end["resumed"], end["rounds"]) == (True, uninterrupted["rounds"])
        assert_same(end["weights"], uninterrupted["weights"])


@pytest.mark.parametrize(("rank", "what"), [(0, "data"), (1, "client")])
def test_an_exception_on_one_rank_is_one_on_all(rank: int, what: str, tmp_path: Path) -> None:
    """No rank waits for one that is gone: all stop in the same round and together write the last good checkpoint."""
    (ended,) = processes.run_ranks([("failing.py", 2, rank, what, tmp_path)], tmp_path)
    for number, one in enumerate(ended):
        assert one.code != 0
        error = "ArithmeticError" if number == rank else "RuntimeError"
        assert f"rank {number} ends in round 2: {error}" in one.output
        assert "unharmed" not in one.output
    assert "has lost its data" in ended[rank].output
    assert f"round 2: rank {rank} raised an exception" in ended[1 - rank].output
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["federated"]["round"] == 2
    for of in range(2):
        good = torch.load(tmp_path / f"good-{of}.pt", weights_only=True)
        # `on_round_end` of the second round saw the global model that the third could not change.
        assert reference.difference(checkpoint["state_dict"], good) == 0.0
