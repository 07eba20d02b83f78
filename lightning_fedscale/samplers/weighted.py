"""Samplers with unequal probabilities: by given weights, or by the clients' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np

from lightning_fedscale.samplers.base import Sampler
from lightning_fedscale.samplers.uniform import uniform
from lightning_fedscale.types import FloatArray, IntArray
from lightning_fedscale.utils import checks, randomness

_NOTHING: Mapping[int, float] = MappingProxyType({})


def weighted(weights: Sequence[float] | FloatArray) -> Sampler:
    """Draw clients one after the other, with probability in proportion to weight among those not yet drawn.

    With the clients' sizes as weights, and ``aggregator="uniform"``, large clients count more by taking part more often
    (scheme I of arXiv 1907.02189, but without replacement). Clients of weight 0 are never drawn, even if this makes
    cohorts smaller.

    Args:
        weights: one per client, >= 0, on any scale.

    Raises:
        TypeError: if they are not numbers.
        ValueError: if one is negative or not finite, or none is positive; when called, if there is not one per client.

    Example:
        >>> sampler = weighted([1.0, 0.0, 2.0, 1.0])
        >>> sampler(seed=0, round=0, num_clients=4, clients_per_round=3).tolist()
        [0, 2, 3]
    """
    return partial(_weighted, weights=_checked(weights))


def power_of_choice(candidates: int, weights: Sequence[float] | FloatArray | None = None) -> Sampler:
    """Draw candidates, and take those with the highest loss (power-of-choice, arXiv 2010.01243).

    It converges faster if clients differ, towards a model that serves the worst clients better. This is the paper's
    variant with the losses that clients last reported, which costs no communication; clients that never took part count
    as having the highest loss.

    Args:
        candidates: number of candidates, at least ``clients_per_round``; this many equals `uniform`, all is greedy.
        weights: weights of the candidates, as for `weighted`: the paper takes the clients' sizes. None for equal ones.

    Raises:
        TypeError: if ``candidates`` is not an integer.
        ValueError: if it is too small, or the weights are invalid as in `weighted`.

    Example:
        >>> sampler = power_of_choice(candidates=4)
        >>> sampler(seed=0, round=5, num_clients=4, clients_per_round=2, losses={0: 0.1, 1: 3.0, 2: 0.5}).tolist()
        [1, 3]
    """
    drawn = uniform if weights is None else weighted(weights)
    sampler = partial(_power_of_choice, candidates=checks.integer("candidates", candidates), drawn=drawn)
    sampler.reads_losses = True  # type: ignore[attr-defined]
    return sampler


def _weighted(
    *,
    weights: FloatArray,
    seed: int,
    round: int,
    num_clients: int,
    clients_per_round: int,
    among: IntArray | None = None,
) -> IntArray:
    if len(weights) != num_clients:
        raise ValueError(f"weights has {len(weights)} entries for {num_clients} clients: pass one per client.")
    clients = np.arange(num_clients, dtype=np.int64) if among is None else among
    clients = clients[weights[clients] > 0]
    # The shortest of these exponential waiting times draw without replacement (Efraimidis and Spirakis 2006).
    waits = randomness.generator(seed, randomness.COHORT, round).exponential(size=num_clients)[clients]
    return np.sort(clients[np.argsort(waits / weights[clients], kind="stable")[:clients_per_round]])


def _power_of_choice(
    *,
    candidates: int,
    drawn: Sampler,
    seed: int,
    round: int,
    num_clients: int,
    clients_per_round: int,
    among: IntArray | None = None,
    losses: Mapping[int, float] = _NOTHING,
) -> IntArray:
    if candidates < clients_per_round:
        raise ValueError(f"candidates={candidates}: pass at least clients_per_round={clients_per_round}.")
    others = {} if among is None else {"among": among}
    pool = drawn(
        seed=seed, round=round, num_clients=num_clients, clients_per_round=min(candidates, num_clients), **others
    )
    # Shuffle first, so that clients of equal loss, as in the first round, have equal chances.
    pool = randomness.generator(seed, randomness.COHORT, round, 1).permutation(pool)
    known = np.array([losses.get(client, np.inf) for client in pool.tolist()])
    return np.sort(pool[np.argsort(-known, kind="stable")[:clients_per_round]])


def _checked(weights: Sequence[float] | FloatArray) -> FloatArray:
    try:
        values = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"weights={weights!r}: pass a list of numbers, one per client.") from None
    if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all() or not (values > 0).any():
        raise ValueError(f"weights={weights!r}: pass one finite number of at least 0 per client, not all of them 0.")
    return values
