"""Compressors that send every element with few bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from lightning_fedscale.compressors.base import Compressor, Encoded, check_length, no_state
from lightning_fedscale.compressors.bits import UnsignedArray, pack, packed_size, unpack, unsigned, width_of
from lightning_fedscale.compressors.vectors import (
    LARGEST,
    Float32Array,
    at_least,
    at_most,
    flatten,
    parts,
    size,
    unflatten,
)
from lightning_fedscale.types import FloatArray, Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call

_MOST_LEVELS = 1 << 16


@record_call
def qsgd(levels: int = 127, per_tensor: bool = False) -> Compressor:
    r"""QSGD (arXiv 1610.02132): round magnitudes, relative to the norm, up or down at random to one of few levels.

    With :math:`r_i = s\,|u_i| / |u|`, element i becomes :math:`|u|\,\mathrm{sign}(u_i)\,\xi_i / s` where
    :math:`\xi_i` is :math:`\lceil r_i \rceil` with the probability :math:`r_i - \lfloor r_i \rfloor`, else
    :math:`\lfloor r_i \rfloor`. It is unbiased, with a variance of at most :math:`\min(d/s^2, \sqrt d/s)\,|u|^2`.

    A message has ``32 + d (1 + ceil(log2(s + 1)))`` bits, with a fixed width instead of the paper's variable one.

    Args:
        levels: s, the number of levels besides zero, 1 to 65536. 127 takes 8 bits per element, 7 takes 4, 1 takes 2.
        per_tensor: use one norm per tensor, with 32 bits for each, instead of one for all. This has less variance,
            since d is then the size of a tensor.

    Raises:
        TypeError, ValueError: if the levels are invalid.

    Example:
        >>> import torch
        >>> rule, delta = qsgd(levels=5), {"w": torch.tensor([3.0, -4.0], dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, encoded.seen["w"].tolist()  # 3/5 and 4/5 of the norm are levels
        (40, [3.0, -4.0])
    """
    levels = checks.integer("levels", levels, 1, _MOST_LEVELS)
    width = 1 + width_of(levels + 1)
    grid = _Grid(width, 1, partial(_share_of_norm, levels=levels), partial(_of_norm, levels=levels))
    name = f"qsgd({levels}, per_tensor=True)" if per_tensor else f"qsgd({levels})"
    return _compressor(name, grid, per_tensor, unbiased=True)


@record_call
def sign(per_tensor: bool = False) -> Compressor:
    r"""Send signs, scaled by the mean magnitude: :math:`(|u|_1 / d)\,\mathrm{sign}(u)` (arXiv 1901.09847).

    :math:`|C(u) - u|^2 = |u|^2 - |u|_1^2 / d`, which is at most :math:`(1 - 1/d)\,|u|^2`. It is biased: wrap it in
    `error_feedback` (EF-signSGD) if senders take part repeatedly. Zero counts as positive. A message has ``d + 32``
    bits.

    Args:
        per_tensor: use one scale per tensor, with 32 bits for each, instead of one for all.

    Example:
        >>> import torch
        >>> rule, delta = sign(), {"w": torch.tensor([0.5, -2.0, 0.5], dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, encoded.seen["w"].tolist()
        (35, [1.0, -1.0, 1.0])
    """
    name = "sign(per_tensor=True)" if per_tensor else "sign()"
    return _compressor(name, _Grid(1, 1, _negative, _signed), per_tensor, contractive=True)


@record_call
def uniform_quantization(levels: int = 256) -> Compressor:
    r"""Round each tensor up or down at random to an even grid from its minimum to its maximum.

    This is the stochastic quantization of arXiv 1611.00429. It is unbiased; an element's variance is at most a quarter
    of the squared distance of two levels.

    A message has ``d ceil(log2(levels)) + 64`` bits for each tensor that is not empty.

    Args:
        levels: points of the grid, 2 to 65536; 256 takes a byte per element.

    Raises:
        TypeError, ValueError: if the levels are invalid.

    Example:
        >>> import torch
        >>> rule, delta = uniform_quantization(levels=4), {"w": torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, encoded.seen["w"].tolist()
        (70, [0.0, 1.0, 3.0])
    """
    levels = checks.integer("levels", levels, 2, _MOST_LEVELS)
    grid = _Grid(width_of(levels), 2, partial(_on_grid, levels=levels), partial(_of_grid, levels=levels))
    return _compressor(f"uniform_quantization({levels})", grid, per_tensor=True, unbiased=True)


class _Grid(NamedTuple):
    """Converts the elements of a group to codes of a few bits, and back.

    Attributes:
        width: bits of a code.
        scales: number of float32 scales of a group, next to its codes.
        write: elements and a generator -> scales and codes.
        read: scales and codes -> elements.
    """

    width: int
    scales: int
    write: Callable[[FloatArray, np.random.Generator], tuple[list[np.float32], UnsignedArray]]
    read: Callable[[list[float], UnsignedArray], FloatArray]


def _compressor(
    name: str, grid: _Grid, per_tensor: bool, *, unbiased: bool = False, contractive: bool = False
) -> Compressor:
    checks.flag("per_tensor", per_tensor)
    encode = partial(_encode, grid=grid, per_tensor=per_tensor)
    decode = partial(_decode, grid=grid, per_tensor=per_tensor, name=name)
    return Compressor(name, no_state, encode, decode, unbiased=unbiased, contractive=contractive)


def _encode(
    delta: Params, state: None, generator: np.random.Generator, *, grid: _Grid, per_tensor: bool
) -> tuple[Encoded, None]:
    vector, groups = flatten(delta, np.float64), _groups(delta, per_tensor)
    scales = np.zeros((len(groups), grid.scales), "<f4")
    codes = np.zeros(len(vector), unsigned(grid.width))
    for row, group in zip(scales, groups, strict=True):
        row[:], codes[group] = grid.write(vector[group], generator)
    bits = 32 * scales.size + grid.width * len(codes)
    return Encoded(_restored(scales, codes, delta, groups, grid), bits, partial(_message, scales, codes, grid)), None


def _decode(payload: bytes, like: Params, *, grid: _Grid, per_tensor: bool, name: str) -> Params:
    elements, groups = size(like), _groups(like, per_tensor)
    head = 4 * len(groups) * grid.scales
    check_length(payload, head + packed_size(elements, grid.width), name)
    scales = np.frombuffer(payload[:head], "<f4").reshape(len(groups), grid.scales)
    return _restored(scales, unpack(payload[head:], elements, grid.width), like, groups, grid)


def _groups(like: Params, per_tensor: bool) -> list[slice]:
    """Return the parts of the vector that have separate scales."""
    found = parts(like) if per_tensor else [slice(0, size(like))]
    return [part for part in found if part.stop > part.start]


def _restored(scales: Float32Array, codes: UnsignedArray, like: Params, groups: list[slice], grid: _Grid) -> Params:
    vector = np.zeros(len(codes))
    for row, group in zip(scales.tolist(), groups, strict=True):
        vector[group] = grid.read(row, codes[group])
    return unflatten(vector, like)


def _message(scales: Float32Array, codes: UnsignedArray, grid: _Grid) -> bytes:
    return scales.tobytes() + pack(codes, grid.width)


def _share_of_norm(
    values: FloatArray, generator: np.random.Generator, levels: int
) -> tuple[list[np.float32], UnsignedArray]:
    width = width_of(levels + 1)
    # The norm is rounded up, so that no share exceeds 1. np.linalg.norm would depend on the number of threads.
    norm = at_least(float(np.sqrt(np.square(values).sum())))
    shares = np.abs(values)
    shares *= levels / float(norm) if norm else 0.0
    codes = _rounded_at_random(shares, generator, levels, 1 + width)
    codes |= (values < 0).astype(codes.dtype) << width
    return [norm], codes


def _of_norm(scales: list[float], codes: UnsignedArray, levels: int) -> FloatArray:
    magnitudes: FloatArray = np.arange(float(1 << width_of(levels + 1))) * (scales[0] / levels)
    values: FloatArray = np.concatenate([magnitudes, 0.0 - magnitudes])  # avoids -0.0 if the magnitude is zero
    return values.take(codes)


def _negative(values: FloatArray, generator: np.random.Generator) -> tuple[list[np.float32], UnsignedArray]:
    return [np.float32(min(np.abs(values).mean(), LARGEST))], (values < 0).view(np.uint8)


def _signed(scales: list[float], codes: UnsignedArray) -> FloatArray:
    return np.array([scales[0], 0.0 - scales[0]]).take(codes)


def _on_grid(values: FloatArray, generator: np.random.Generator, levels: int) -> tuple[list[np.float32], UnsignedArray]:
    low, high = at_most(values.min()), at_least(values.max())
    step = (float(high) - float(low)) / (levels - 1)
    places = values - float(low)
    places *= 1 / step if step else 0.0
    return [low, high], _rounded_at_random(places, generator, levels - 1, width_of(levels))


def _of_grid(scales: list[float], codes: UnsignedArray, levels: int) -> FloatArray:
    low, high = scales
    points: FloatArray = low + np.arange(float(levels)) * ((high - low) / (levels - 1))
    return points.take(codes)


def _rounded_at_random(places: FloatArray, generator: np.random.Generator, last: int, width: int) -> UnsignedArray:
    """Round up with the probability of the fraction, else down, in place."""
    places += generator.random(len(places))
    return np.clip(places, 0, last, out=places).astype(unsigned(width))  # values beyond float32 are clipped
