"""Whole numbers of any width in bits, packed into bytes without gaps."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

UnsignedArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
_Bytes: TypeAlias = npt.NDArray[np.uint8]


def width_of(count: int) -> int:
    """Bits that tell ``count`` different values apart, ``ceil(log2(count))``.

    Example:
        >>> [width_of(count) for count in (1, 2, 5, 8, 9)]
        [0, 1, 3, 3, 4]
    """
    return max(0, count - 1).bit_length()


def unsigned(width: int) -> np.dtype[Any]:
    """The smallest unsigned type of at least so many bits, little-endian."""
    return np.dtype(f"<u{1 << max(0, width_of(width) - 3)}")


def packed_size(count: int, width: int) -> int:
    """Bytes that `pack` makes of ``count`` numbers: ``ceil(count * width / 8)``."""
    return -(-count * width // 8)


def pack(values: UnsignedArray, width: int) -> bytes:
    """Numbers below ``2**width`` in ``ceil(len(values) * width / 8)`` bytes.

    Whole bytes of all numbers come first, then the bits that remain of each: eight times w bits are w bytes, so that
    eight numbers at a time go through one 64-bit word.

    Example:
        >>> pack(np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8), 3).hex()
        'd1581f'
    """
    values = values.astype(unsigned(width), copy=False)
    whole, rest = divmod(width, 8)
    octets = values.view(np.uint8).reshape(len(values), values.itemsize)
    return octets[:, :whole].tobytes() + _pack_small((values >> (8 * whole)).astype(np.uint8), rest)


def unpack(data: bytes, count: int, width: int) -> UnsignedArray:
    """The ``count`` numbers that `pack` was given.

    Example:
        >>> unpack(pack(np.array([300, 5], np.uint16), 9), 2, 9).tolist()
        [300, 5]
    """
    whole, rest = divmod(width, 8)
    kind = unsigned(width)
    octets = np.zeros((count, kind.itemsize), np.uint8)
    octets[:, :whole] = np.frombuffer(data, np.uint8, count * whole).reshape(count, whole)
    if rest:
        octets[:, whole] = _unpack_small(np.frombuffer(data, np.uint8, offset=count * whole), count, rest)
    return octets.view(kind).reshape(count)


def _pack_small(values: _Bytes, width: int) -> bytes:
    octets = np.zeros((-(-len(values) // 8), 8), np.uint8)
    octets.reshape(-1)[: len(values)] = values
    words = np.zeros(len(octets), "<u8")
    for i in range(8):
        words |= octets[:, i].astype("<u8") << np.uint64(width * i)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()[: packed_size(len(values), width)]


def _unpack_small(data: _Bytes, count: int, width: int) -> _Bytes:
    groups = -(-count // 8)
    octets = np.zeros(groups * width, np.uint8)
    octets[: len(data)] = data
    words = np.zeros((groups, 8), np.uint8)
    words[:, :width] = octets.reshape(groups, width)
    numbers = words.view("<u8").reshape(groups)
    values = np.empty((groups, 8), np.uint8)
    for i in range(8):
        values[:, i] = (numbers >> np.uint64(width * i)) & np.uint64((1 << width) - 1)
    return values.reshape(-1)[:count]
