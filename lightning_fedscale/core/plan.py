"""Who trains where and on what in a round: pure functions of (seed, round, client)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lightning_fedscale.devices.population import Selection
from lightning_fedscale.samplers import Sampler, reads_losses
from lightning_fedscale.server.asynchrony import Flush
from lightning_fedscale.types import Cursor, IntArray
from lightning_fedscale.utils import randomness


class Simulated(NamedTuple):
    """What a round would be on the clients' own hardware: who counts and when, and the batches of those."""

    selection: Selection
    batch_sizes: IntArray


class RoundPlan(NamedTuple):
    """The cohort of a round and the rank that trains each client; both may be empty, and ranks may be without a client.

    With simulated hardware, how that turned out; ``local_steps`` is None where passes over the data are counted. In
    asynchronous training, ``arrived`` says when this cohort's updates were there, and from which models they started.
    """

    round: int
    cohort: IntArray
    ranks: IntArray
    simulated: Simulated | None = None
    arrived: Flush | None = None
    local_steps: int | None = None

    def clients_of(self, rank: int) -> list[int]:
        """The clients that ``rank`` trains, in cohort order."""
        clients: list[int] = self.cohort[self.ranks == rank].tolist()
        return clients


class LocalWork(NamedTuple):
    """What one client does in one round: its batches in order, where it goes on next time, what it draws from.

    ``keys`` are the strategy's seed and the round.
    """

    client: int
    held: int
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
    """The seed of a client's random numbers in a round: dropout, augmentation, whatever its training draws."""
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

    A sampler may choose fewer clients than there are ranks, or none (Poisson sampling, availability). The ranks that
    get none then have nothing to train in this round.

    Args:
        round: index of the round, from 0.
        seed: the strategy's seed.
        sampler: chooses the cohort.
        num_clients: number of registered clients.
        clients_per_round: number of clients asked.
        cost: work of given clients, in any unit, to balance the ranks by.
        world_size: number of ranks.
        simulate: who of those that are asked takes part; None for all.
        losses: last known training losses by client, for samplers that read them.

    Raises:
        TypeError: if the sampler's answer is not a one-dimensional array of integers.
        ValueError: if it is not an ascending set of clients.

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
        simulated = simulate(cohort) if len(cohort) else nobody_simulated()
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
    """The clients that a sampler chooses; arguments and errors are those of `plan_round`."""
    known = {"losses": losses or {}} if reads_losses(sampler) else {}
    chosen = sampler(seed=seed, round=round, num_clients=num_clients, clients_per_round=clients_per_round, **known)
    cohort = np.asarray(chosen)
    if cohort.ndim != 1 or (len(cohort) and cohort.dtype.kind not in "iu"):
        raise TypeError(
            f"sampler={sampler!r} must return a one-dimensional array of client numbers, got {chosen!r} for round"
            f" {round}."
        )
    cohort = cohort.astype(np.int64)
    if len(cohort) and ((np.diff(cohort) <= 0).any() or cohort[0] < 0 or cohort[-1] >= num_clients):
        raise ValueError(
            f"sampler={sampler!r} must return distinct clients below {num_clients} in ascending order, got"
            f" {cohort.tolist()[:10]} for round {round}."
        )
    return cohort


def nobody_simulated() -> Simulated:
    """A round in which nobody takes part: it takes no time."""
    nobody = np.zeros(0, dtype=np.int64)
    return Simulated(Selection(nobody, np.zeros(0), nobody, 0.0), nobody)


def place_longest_first(costs: IntArray, world_size: int) -> IntArray:
    """Give every client, costliest first, to the rank with the least work so far (Graham 1969, LPT).

    The slowest rank's load is at most ``4/3 - 1/(3 * world_size)`` of the optimum. With at least ``world_size``
    clients no rank stays empty. Ties go to the lower index, so the answer is unique.

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
    """The order in which a client sees its samples in one pass.

    Args:
        indices: dataset positions of the client's samples, in any order.
        shuffle: whether the user's loader shuffles; if not, the dataset's own order is kept.
        seed: the strategy's seed.
        client: index of the client.
        number: number of the pass, counted from the client's first.
    """
    ordered = np.sort(indices)
    if not shuffle:
        return ordered
    return randomness.generator(seed, randomness.ORDER, client, number).permutation(ordered)


def epochs_from(first_pass: int, epochs: int, batches_of: Callable[[int], list[list[int]]]) -> list[list[int]]:
    """The batches of ``epochs`` whole passes, starting with pass number ``first_pass``."""
    return [batch for number in range(first_pass, first_pass + epochs) for batch in batches_of(number)]


def steps_from(
    cursor: Cursor, steps: int, batches_of: Callable[[int], list[list[int]]]
) -> tuple[list[list[int]], Cursor]:
    """The next ``steps`` batches of an endless sequence of passes, and where to go on.

    Args:
        cursor: where the client stopped the last time, ``(0, 0)`` at first.
        steps: number of batches to take.
        batches_of: the batches of a pass; never empty.

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
