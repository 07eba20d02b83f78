"""Checks of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import numbers

from lightning_fedscale.compressors.base import Compressor


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int between two bounds.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it lies outside.

    Example:
        >>> whole("levels", 1, 2, 65536)
        Traceback (most recent call last):
        ValueError: levels=1: pass an integer from 2 to 65536.
    """
    remedy = f"pass an integer of at least {least}." if most is None else f"pass an integer from {least} to {most}."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: {remedy}")
    found = int(value)
    if found < least or (most is not None and found > most):
        raise ValueError(f"{name}={value}: {remedy}")
    return found


def number(name: str, value: object, low: float, high: float, remedy: str) -> float:
    """``value`` as a float in ``(low, high]``.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: {remedy}")
    found = float(value)
    if not low < found <= high:
        raise ValueError(f"{name}={value}: {remedy}")
    return found


def compressor(name: str, value: object) -> Compressor:
    """``value``, which must be a compressor.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Compressor):
        raise TypeError(f"{name}={value!r}: pass a compressor such as compressors.top_k(0.01).")
    return value


def length(payload: bytes, expected: int, name: str) -> None:
    """Check that a message is as long as it must be.

    Raises:
        ValueError: if not.
    """
    if len(payload) != expected:
        raise ValueError(
            f"payload of {len(payload)} bytes: a message of {name} for these parameters has {expected}. It was made by"
            " another compressor or for another model."
        )
