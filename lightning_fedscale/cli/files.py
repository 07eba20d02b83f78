"""Files and folders that a command was asked to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def written(argument: str, file: str, write: Callable[[], object]) -> None:
    """Write a file, with the folders above it.

    Raises:
        ValueError: if that cannot be; names the argument.
    """
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write()
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}={file!r}: cannot be written: {error}.") from None


def made(argument: str, folder: str) -> None:
    """Make a folder before the work whose results it is for.

    Raises:
        ValueError: if that cannot be; names the argument.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}={folder!r}: the folder cannot be made: {error.strerror}.") from None
