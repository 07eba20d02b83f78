"""How a command ends after an error, an interruption, or when nobody reads its output."""

from __future__ import annotations

import os
import sys

from lightning_fedscale.utils.foreign import is_raised_in

INTERRUPTED = 130
"""Exit code of a command after Ctrl-C."""


def is_interruption(error: BaseException) -> bool:
    """Return whether the cause was Ctrl-C, which Lightning may turn into an exit."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def is_user_error(error: BaseException) -> bool:
    """Return whether this package or Lightning raised the error as a message; other errors need their traceback."""
    if isinstance(error, (TypeError, ValueError)) and is_raised_in(error, "lightning_fedscale"):
        return True
    if "lightning.fabric" not in sys.modules:  # importing it would take longer than most commands that do without
        return False
    from lightning_fedscale.core.options import trainer_checks

    return trainer_checks.is_user_error(error)


def exit_after_broken_pipe() -> int:
    """Discard further output after a broken pipe, and return the exit code that a shell expects."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
