"""The interface of a compressor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import Arguments


class Encoded(NamedTuple):
    """A compressed update.

    Attributes:
        seen: the update that the receiver decodes, as float64 tensors by parameter name.
        bits: exact size of the message; ``len(payload()) == ceil(bits / 8)``.
        payload: returns the message itself, made on demand.
    """

    seen: Params
    bits: int
    payload: Callable[[], bytes]


class Compressor(NamedTuple):
    """A rule in pure functions over an update by parameter name.

    Attributes:
        name: name of the factory with its arguments, such as ``"top_k(0.01)"``.
        init: ``(params) -> state`` of a sender before its first message: tensors and primitives, or None without state.
        encode: ``(delta, state, generator) -> (encoded, state)``. ``delta`` is not changed. Random rules draw only from
            the generator.
        decode: ``(payload, like) -> seen``: reads a message for parameters like these, named in the same order.
        stateful: whether senders must keep a state from message to message (error feedback, warm starts).
        unbiased: whether ``E[seen] == delta``, up to the rounding of float32.
        contractive: whether the expected error is at most as long as the update, ``E|seen - delta|^2 <= |delta|^2``.
            Error feedback needs this, since errors would otherwise grow.
        keeps_error: whether the state holds errors to be sent later, which are lost if the sender is not drawn again.
        operations: operations per element of an update to encode and decode it; only for compute accounting.
        arguments: the arguments of the factory that made it; for logs only.
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
    arguments: Mapping[str, Any] = Arguments()


def no_state(params: Params) -> None:
    """Return None, the state of senders without state."""


def check_compressor(name: str, value: object) -> Compressor:
    """Return ``value``, which must be a compressor.

    Raises:
        TypeError: if it is not a compressor.
    """
    if not isinstance(value, Compressor):
        raise TypeError(f"{name}={value!r}: pass a compressor such as compressors.top_k(0.01).")
    return value


def check_length(payload: bytes, expected: int, name: str) -> None:
    """Check that a message has the expected length.

    Raises:
        ValueError: if it has another length.
    """
    if len(payload) != expected:
        raise ValueError(
            f"payload has {len(payload)} bytes: a message of {name} for these parameters has {expected}: pass a message"
            " of the same compressor and model."
        )
