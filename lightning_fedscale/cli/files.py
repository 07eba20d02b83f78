"""Writing the files and folders of a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def written(argument: str, file: str, write: Callable[[], object]) -> None:
    """Write a file, and create its parent folders.

    Raises:
        ValueError: if it cannot be written; the message names the argument.
    """
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write()
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}={file!r}: cannot be written: {error}.") from None


def made(argument: str, folder: str) -> None:
    """Create the folder for results before the work starts.

    Raises:
        ValueError: if it cannot be created; the message names the argument.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}={folder!r}: this folder cannot be created: {error.strerror}.") from None
