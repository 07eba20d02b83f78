"""The plan of a round: its cohort, each client's rank and batches, as pure functions of (seed, round, client)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lightning_fedscale.devices.population import Selection
from lightning_fedscale.samplers import Sampler, reads_losses
from lightning_fedscale.server.asynchrony import BufferedRound
from lightning_fedscale.types import Cursor, IntArray
from lightning_fedscale.utils import randomness


class Simulated(NamedTuple):
    """A round on the clients' simulated hardware: the clients that count, their times, and their batch sizes."""

    selection: Selection
    batch_sizes: IntArray


class RoundPlan(NamedTuple):
    """The cohort of a round and the rank that trains each client; both may be empty, and a rank may have no client.

    ``simulated`` is the outcome on simulated hardware. ``local_steps`` is None if local work is given in epochs. In
    asynchronous training, ``buffered`` says when this cohort's updates arrived and from which models they started.
    """

    round: int
    cohort: IntArray
    ranks: IntArray
    simulated: Simulated | None = None
    buffered: BufferedRound | None = None
    local_steps: int | None = None

    def clients_of(self, rank: int) -> list[int]:
        """Return the clients that ``rank`` trains, in cohort order."""
        clients: list[int] = self.cohort[self.ranks == rank].tolist()
        return clients


class LocalWork(NamedTuple):
    """The work of one client in one round: its batches in order, where it resumes next time, and its random seed.

    ``num_samples`` is its number of samples; ``keys`` are the strategy's seed and the round.
    """

    client: int
    num_samples: int
    batches: list[list[int]]
    cursor: Cursor
    keys: tuple[int, int]

    @property
    def seed(self) -> int:
        """The seed of the client's random numbers in this round."""
        return client_seed(*self.keys, self.client)

    @property
    def samples(self) -> int:
        """Samples over all batches."""
        return sum(map(len, self.batches))


def client_seed(seed: int, round: int, client: int) -> int:
    """Return the seed of all random numbers of a client's training in a round, such as dropout and augmentation."""
    return randomness.derive(seed, randomness.CLIENT, round, client)


def plan_round(
    round: int,
    *,
    seed: int,
    sampler: Sampler,
    num_clients: int,
    clients_per_round: int,
    cost: Callable[[IntArray], IntArray],
    world_size: int,
    simulate: Callable[[IntArray], Simulated] | None = None,
    losses: Mapping[int, float] | None = None,
) -> RoundPlan:
    """Sample the cohort of a round and place it on the ranks, in time proportional to the cohort.

    A sampler may choose fewer clients than there are ranks, or none (Poisson sampling, availability). Ranks without
    a client then train nothing in this round.

    Args:
        round: index of the round, from 0.
        seed: the strategy's seed.
        sampler: chooses the cohort.
        num_clients: number of clients.
        clients_per_round: number of clients that the sampler should choose.
        cost: work of given clients, in any unit, by which the ranks are balanced.
        world_size: number of ranks.
        simulate: selects the sampled clients that take part; None for all.
        losses: last known training losses by client, for samplers that read them.

    Raises:
        TypeError: if the sampler does not return a one-dimensional array of integers.
        ValueError: if its clients are not distinct and in ascending order.

    Example:
        >>> from lightning_fedscale.samplers import uniform
        >>> plan = plan_round(0, seed=0, sampler=uniform, num_clients=4, clients_per_round=4,
        ...                   cost=lambda clients: 10 - clients, world_size=2)
        >>> plan.clients_of(0), plan.clients_of(1)
        ([0, 3], [1, 2])
    """
    cohort = sampled(sampler, seed, round, num_clients, clients_per_round, losses)
    simulated = None
    if simulate is not None:
        simulated = simulate(cohort) if len(cohort) else empty_simulation()
        cohort = simulated.selection.clients
    return RoundPlan(round, cohort, place_longest_first(cost(cohort), world_size), simulated)


