"""Checks of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import math


def positive(name: str, value: float) -> None:
    """Check that ``value`` is a number above 0 and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: pass a number above 0.")


def whole(name: str, value: int, least: int = 1) -> None:
    """Check that ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: pass a whole number, at least {least}.")
