"""Pack integers of any bit width into bytes without gaps."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

UnsignedArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

_AT_A_TIME = 2**16
"""Number of bytes or integers that are unpacked into bits at once; a multiple of 64, so that they fill whole bytes."""


def width_of(count: int) -> int:
    """Return the number of bits that encode ``count`` different values, ``ceil(log2(count))``.

    Example:
        >>> [width_of(count) for count in (1, 2, 5, 8, 9)]
        [0, 1, 3, 3, 4]
    """
    return max(0, count - 1).bit_length()


def unsigned(width: int) -> np.dtype[Any]:
    """Return the smallest unsigned little-endian type of at least this many bits."""
    return np.dtype(f"<u{1 << max(0, width_of(width) - 3)}")


def packed_size(count: int, width: int) -> int:
    """Return the number of bytes that `pack` needs for ``count`` numbers: ``ceil(count * width / 8)``."""
    return -(-count * width // 8)


def pack(values: UnsignedArray, width: int) -> bytes:
    """Pack numbers below ``2**width`` into ``ceil(len(values) * width / 8)`` bytes, the lowest bit first.

    Example:
        >>> pack(np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8), 3).hex()
        'd1581f'
    """
    kind = unsigned(width)
    octets = values.astype(kind, copy=False).view(np.uint8)
    found = []
    for i in range(0, len(octets), _AT_A_TIME):
        bits = np.unpackbits(octets[i : i + _AT_A_TIME], bitorder="little").reshape(-1, 8 * kind.itemsize)
        found.append(np.packbits(bits[:, :width], bitorder="little").tobytes())
    return b"".join(found)


def unpack(data: bytes, count: int, width: int) -> UnsignedArray:
    """Unpack the ``count`` numbers that were passed to `pack`.

    Example:
        >>> unpack(pack(np.array([300, 5], np.uint16), 9), 2, 9).tolist()
        [300, 5]
    """
    values, packed = np.zeros(count, unsigned(width)), np.frombuffer(data, np.uint8)
    for i in range(0, count * bool(width), _AT_A_TIME):
        some = values[i : i + _AT_A_TIME]
        bits = np.zeros((len(some), 8 * values.itemsize), np.uint8)
        found = np.unpackbits(packed[i * width // 8 :], count=len(some) * width, bitorder="little")
        bits[:, :width] = found.reshape(-1, width)
        some[:] = np.packbits(bits, bitorder="little").view(values.dtype)
    return values