def sampled(
    sampler: Sampler,
    seed: int,
    round: int,
    num_clients: int,
    clients_per_round: int,
    losses: Mapping[int, float] | None = None,
) -> IntArray:
    """Return the clients that a sampler chooses; arguments and errors are those of `plan_round`."""
    known = {"losses": losses or {}} if reads_losses(sampler) else {}
    chosen = sampler(seed=seed, round=round, num_clients=num_clients, clients_per_round=clients_per_round, **known)
    cohort = np.asarray(chosen)
    if cohort.ndim != 1 or (len(cohort) and cohort.dtype.kind not in "iu"):
        raise TypeError(
            f"sampler={sampler!r}: must return a one-dimensional array of client numbers, but returned {chosen!r} in"
            f" round {round}."
        )
    cohort = cohort.astype(np.int64)
    if len(cohort) and ((np.diff(cohort) <= 0).any() or cohort[0] < 0 or cohort[-1] >= num_clients):
        raise ValueError(
            f"sampler={sampler!r}: must return distinct clients below {num_clients} in ascending order, but returned"
            f" {cohort.tolist()[:10]} in round {round}."
        )
    return cohort


def empty_simulation() -> Simulated:
    """Return a round without clients, which takes no time."""
    none = np.zeros(0, dtype=np.int64)
    return Simulated(Selection(none, np.zeros(0), none, 0.0), none)


def place_longest_first(costs: IntArray, world_size: int) -> IntArray:
    """Give every client, costliest first, to the rank with the least work so far (Graham 1969, LPT).

    The slowest rank's load is at most ``4/3 - 1/(3 * world_size)`` of the optimum. With at least ``world_size``
    clients, every rank has one. Ties go to the lower index, so the result is unique.

    Args:
        costs: work of each client, in any unit.
        world_size: number of ranks.

    Returns:
        The rank of each client.

    Example:
        >>> place_longest_first(np.array([5, 1, 4, 3]), 2).tolist()
        [0, 0, 1, 1]
    """
    ranks = np.zeros(len(costs), dtype=np.int64)
    if world_size == 1:
        return ranks
    loads = [(0, rank) for rank in range(world_size)]
    for client in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        ranks[client] = rank
        heapq.heappush(loads, (load + max(1, int(costs[client])), rank))
    return ranks


def pass_order(indices: IntArray, *, shuffle: bool, seed: int, client: int, number: int) -> IntArray:
    """Return the order in which a client sees its samples in one pass.

    Args:
        indices: dataset positions of the client's samples, in any order.
        shuffle: whether the user's loader shuffles; if not, the dataset's order is kept.
        seed: the strategy's seed.
        client: index of the client.
        number: number of the pass, counted from the client's first.
    """
    ordered = np.sort(indices)
    if not shuffle:
        return ordered
    return randomness.generator(seed, randomness.ORDER, client, number).permutation(ordered)


def epochs_from(first_pass: int, epochs: int, batches_of: Callable[[int], list[list[int]]]) -> list[list[int]]:
    """Return the batches of ``epochs`` whole passes, starting with pass number ``first_pass``."""
    return [batch for number in range(first_pass, first_pass + epochs) for batch in batches_of(number)]


def steps_from(
    cursor: Cursor, steps: int, batches_of: Callable[[int], list[list[int]]]
) -> tuple[list[list[int]], Cursor]:
    """Return the next ``steps`` batches of an endless sequence of passes, and the cursor after them.

    Args:
        cursor: where the client stopped last time as (pass, batch); ``(0, 0)`` at first.
        steps: number of batches to take.
        batches_of: returns the batches of a pass; never empty.

    Example:
        >>> steps_from((0, 1), 3, lambda number: [[number, 0], [number, 1]])
        ([[0, 1], [1, 0], [1, 1]], (2, 0))
    """
    number, position = cursor
    taken: list[list[int]] = []
    while len(taken) < steps:
        batches = batches_of(number)
        part = batches[position : position + steps - len(taken)]
        taken += part
        position += len(part)
        if position >= len(batches):
            number, position = number + 1, 0
    return taken, (number, position)
