"""Compressors that send some elements of an update and leave out the others."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from lightning_fedscale.compressors.base import Compressor, Encoded, check_length, no_state
from lightning_fedscale.compressors.bits import UnsignedArray, pack, packed_size, unpack, unsigned, width_of
from lightning_fedscale.compressors.vectors import Float32Array, flatten, rounded, size, unflatten
from lightning_fedscale.types import IntArray, Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


class _Share(NamedTuple):
    """The number of elements that are sent, given as a share or as a number."""

    ratio: float
    k: int | None

    @classmethod
    def checked(cls, ratio: float | None, k: int | None) -> _Share:
        if ratio is not None and k is not None:
            raise ValueError(f"ratio={ratio} and k={k}: pass only one of them.")
        if k is not None:
            return cls(0.0, checks.integer("k", k))
        remedy = "pass a share of the elements in (0, 1], such as 0.01, or their number as k=..."
        return cls(checks.number("ratio", 0.01 if ratio is None else ratio, remedy, lambda share: 0 < share <= 1), None)

    def of(self, elements: int) -> int:
        return min(elements, max(1, round(self.ratio * elements)) if self.k is None else self.k)

    def __str__(self) -> str:
        return f"{self.ratio:g}" if self.k is None else f"k={self.k}"


@record_call
def top_k(ratio: float | None = None, k: int | None = None) -> Compressor:
    r"""Send the elements of largest magnitude over all parameters; the others become zero.

    :math:`|C(u) - u|^2 \le (1 - k/d)\,|u|^2`. It is biased: wrap it in `error_feedback` if senders take part
    repeatedly. Of equal magnitudes the first ones are sent.

    A message has ``k (32 + ceil(log2 d))`` bits, a float32 number and its position for each. If that saves no byte, all
    d values are sent without positions in ``32 d`` bits.

    Args:
        ratio: share of the d elements, in (0, 1]; at least one is sent. 0.01 if neither is given.
        k: number of elements, instead of the share.

    Raises:
        TypeError, ValueError: if an argument is invalid.

    Example:
        >>> import torch
        >>> rule, delta = top_k(k=1), {"w": torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, encoded.seen["w"].tolist()
        (34, [0.0, -2.0, 0.0])
    """
    share = _Share.checked(ratio, k)
    return Compressor(f"top_k({share})", no_state, partial(_encode_top_k, share=share), _decode_top_k, contractive=True)


@record_call
def random_k(ratio: float | None = None, k: int | None = None, unbiased: bool = True) -> Compressor:
    r"""Send randomly drawn elements of all parameters; the others become zero.

    A message has the seed of the draw instead of positions: ``32 k + 64`` bits.

    Args:
        ratio: share of the d elements, in (0, 1]; at least one is sent. 0.01 if neither is given.
        k: number of elements, instead of the share.
        unbiased: multiply the sent values by d/k, so that the expectation is the update and the variance is
            :math:`(d/k - 1)\,|u|^2`. Without this the expected error is :math:`(1 - k/d)\,|u|^2`, as `error_feedback`
            needs.

    Raises:
        TypeError, ValueError: if an argument is invalid.

    Example:
        >>> import torch
        >>> rule, delta = random_k(k=2), {"w": torch.ones(4, dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, sorted(encoded.seen["w"].tolist())
        (128, [0.0, 0.0, 2.0, 2.0])
    """
    share = _Share.checked(ratio, k)
    checks.flag("unbiased", unbiased)
    name = f"random_k({share})" if unbiased else f"random_k({share}, unbiased=False)"
    return Compressor(
        name,
        no_state,
        partial(_encode_random_k, share=share, unbiased=unbiased),
        _decode_random_k,
        unbiased=unbiased,
        contractive=not unbiased,
    )


def _encode_top_k(delta: Params, state: None, generator: np.random.Generator, *, share: _Share) -> tuple[Encoded, None]:
    vector = flatten(delta, np.float32)
    k, width = share.of(len(vector)), width_of(len(vector))
    bits = k * (32 + width)
    if bits > 32 * len(vector) - 8:  # so that a message of 4 d bytes never has positions
        return Encoded(unflatten(vector, delta), 32 * len(vector), vector.tobytes), None
    places = _largest(vector, k)
    values = vector[places]
    message = partial(_with_places, values, places.astype(unsigned(width)), width)
    return Encoded(_scatter(values, places, delta), bits, message), None


def _decode_top_k(payload: bytes, like: Params) -> Params:
    elements = size(like)
    if len(payload) == 4 * elements:
        return unflatten(np.frombuffer(payload, "<f4"), like)
    # The number of sent elements follows from the length, so that any top_k reads any other's message.
    width = width_of(elements)
    k = 8 * len(payload) // (32 + width)
    check_length(payload, packed_size(k, 32 + width), "top_k")
    values = np.frombuffer(payload, "<f4", k)
    return _scatter(values, unpack(payload[4 * k :], k, width), like)


def _largest(vector: Float32Array, k: int) -> IntArray:
    """Return the positions of the k largest magnitudes, ascending; among equals the first ones."""
    magnitudes = np.abs(vector)
    limit = np.partition(magnitudes, len(vector) - k)[len(vector) - k]
    above, at = np.flatnonzero(magnitudes > limit), np.flatnonzero(magnitudes == limit)
    return np.sort(np.concatenate([above, at[: k - len(above)]]))


def _with_places(values: Float32Array, places: UnsignedArray, width: int) -> bytes:
    return values.tobytes() + pack(places, width)


def _encode_random_k(
    delta: Params, state: None, generator: np.random.Generator, *, share: _Share, unbiased: bool
) -> tuple[Encoded, None]:
    vector = flatten(delta, np.float64)
    k = share.of(len(vector))
    seed = generator.integers(1 << 64, size=1, dtype=np.uint64).astype("<u8")
    places = _drawn(seed, len(vector), k)
    values = rounded(vector[places] * (len(vector) / k if unbiased and k else 1.0))
    message = partial(_with_seed, seed, values)
    return Encoded(_scatter(values, places, delta), 64 + 32 * k, message), None


def _decode_random_k(payload: bytes, like: Params) -> Params:
    k = (len(payload) - 8) // 4
    check_length(payload, 8 + 4 * min(max(0, k), size(like)), "random_k")
    seed, values = np.frombuffer(payload, "<u8", 1), np.frombuffer(payload, "<f4", k, offset=8)
    return _scatter(values, _drawn(seed, size(like), k), like)


def _drawn(seed: UnsignedArray, elements: int, k: int) -> IntArray:
    return np.sort(np.random.default_rng(seed).choice(elements, k, replace=False, shuffle=False))


def _with_seed(seed: UnsignedArray, values: Float32Array) -> bytes:
    return seed.tobytes() + values.tobytes()


def _scatter(values: Float32Array, places: IntArray | UnsignedArray, like: Params) -> Params:
    vector = np.zeros(size(like))
    vector[places] = values
    return unflatten(vector, like)
