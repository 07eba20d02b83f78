"""Which errors are told in a sentence, and which keep their traceback."""

from __future__ import annotations

import os
import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException

INTERRUPTED = 130
"""Exit code of a shell's command after Ctrl-C."""


def is_told(error: BaseException) -> bool:
    """Whether this package, or Lightning, said that something cannot be; others' mistakes need their line."""
    if isinstance(error, MisconfigurationException):
        return True
    return isinstance(error, (TypeError, ValueError)) and is_raised_in(error, "lightning_fedscale")


def is_raised_in(error: BaseException, package: str) -> bool:
    """Whether a package's own line raised it, not one that the package called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")


def is_interruption(error: BaseException) -> bool:
    """Whether it was Ctrl-C; Lightning makes an exit of it."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def nobody_reads() -> int:
    """After a broken pipe: write no more; the exit code that a shell expects."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
