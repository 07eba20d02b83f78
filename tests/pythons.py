"""Pythons that start at once: copies of one process that has imported what all of them need, and done nothing else.

A new Python imports torch and Lightning for seconds, which was most of what many tests took. Here `run` asks a server,
one for each process of pytest, for ``python *command``; the server forks, and the copy runs the command with its own
environment, folder, output and process group. What a command imports by itself, it imports as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch
import torch.utils.tensorboard
from lightning.fabric.utilities import rank_zero

import lightning_fedscale.callbacks
import lightning_fedscale.strategy  # noqa: F401  # so that no copy imports them

REPOSITORY = Path(__file__).parents[1]


class Command(NamedTuple):
    """``python *arguments``.

    Attributes:
        arguments: a script and its arguments, or ``-m`` and ``-c`` as Python takes them.
        environment: all variables of the process.
        folder: where it runs.
        output: the file for what it prints.
        errors: the file for its error stream.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    output: str
    errors: str


def run_all(commands: Sequence[Command]) -> list[int]:
    """Run commands at the same time and wait for all; return their exit codes, or the negative signals that ended them.

    Whatever they started and left behind is killed, and so are they if the wait is interrupted, as by a time limit.
    """
    server = _server()
    assert server.stdin is not None
    children: list[int] = []
    try:
        with contextlib.suppress(BrokenPipeError):  # the missing answer says so
            server.stdin.write(json.dumps(commands) + "\n")
            server.stdin.flush()
        children = _answer(server)
        return _answer(server)
    except BaseException:
        _drop(server)  # an answer that nobody reads may be on its way
        raise
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)


def run(
    *arguments: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` as `subprocess.run` does with ``capture_output=True, text=True``.

    Args:
        arguments: of Python.
        environment: all variables of the process; None has it inherit those of this process.
        folder: where it runs; None has it run in this one.
    """
    taken, there = [str(each) for each in arguments], str(Path.cwd() if folder is None else folder)
    variables = os.environ if environment is None else environment
    with tempfile.TemporaryDirectory() as said:
        output, errors = Path(said, "output"), Path(said, "errors")
        (code,) = run_all([Command(taken, dict(variables), there, str(output), str(errors))])
        return subprocess.CompletedProcess(
            [sys.executable, *taken], code, output.read_text(errors="replace"), errors.read_text(errors="replace")
        )


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pythons"]
    server = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(_drop, server)
    return server


def _answer(server: subprocess.Popen[str]) -> list[int]:
    assert server.stdout is not None
    if not (line := server.stdout.readline()):
        raise RuntimeError(f"The server of Pythons ended with {server.wait()}; the next command starts another one.")
    numbers: list[int] = json.loads(line)
    return numbers


def _drop(server: subprocess.Popen[str]) -> None:
    """End a server; the next command starts another one."""
    _server.cache_clear()
    atexit.unregister(_drop)
    server.kill()
    server.communicate()  # closes the pipes and waits


def fork(main: Callable[[], None]) -> int:
    """Run a function in a copy of this process, and nothing after it; returns its id."""
    return os.fork() or _end_with(main)


def end(child: int) -> int:
    """Wait for a child; return its exit code, or the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end_with(main: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- the server


def _serve(command: Command) -> None:
    """Do in this copy of the server what ``python *arguments`` does."""
    os.setpgid(0, 0)
    for number, file in enumerate((os.devnull, command.output, command.errors)):
        stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # what the server had read ahead is not for the copy
    os.chdir(command.folder)
    os.environ.clear()
    os.environ.update(command.environment)
    vars(rank_zero.rank_zero_only)["rank"] = rank_zero._get_rank() or 0  # as Lightning does when it is imported
    try:
        python(*command.arguments)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def python(what: str, *arguments: str) -> None:
    """Do in this process what ``python what *arguments`` does."""
    own = {"", str(REPOSITORY)}  # of the server
    paths = [*os.environ.get("PYTHONPATH", "").split(":"), *(path for path in sys.path if path not in own)]
    folder = {"-c": "", "-m": os.getcwd()}.get(what, str(Path(what).parent.absolute()))
    sys.path[:] = [folder, *filter(None, paths)]
    if what == "-c":
        sys.argv = ["-c", *arguments[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv = [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *arguments]
        runpy.run_path(str(Path(what).absolute()), run_name="__main__")


def main() -> None:
    """Serve: a line holds commands, the answer is a line of their processes and one of their exit codes."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # imports what torch would import in every copy
    gc.collect()
    gc.freeze()  # so that collections in the copies neither pass over all this nor write to memory that they share
    for line in sys.stdin:
        children = [fork(functools.partial(_serve, Command(*each))) for each in json.loads(line)]
        for child in children:
            with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself, or has ended
                os.setpgid(child, child)
        print(json.dumps(children), flush=True)
        print(json.dumps([end(child) for child in children]), flush=True)


if __name__ == "__main__":
    main()
