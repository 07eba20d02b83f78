"""Who trains where and on what: properties of the plan, of a client's passes and of the cursor."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from lightning_fedscale.core.plan import epochs_from, pass_order, place_longest_first, plan_round, steps_from
from lightning_fedscale.samplers import uniform
from lightning_fedscale.types import IntArray

quick = settings(max_examples=40, deadline=None)
costs = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def loads(of: IntArray, ranks: IntArray, world_size: int) -> IntArray:
    return np.array([of[ranks == rank].sum() for rank in range(world_size)])


@quick
@given(costs, st.integers(1, 5))
def test_placement_is_total_and_leaves_no_rank_empty(values: list[int], world_size: int) -> None:
    of = np.array(values)
    ranks = place_longest_first(of, world_size)
    assert ranks.shape == of.shape
    assert set(ranks.tolist()) <= set(range(world_size))
    assert len(set(ranks.tolist())) == min(world_size, len(of))
    assert (place_longest_first(of, world_size) == ranks).all()


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_placement_keeps_grahams_bound(values: list[int], world_size: int) -> None:
    of = np.array(values)
    best = min(loads(of, np.array(ranks), world_size).max() for ranks in product(range(world_size), repeat=len(values)))
    slowest = loads(of, place_longest_first(of, world_size), world_size).max()
    assert slowest * 3 * world_size <= best * (4 * world_size - 1)


def test_placement_meets_grahams_bound_exactly_where_it_is_tight() -> None:
    # Graham 1969: for m ranks the jobs 2m-1, 2m-1, ..., m+1, m+1, m, m, m take 4m-1 where 3m is possible.
    of = np.array([5, 5, 4, 4, 3, 3, 3])
    assert loads(of, place_longest_first(of, 3), 3).max() == 11
    optimum = np.array([0, 1, 0, 1, 2, 2, 2])
    assert loads(of, optimum, 3).max() == 9


@quick
@given(st.integers(0, 2**70), st.integers(0, 10**6), st.integers(1, 40), st.data())
def test_plan_places_every_client_of_the_cohort_once(
    seed: int, round: int, num_clients: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, num_clients))
    world_size = data.draw(st.integers(1, min(wanted, 4)))
    sizes = np.random.default_rng(seed).integers(1, 50, num_clients)

    def plan(of: int) -> tuple[list[int], list[list[int]]]:
        made = plan_round(
            round,
            seed=seed,
            sampler=uniform,
            num_clients=num_clients,
            clients_per_round=wanted,
            cost=lambda clients: sizes[clients],
            world_size=of,
        )
        return made.cohort.tolist(), [made.clients_of(rank) for rank in range(of)]

    cohort, ranks = plan(world_size)
    assert cohort == sorted(set(cohort))
    assert len(cohort) == wanted
    assert sorted(client for rank in ranks for client in rank) == cohort
    assert all(rank == sorted(rank) and rank for rank in ranks)
    assert plan(world_size) == (cohort, ranks)
    assert plan(1) == (cohort, [cohort])


@quick
@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(1, 60), st.data())
def test_uniform_sampler_is_a_sorted_set(seed: int, round: int, num_clients: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, num_clients))
    cohort = uniform(seed=seed, round=round, num_clients=num_clients, clients_per_round=wanted)
    assert cohort.dtype == np.int64
    assert len(cohort) == wanted
    assert (np.diff(cohort) > 0).all()
    assert cohort[0] >= 0
    assert cohort[-1] < num_clients
    again = uniform(seed=seed, round=round, num_clients=num_clients, clients_per_round=wanted)
    assert (again == cohort).all()


@pytest.mark.parametrize(("num_clients", "wanted"), [(20, 5), (7, 6), (200, 3)])
def test_uniform_sampler_gives_every_client_and_every_pair_the_same_chance(num_clients: int, wanted: int) -> None:
    rounds = 4000
    alone, together = np.zeros(num_clients), np.zeros((num_clients, num_clients))
    for round in range(rounds):
        cohort = uniform(seed=1, round=round, num_clients=num_clients, clients_per_round=wanted)
        alone[cohort] += 1
        together[np.ix_(cohort, cohort)] += 1
    share = wanted / num_clients
    # Drawing without replacement: counts have variance rounds * share * (1 - share) and add up to a constant.
    statistic = ((alone - rounds * share) ** 2).sum() / (rounds * share * (1 - share)) * (num_clients - 1) / num_clients
    assert chi2.ppf(0.0005, num_clients - 1) < statistic < chi2.ppf(0.9995, num_clients - 1)
    pairs = together[np.triu_indices(num_clients, 1)]
    expected = rounds * share * (wanted - 1) / (num_clients - 1)
    assert abs(pairs - expected).max() < 6 * np.sqrt(expected)


def test_uniform_sampler_depends_on_seed_and_round() -> None:
    cohorts = {
        tuple(uniform(seed=seed, round=round, num_clients=10**6, clients_per_round=3).tolist())
        for seed in range(20)
        for round in range(20)
    }
    assert len(cohorts) == 400


# A client's data

positions = st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True)


@quick
@given(positions, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.randoms())
def test_pass_order_is_a_permutation_that_ignores_how_the_samples_were_listed(
    samples: list[int], seed: int, client: int, number: int, random: np.random.RandomState
) -> None:
    def order(listed: list[int], *, shuffle: bool) -> list[int]:
        made = pass_order(np.array(listed), shuffle=shuffle, seed=seed, client=client, number=number)
        return made.tolist()

    mixed = list(samples)
    random.shuffle(mixed)
    assert sorted(order(samples, shuffle=True)) == sorted(samples)
    assert order(samples, shuffle=True) == order(mixed, shuffle=True)
    assert order(mixed, shuffle=False) == sorted(samples)


def test_passes_clients_and_seeds_have_orders_of_their_own() -> None:
    samples = np.arange(50)
    orders = {
        tuple(pass_order(samples, shuffle=True, seed=seed, client=client, number=number).tolist())
        for seed in range(5)
        for client in range(5)
        for number in range(5)
    }
    assert len(orders) == 125


def batches_of(number: int) -> list[list[int]]:
    """Passes of 1 to 4 batches."""
    return [[number, batch] for batch in range(1 + number * number % 4)]


@quick
@given(st.integers(0, 20), st.integers(1, 6))
def test_epochs_are_whole_passes_in_order(first: int, epochs: int) -> None:
    expected = [batch for number in range(first, first + epochs) for batch in batches_of(number)]
    assert epochs_from(first, epochs, batches_of) == expected
    split = epochs_from(first, 1, batches_of) + epochs_from(first + 1, epochs - 1, batches_of)
    assert split == expected


@quick
@given(st.lists(st.integers(0, 9), max_size=12))
def test_steps_continue_one_endless_sequence_however_they_are_split(parts: list[int]) -> None:
    endless = [batch for number in range(sum(parts) + 1) for batch in batches_of(number)]
    cursor, taken = (0, 0), []
    for part in parts:
        batches, cursor = steps_from(cursor, part, batches_of)
        assert len(batches) == part
        taken += batches
    assert taken == endless[: sum(parts)]
    # The cursor points at what comes next, and never behind the end of a pass.
    number, position = cursor
    assert batches_of(number)[position] == endless[sum(parts)]


@pytest.mark.parametrize(("chosen", "world_size"), [([], 1), ([], 3), ([0, 2], 3), ([3], 2), ([1, 2], 2)])
def test_ranks_may_be_without_a_client(chosen: list[int], world_size: int) -> None:
    made = plan_round(
        0, seed=0, sampler=lambda **_: np.array(chosen, dtype=np.int64), num_clients=4, clients_per_round=2,
        cost=lambda clients: np.ones(len(clients), dtype=np.int64), world_size=world_size,
    )  # fmt: skip
    assert made.cohort.tolist() == chosen
    assert len(set(made.ranks.tolist())) == min(len(chosen), world_size)
    assert sorted(client for rank in range(world_size) for client in made.clients_of(rank)) == chosen


def test_samplers_that_want_to_know_are_told_the_losses() -> None:
    class Hardest:
        reads_losses = True

        def __call__(self, *, losses: dict[int, float], **_: int) -> IntArray:
            return np.array([max(losses, key=lambda client: losses[client])])

    made = plan_round(
        1, seed=0, sampler=Hardest(), num_clients=4, clients_per_round=1,  # type: ignore[arg-type]
        cost=lambda clients: clients, world_size=1, losses={1: 0.5, 3: 2.0},
    )  # fmt: skip
    assert made.cohort.tolist() == [3]
