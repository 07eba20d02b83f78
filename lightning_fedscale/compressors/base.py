"""The shape of a compressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lightning_fedscale.types import Params


class Encoded(NamedTuple):
    """A compressed update.

    Attributes:
        seen: what the receiver decodes, by parameter name, in float64 tensors.
        bits: exact size of the message; ``len(payload()) == ceil(bits / 8)``.
        payload: the message itself; made when asked for.
    """

    seen: Params
    bits: int
    payload: Callable[[], bytes]


class Compressor(NamedTuple):
    """A rule in pure functions over an update by parameter name.

    Attributes:
        name: what the factory is called, with its arguments, such as ``"top_k(0.01)"``.
        init: ``(params) -> state`` of a sender before its first message: tensors and primitives; None for none.
        encode: ``(delta, state, generator) -> (encoded, state)``. ``delta`` is not changed. Random rules draw from the
            generator only.
        decode: ``(payload, like) -> seen``: reads a message for parameters like these, named in the same order.
        stateful: whether senders must keep a state from message to message (error feedback, warm starts).
        unbiased: whether ``E[seen] == delta``, up to the rounding of float32.
        contractive: whether the error is expected to be no longer than the update,
            ``E|seen - delta|^2 <= |delta|^2``: what error feedback needs, since errors would otherwise grow.
        keeps_error: whether the state holds what was not sent yet, which is lost if the sender never comes back.
        operations: for each element of an update, to encode and to decode it; for the ledger of compute alone.
    """

    name: str
    init: Callable[[Params], Any]
    encode: Callable[[Params, Any, np.random.Generator], tuple[Encoded, Any]]
    decode: Callable[[bytes, Params], Params]
    stateful: bool = False
    unbiased: bool = False
    contractive: bool = False
    keeps_error: bool = False
    operations: float = 2.0


def no_state(params: Params) -> None:
    """The state of senders that keep none."""


def check_compressor(name: str, value: object) -> Compressor:
    """``value``, which must be a compressor.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Compressor):
        raise TypeError(f"{name}={value!r}: pass a compressor such as compressors.top_k(0.01).")
    return value


def check_length(payload: bytes, expected: int, name: str) -> None:
    """Check that a message is as long as it must be.

    Raises:
        ValueError: if not.
    """
    if len(payload) != expected:
        raise ValueError(
            f"payload of {len(payload)} bytes: a message of {name} for these parameters has {expected}. It was made by"
            " another compressor or for another model."
        )
