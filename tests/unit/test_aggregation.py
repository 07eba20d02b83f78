"""The mean: exact in any order of clients and on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedscale.aggregators import Aggregator, by_name, mean
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils.collectives import JointBuffer

quick = settings(max_examples=40, deadline=None)

# Deltas as federated training makes them: differences of float32 weights of like size, so that the exact sum of a
# few with whole weights fits into the 53 bits of a float64.
deltas = st.integers(-(2**24), 2**24).map(lambda n: n * 2.0**-30)
anything = st.floats(-1e30, 1e30, allow_nan=False)

COHORT = Cohort(0, np.arange(8), num_clients=8, trainable=3, seed=0)


def clients(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[tuple[int, list[float]]]]:
    """Up to 8 clients, each with the number of its samples and a delta of 3 elements."""
    one = st.tuples(st.integers(1, 10**5), st.lists(values, min_size=3, max_size=3))
    return st.lists(one, min_size=1, max_size=8)


def finished(rule: Aggregator, total: Tensor) -> Tensor:
    return cast("Callable[[Tensor, Cohort], Tensor]", rule.finish)(total, COHORT)  # of a rule without state


def accumulated(rule: Aggregator, members: list[tuple[int, list[float]]]) -> Tensor:
    total = rule.init(torch.zeros(3, dtype=torch.float64), COHORT)
    scratch = torch.empty(3, dtype=torch.float64)
    for number, (held, delta) in enumerate(members):
        scratch.copy_(torch.tensor(delta, dtype=torch.float64))
        update = ClientUpdate(number, scratch, 1.0, held, held, 1, 0.0, 0.0)
        total = rule.accumulate(total, update, rule.weigh(update), COHORT)
    return total


@quick
@given(clients(deltas), st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_and_ranks_change_no_bit(
    members: list[tuple[int, list[float]]], random: np.random.RandomState, world_size: int
) -> None:
    rule = mean()
    expected = finished(rule, accumulated(rule, members))
    mixed = list(members)
    random.shuffle(mixed)
    assert torch.equal(finished(rule, accumulated(rule, mixed)), expected)
    # The one collective adds up what the ranks accumulated.
    ranks = [accumulated(rule, mixed[rank::world_size]) for rank in range(world_size)]
    assert torch.equal(finished(rule, torch.stack(ranks).sum(0)), expected)


@quick
@given(clients(deltas), st.sampled_from(["samples", "uniform"]))
def test_equals_the_exact_weighted_mean(members: list[tuple[int, list[float]]], weighting: str) -> None:
    rule = mean(weighting)
    got = finished(rule, accumulated(rule, members))
    weights = [Fraction(held if weighting == "samples" else 1) for held, _ in members]
    for element in range(3):
        pairs = zip(weights, members, strict=True)
        total = sum((weight * Fraction(delta[element]) for weight, (_, delta) in pairs), Fraction())
        exact = total / sum(weights, Fraction())
        # One rounding: the division.
        assert abs(Fraction(float(got[element])) - exact) <= Fraction(float(np.spacing(abs(float(exact))))) / 2


@quick
@given(clients(anything))
def test_any_finite_deltas_agree_with_numpy(members: list[tuple[int, list[float]]]) -> None:
    rule = mean()
    got = finished(rule, accumulated(rule, members)).numpy()
    held, values = np.array([m[0] for m in members]), np.array([m[1] for m in members])
    expected = np.average(values, axis=0, weights=held)
    scale = np.average(abs(values), axis=0, weights=held)
    assert (abs(got - expected) <= 1e-14 * scale).all()


def test_one_client_passes_through_unchanged() -> None:
    rule = mean()
    delta = [0.1, -3.0, 1e-20]
    assert finished(rule, accumulated(rule, [(1, delta)])).tolist() == delta
    assert finished(rule, accumulated(rule, [(4, delta)])).tolist() == delta


@pytest.mark.parametrize(("name", "expected"), [("mean", [2.5, 2.5, 2.5]), ("uniform", [2.0, 2.0, 2.0])])
def test_by_name(name: str, expected: list[float]) -> None:
    rule = by_name(name)
    assert finished(rule, accumulated(rule, [(1, [1.0] * 3), (3, [3.0] * 3)])).tolist() == expected


def test_weights_are_those_that_the_record_shows() -> None:
    update = ClientUpdate(0, torch.zeros(1), 0.0, num_samples=12, samples=24, steps=3, loss=0.0, seconds=0.0)
    assert mean().weigh(update) == 12.0
    assert mean("uniform").weigh(update) == 1.0


def test_unknown_weighting() -> None:
    with pytest.raises(ValueError, match="weighting='steps': pass one of 'samples', 'uniform'"):
        mean("steps")


@pytest.mark.parametrize("size", [1, 2**18 - 1, 2**18, 2**18 + 1, 3 * 2**18 + 5])
def test_long_vectors_are_added_up_in_parts(size: int) -> None:
    rule = mean()
    generator = torch.Generator().manual_seed(size)
    deltas = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(3)]
    total = rule.init(deltas[0], COHORT)
    for number, delta in enumerate(deltas):
        kept = delta.clone()
        update = ClientUpdate(number, delta, 1.0, 3 + number, 1, 1, 0.0, 0.0)
        assert rule.accumulate(total, update, rule.weigh(update), COHORT) is total
        assert torch.equal(delta, kept)  # callbacks may have kept it
    assert torch.equal(finished(rule, total), (3.0 * deltas[0] + 4.0 * deltas[1] + 5.0 * deltas[2]) / 12.0)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_buffer_crosses_the_ranks_with_what_an_aggregator_made_of_it(in_place: bool) -> None:
    joint = JointBuffer(torch.zeros(3, dtype=torch.float64), numbers=2)
    ones = torch.ones(3, dtype=torch.float64)
    total = joint.vector.add_(ones) if in_place else joint.vector + ones
    vector, numbers = joint.sum_over_ranks(total, torch.tensor([5.0, 7.0], dtype=torch.float64))
    assert vector.tolist() == [1.0] * 3
    assert numbers.tolist() == [5.0, 7.0]
    assert vector.data_ptr() == joint.vector.data_ptr()
    assert numbers.data_ptr() == vector.data_ptr() + 3 * 8  # one flat buffer
