"""Who takes part in a round."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lightning_fedscale import randomness
from lightning_fedscale.types import IntArray


class Sampler(Protocol):
    """A pure function from (seed, round) to a cohort: every rank calls it and must get the same answer."""

    def __call__(self, *, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
        """The clients of this round: distinct indices below ``num_clients``, ascending.

        Args:
            seed: the strategy's seed.
            round: index of the round, from 0.
            num_clients: number of registered clients.
            clients_per_round: number of clients wanted.
        """


def uniform(*, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
    """Every cohort of the wanted size with equal probability, without replacement (FedAvg, arXiv 1602.05629).

    Takes time and memory in proportion to the cohort, not to the number of clients.

    Example:
        >>> cohort = uniform(seed=0, round=3, num_clients=1_000_000, clients_per_round=4)
        >>> len(set(cohort.tolist())), bool((np.diff(cohort) > 0).all())
        (4, True)
        >>> uniform(seed=0, round=3, num_clients=3, clients_per_round=3).tolist()
        [0, 1, 2]
    """
    if clients_per_round == num_clients:
        return np.arange(num_clients, dtype=np.int64)
    rng = randomness.generator(seed, randomness.COHORT, round)
    return np.sort(rng.choice(num_clients, clients_per_round, replace=False, shuffle=False)).astype(np.int64)
