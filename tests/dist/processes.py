"""Starting scripts as real processes, so that none outlives its test and none can hang it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, env, log in zip(commands, environments, logs, strict=True):
            with log.open("wb") as out:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        env=dict(env),
                        cwd=folder,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # one group with all that the process starts
                    )
                )
        codes = [process.wait() for process in started]
    except BaseException:
        for log in logs[: len(started)]:
            print(f"---- {log.name}\n{log.read_text(errors='replace')[-6000:]}")
        raise
    finally:
        for process in started:
            _stop(process)
    return [Finished(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def run_well(
    commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]], folder: Path
) -> list[Finished]:
    """`run`, and all must end well."""
    ended = run(commands, environments, folder)
    assert_well(ended)
    return ended


def run_forked(runs: Sequence[Sequence[object]], folder: Path) -> list[list[Finished]]:
    """Run scripts one after the other, each on its ranks, in copies of one process that imports everything once.

    Args:
        runs: a script of this folder, its number of ranks, its arguments.
        folder: where their output goes.

    Returns:
        How each rank of each run ended.
    """
    named = [[str(HERE / str(script)), ranks, *map(str, arguments)] for script, ranks, *arguments in runs]
    (folder / "runs.json").write_text(json.dumps(named))
    run_well([["-m", "tests.dist.forks", folder]], [environment()], folder)
    return [
        [
            Finished(code, (folder / f"output-{number}-{rank}.txt").read_text(errors="replace"))
            for rank, code in enumerate(codes)
        ]
        for number, codes in enumerate(json.loads((folder / "codes.json").read_text()))
    ]


def assert_well(ended: Sequence[Finished]) -> None:
    """All must have ended well."""
    for number, one in enumerate(ended):
        assert one.code == 0, f"process {number} ended with {one.code}:\n{one.output[-6000:]}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
