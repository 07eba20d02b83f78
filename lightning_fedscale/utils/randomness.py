"""Random numbers as a function of their keys: equal keys give equal numbers, on any rank and in any order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# The first key of every stream, so that no two purposes share a stream.
COHORT, ORDER, CLIENT, BATCH, LOADER, CACHE, HARDWARE, AVAILABILITY, NOISE = range(9)
ATTACK, PRIVACY, MASK = range(9, 12)
DROP_OUT, DAYTIME, COMPRESSION, DOWNLINK = range(12, 16)
EVALUATION = 16


def derive(seed: int, purpose: int, *keys: int) -> int:
    """Return a 63-bit seed that depends on every key and on their order.

    Args:
        seed: the user's seed, any integer >= 0.
        purpose: one of this module's constants.
        keys: non-negative integers, such as the round and the client.

    Example:
        >>> derive(0, CLIENT, 3, 7) == derive(0, CLIENT, 3, 7)
        True
        >>> derive(0, CLIENT, 3, 7) == derive(0, CLIENT, 7, 3)
        False
    """
    return int(_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, purpose: int, *keys: int) -> np.random.Generator:
    """Return a numpy generator for these keys; see `derive`."""
    return np.random.default_rng(_sequence(seed, purpose, *keys))


def _sequence(*keys: int) -> np.random.SeedSequence:
    # numpy converts a list number by number, which costs several microseconds a client, but not an array.
    return np.random.SeedSequence(keys if max(keys) >> 32 else np.array(keys, np.uint32))


class GlobalState(NamedTuple):
    """The state of the process-wide generators that user code may draw from."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: Tensor | None


def capture(device: torch.device) -> GlobalState:
    """Return the current state of Python's, numpy's and torch's global generators (CPU and ``device``)."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return GlobalState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def restore(state: GlobalState, device: torch.device) -> None:
    """Restore the global generators to ``state``."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.cuda.set_rng_state(state.device, device)


def seed_globals(seed: int, device: torch.device) -> None:
    """Seed Python's, numpy's and torch's global generators (CPU and ``device``)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Do not use torch.manual_seed: it seeds every kind of accelerator, and is ten times slower.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def untouched() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global generators of all devices at the end of the context."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
