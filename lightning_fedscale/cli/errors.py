"""The exit codes of a command that was interrupted, or whose output nobody reads."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130
"""Exit code of a command after Ctrl-C."""


def is_interruption(error: BaseException) -> bool:
    """Return whether the cause was Ctrl-C, which Lightning may turn into an exit."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def exit_after_broken_pipe() -> int:
    """Discard further output after a broken pipe, and return the exit code that a shell expects."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
