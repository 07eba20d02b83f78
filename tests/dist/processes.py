"""Starting scripts as real processes, so that none outlives its test and none can hang it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import pythons

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

# What Lightning, torchrun and SLURM tell processes about each other: a test says it itself or not at all.
_ABOUT_OTHERS = ("SLURM_", "TORCHELASTIC_", "PL_", "OMPI_", "PMI_", "GROUP_", "ROLE_")
_ABOUT_OTHERS_EXACTLY = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)


class Finished(NamedTuple):
    """How a process ended."""

    code: int
    output: str


_RESERVED: list[socket.socket] = []


def free_port() -> int:
    """A port on this machine that nobody listens on, and that no other process is given before this one ends.

    The socket stays bound and never listens: a server that sets SO_REUSEADDR, as all do here, can still have the port.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    _RESERVED.append(bound)
    port: int = bound.getsockname()[1]
    return port


def environment(**extra: object) -> dict[str, str]:
    """The present environment without a word about other processes, but for a free port, and with one thread."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _ABOUT_OTHERS_EXACTLY and not name.startswith(_ABOUT_OTHERS)
    }
    kept.update(
        PYTHONPATH=str(REPOSITORY),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    kept.update({name: str(value) for name, value in extra.items()})
    return kept


def run(
    commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]], folder: Path
) -> list[Finished]:
    """Run Python with each of the arguments at the same time and wait for all.

    Where one hangs, pytest ends the test; then all are stopped, and the report has what they printed.

    Args:
        commands: arguments of each process.
        environments: the environment of each.
        folder: where their output goes.
    """
    logs = [folder / f"output-{number}.txt" for number in range(len(commands))]
    try:
        codes = pythons.run_all(
            [
                pythons.Command([*map(str, command)], dict(env), str(folder), str(log), str(log))
                for command, env, log in zip(commands, environments, logs, strict=True)
            ]
        )
    except BaseException:
        for log in filter(Path.exists, logs):
            print(f"---- {log.name}\n{log.read_text(errors='replace')[-6000:]}")
        raise
    return [Finished(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def run_well(
    commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]], folder: Path
) -> list[Finished]:
    """`run`, and all must end well."""
    ended = run(commands, environments, folder)
    assert_well(ended)
    return ended


def run_ranks(runs: Sequence[Sequence[object]], folder: Path) -> list[list[Finished]]:
    """Run scripts one after the other, each on its ranks, which are told who they are as torchrun would.

    Args:
        runs: a script of this folder, its number of ranks, its arguments.
        folder: where their output goes.

    Returns:
        How each rank of each run ended.
    """
    ended = []
    for script, ranks, *arguments in runs:
        assert isinstance(ranks, int)
        common = environment()
        everyone = [{**common, **about(rank, ranks)} for rank in range(ranks)]
        ended.append(run([[HERE / str(script), *arguments]] * ranks, everyone, folder))
    return ended


def about(rank: int, ranks: int) -> dict[str, str]:
    """The variables that tell a process which rank it is; a single one is told nothing."""
    return {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)} if ranks > 1 else {}


def assert_well(ended: Sequence[Finished]) -> None:
    """All must have ended well."""
    for number, one in enumerate(ended):
        assert one.code == 0, f"process {number} ended with {one.code}:\n{one.output[-6000:]}"
