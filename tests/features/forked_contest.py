"""``python -m benchmarks`` whose contenders are copies of its process, which has imported what they would import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO
from unittest import mock

from benchmarks import cli, referee
from tests import pythons


class Copy:
    """What the referee asks of `subprocess.Popen`."""

    def __init__(
        self, command: list[str], *, cwd: object, env: dict[str, str], stderr: IO[str], preexec_fn: Callable[[], None],
        **streams_and_session: object,
    ) -> None:  # fmt: skip
        (theirs, ours), (answers, speech) = os.pipe(), os.pipe()

        def contend() -> None:
            os.setsid()
            for number, stream in enumerate((theirs, speech, stderr.fileno())):
                os.dup2(stream, number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as a new program has it: what the referee locks
            preexec_fn()
            os.chdir(str(cwd))
            os.environ.clear()
            os.environ.update(env)
            pythons.python(*command[1:])

        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = pythons.fork(contend)
        os.close(theirs)
        os.close(speech)
        self.stdin, self.stdout = os.fdopen(ours, "w"), os.fdopen(answers)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = pythons.end(self.pid)
        return self._code


if __name__ == "__main__":
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": Copy})
    with mock.patch.object(referee, "subprocess", forking):
        cli.main()
