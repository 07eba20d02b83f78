"""How a command ends that was interrupted, or that nobody reads."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130
"""Exit code of a shell's command after Ctrl-C."""


def is_interruption(error: BaseException) -> bool:
    """Whether it was Ctrl-C; Lightning makes an exit of it."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def nobody_reads() -> int:
    """After a broken pipe: write no more; the exit code that a shell expects."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
