"""No compression."""

from __future__ import annotations

import numpy as np

from lightning_fedscale.compressors.base import Compressor, Encoded, check_length, no_state
from lightning_fedscale.compressors.vectors import flatten, size, unflatten
from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def identity() -> Compressor:
    """Send every value as a float32 number of 32 bits.

    It is the baseline of other compressors: `adaptive` falls back to it, and `phase_driven` can use it in critical
    phases. Models of float64 parameters lose digits.

    Example:
        >>> import torch
        >>> rule, delta = identity(), {"w": torch.tensor([0.5, -2.0], dtype=torch.float64)}
        >>> encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, encoded.seen["w"].tolist()
        (64, [0.5, -2.0])
    """
    return Compressor("identity()", no_state, _encode, _decode, unbiased=True, contractive=True)


def _encode(delta: Params, state: None, generator: np.random.Generator) -> tuple[Encoded, None]:
    values = flatten(delta, np.float32)
    return Encoded(unflatten(values, delta), 32 * len(values), values.tobytes), None


def _decode(payload: bytes, like: Params) -> Params:
    check_length(payload, 4 * size(like), "identity()")
    return unflatten(np.frombuffer(payload, "<f4"), like)
