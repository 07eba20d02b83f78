"""Samplers with equal probabilities (a fixed number of clients, or each independently), and in turn."""

from __future__ import annotations

import numpy as np

from lightning_fedscale.types import IntArray
from lightning_fedscale.utils import randomness


def uniform(
    *, seed: int, round: int, num_clients: int, clients_per_round: int, among: IntArray | None = None
) -> IntArray:
    """Draw a cohort of the given size uniformly without replacement (FedAvg, arXiv 1602.05629).

    Time and memory are in proportion to the cohort, not to the number of clients.

    Example:
        >>> cohort = uniform(seed=0, round=3, num_clients=1_000_000, clients_per_round=4)
        >>> len(set(cohort.tolist())), bool((np.diff(cohort) > 0).all())
        (4, True)
        >>> uniform(seed=0, round=3, num_clients=3, clients_per_round=3).tolist()
        [0, 1, 2]
    """
    size = num_clients if among is None else len(among)
    if clients_per_round >= size:
        return np.arange(num_clients, dtype=np.int64) if among is None else among
    return _subset(randomness.generator(seed, randomness.COHORT, round), size, clients_per_round, among)


def poisson(
    *, seed: int, round: int, num_clients: int, clients_per_round: int, among: IntArray | None = None
) -> IntArray:
    """Draw every client independently with probability ``clients_per_round / num_clients`` (Poisson sampling).

    The accountants of differential privacy assume this sampling (arXiv 1710.06963). Cohorts have ``clients_per_round``
    clients on average, but any number in a round, even none. Time and memory are in proportion to the cohort.

    Example:
        >>> [len(poisson(seed=0, round=r, num_clients=1000, clients_per_round=4)) for r in range(6)]
        [5, 4, 4, 5, 10, 8]
    """
    rng = randomness.generator(seed, randomness.COHORT, round)
    size = num_clients if among is None else len(among)
    # Drawing the number first, then the clients, gives the same distribution as a coin toss for every client.
    return _subset(rng, size, int(rng.binomial(size, clients_per_round / num_clients)), among)


def round_robin(
    *, seed: int, round: int, num_clients: int, clients_per_round: int, among: IntArray | None = None
) -> IntArray:
    """Take the clients in turn, by their number, so that all take part equally often. Nothing is random.

    Example:
        >>> [round_robin(seed=0, round=r, num_clients=5, clients_per_round=2).tolist() for r in range(3)]
        [[0, 1], [2, 3], [0, 4]]
    """
    first = round * clients_per_round % num_clients
    if among is None:
        return np.sort((first + np.arange(min(clients_per_round, num_clients), dtype=np.int64)) % num_clients)
    order = np.argsort((among - first) % num_clients)
    return np.sort(among[order[:clients_per_round]])


def _subset(rng: np.random.Generator, size: int, wanted: int, among: IntArray | None) -> IntArray:
    places = np.sort(rng.choice(size, wanted, replace=False, shuffle=False)).astype(np.int64)
    return places if among is None else among[places]
