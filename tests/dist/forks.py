"""Runs scripts one after the other, each in as many processes as it has ranks, and imports everything only once.

``python -m tests.dist.forks FOLDER`` reads ``FOLDER/runs.json``: for each run a script, its ranks and its arguments.
Every rank is a copy of this process, which trains nothing, and is told who it is as torchrun would. ``codes.json`` has
the exit codes of each run's ranks, ``output-RUN-RANK.txt`` what they printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

import lightning_fedscale.callbacks  # noqa: F401  # before the fork, so that no copy imports it
from tests.dist import processes


def fork(main: Callable[[], None]) -> int:
    """Run a function in a copy of this process, and nothing after it; returns its id."""
    return os.fork() or _run(main)


def _run(main: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """The child's exit code, or the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def be_rank(rank: int, ranks: int, port: int) -> None:
    """Tell this process who it is; a single one is told nothing."""
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks), MASTER_PORT=str(port))


def prepare() -> None:
    """Have all copies find what they need."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # imports what torch would import in every copy


def _script(script: str, arguments: list[str], log: Path, rank: int, ranks: int, port: int) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    be_rank(rank, ranks, port)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main(folder: Path) -> None:
    prepare()
    codes = []
    for number, (script, ranks, *arguments) in enumerate(json.loads((folder / "runs.json").read_text())):
        port = processes.free_port()
        logs = [folder / f"output-{number}-{rank}.txt" for rank in range(ranks)]
        children = [
            fork(lambda rank=rank: _script(script, arguments, logs[rank], rank, ranks, port))  # type: ignore[misc]  # noqa: B023
            for rank in range(ranks)
        ]
        codes.append([end(child) for child in children])
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
