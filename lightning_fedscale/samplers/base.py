"""The interface of a sampler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from lightning_fedscale.types import IntArray


class Sampler(Protocol):
    """A pure function from (seed, round) to a cohort; every rank calls it and must get the same result.

    A sampler whose attribute ``reads_losses`` is true also gets ``losses``, see `reads_losses`. A sampler that takes
    ``among`` (the clients that may be drawn, ascending, or None for all) can be wrapped by `available` and
    `daily_cycle`.
    """

    def __call__(self, *, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
        """Return the clients of this round: distinct indices below ``num_clients``, ascending, possibly none.

        Args:
            seed: the strategy's seed.
            round: index of the round, from 0.
            num_clients: number of clients.
            clients_per_round: number of clients to draw.
        """


def reads_losses(sampler: Sampler) -> bool:
    """Return whether a sampler takes the argument ``losses``, a mapping of clients to their last mean training loss.

    Clients that have not taken part yet are missing from it.

    Example:
        >>> from lightning_fedscale.samplers import drop_out, power_of_choice, uniform
        >>> reads_losses(uniform), reads_losses(drop_out(power_of_choice(candidates=20), 0.1))
        (False, True)
    """
    return bool(getattr(sampler, "reads_losses", False))


def wrapping(sampler: Sampler, wrapper: Callable[..., IntArray]) -> Sampler:
    """Return the wrapper, marked to read losses if the sampler does."""
    made: Any = wrapper
    made.reads_losses = reads_losses(sampler)
    ready: Sampler = made
    return ready


def check_sampler(sampler: object, *, takes_among: bool = False) -> None:
    """Check the sampler that is passed to a wrapper.

    Raises:
        TypeError: it is not a sampler, or does not take ``among`` when the wrapper needs it.
    """
    remedy = "pass a sampler such as samplers.uniform or samplers.weighted([...])"
    if not callable(sampler):
        raise TypeError(f"sampler={sampler!r}: {remedy}.")
    among = {"among": None} if takes_among else {}
    try:
        inspect.signature(sampler).bind(seed=0, round=0, num_clients=1, clients_per_round=1, **among)
    except TypeError as error:
        known = ", among=None" if takes_among else ""
        raise TypeError(
            f"sampler={sampler!r}: {error}; {remedy}, or a function (*, seed, round, num_clients,"
            f" clients_per_round{known})."
        ) from None
