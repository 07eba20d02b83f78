"""Samplers: pure, distinct, ascending, and with the probabilities that they claim."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedscale import samplers
from lightning_fedscale.samplers import (
    Sampler,
    available,
    daily_cycle,
    drop_out,
    poisson,
    power_of_choice,
    reads_losses,
    round_robin,
    uniform,
    weighted,
)
from lightning_fedscale.types import IntArray

CLIENTS = 12
LOSSES = {client: float(client % 5) for client in range(8)}
TRACE = np.random.default_rng(0).random((7, CLIENTS)) < 0.5

SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "poisson": poisson,
    "round_robin": round_robin,
    "weighted": weighted([0.0, *range(1, CLIENTS)]),
    "power_of_choice": power_of_choice(CLIENTS),
    "power_of_choice, weighted": power_of_choice(CLIENTS, [0.0, *range(1, CLIENTS)]),
    **{
        f"available, {name}": available(inner, TRACE)
        for name, inner in {
            "uniform": uniform,
            "poisson": poisson,
            "round_robin": round_robin,
            "weighted": weighted(np.arange(1.0, CLIENTS + 1)),
            "power_of_choice": power_of_choice(CLIENTS),
        }.items()
    },
    "daily_cycle": daily_cycle(uniform, 5, 0.4),
    "drop_out": drop_out(uniform, 0.3),
    "all of it": drop_out(daily_cycle(available(power_of_choice(CLIENTS), TRACE), 6), 0.2),
}


def draw(sampler: Sampler, round: int = 0, wanted: int = 4, seed: int = 0, clients: int = CLIENTS) -> IntArray:
    known: dict[str, Any] = {"losses": LOSSES} if reads_losses(sampler) else {}
    return sampler(seed=seed, round=round, num_clients=clients, clients_per_round=wanted, **known)


@pytest.mark.parametrize("name", SAMPLERS)
@given(seed=st.integers(0, 2**40), round=st.integers(0, 10_000), wanted=st.integers(1, CLIENTS))
def test_a_cohort_is_a_pure_ascending_set(name: str, seed: int, round: int, wanted: int) -> None:
    sampler = SAMPLERS[name]
    cohort = draw(sampler, round, wanted, seed)
    assert cohort.dtype == np.int64
    assert cohort.ndim == 1
    assert (np.diff(cohort) > 0).all()
    assert set(cohort.tolist()) <= set(range(CLIENTS))
    if "poisson" not in name:
        assert len(cohort) <= wanted
    again = draw(pickle.loads(pickle.dumps(sampler)), round, wanted, seed)
    assert cohort.tolist() == again.tolist()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "round_robin" not in name])
def test_seeds_and_rounds_matter(name: str) -> None:
    def drawn(seed: int, round: int) -> tuple[int, ...]:
        return tuple(SAMPLERS[name](seed=seed, round=round, num_clients=CLIENTS, clients_per_round=2))

    by_seed = {drawn(seed, 0) for seed in range(30)}
    by_round = {drawn(0, 7 * round) for round in range(30)}
    assert len(by_seed) > 1
    assert len(by_round) > 1


def frequencies(sampler: Sampler, rounds: int = 4000, wanted: int = 4, clients: int = CLIENTS) -> Any:
    cohorts = [draw(sampler, round, wanted, clients=clients) for round in range(rounds)]
    return np.bincount(np.concatenate(cohorts), minlength=clients) / rounds


@pytest.mark.parametrize("sampler", [uniform, poisson])
def test_clients_have_equal_chances(sampler: Sampler) -> None:
    assert np.abs(frequencies(sampler) - 4 / CLIENTS).max() < 0.03  # four standard deviations


def test_poisson_cohorts_are_binomial_and_clients_independent() -> None:
    rounds = 4000
    member = np.zeros((rounds, CLIENTS))
    for round in range(rounds):
        member[round, draw(poisson, round)] = 1
    q, sizes = 4 / CLIENTS, member.sum(1)
    assert abs(sizes.var() - CLIENTS * q * (1 - q)) < 0.3
    assert (sizes == 0).sum() == pytest.approx(rounds * (1 - q) ** CLIENTS, abs=25)
    off_diagonal = np.asarray(np.corrcoef(member.T))[~np.eye(CLIENTS, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.08


def test_weighted_draws_one_after_the_other() -> None:
    """Against the probabilities of ordered draws, summed by hand."""
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    p, expected = weights / weights.sum(), np.zeros(4)
    for first in range(4):
        for second in set(range(4)) - {first}:
            expected[[first, second]] += p[first] * weights[second] / (weights.sum() - weights[first])
    assert np.abs(frequencies(weighted(weights), 6000, 2, 4) - expected).max() < 0.03


def test_round_robin_treats_all_alike() -> None:
    counts = frequencies(round_robin, rounds=3 * CLIENTS, wanted=5)
    assert set(counts.tolist()) == {5 / CLIENTS}


def test_power_of_choice_takes_the_worst_and_the_unknown_first() -> None:
    losses = {0: 1.0, 1: 9.0, 2: 5.0, 3: 7.0}
    sampler: Any = power_of_choice(candidates=5)
    for round in range(10):
        drawn = sampler(seed=0, round=round, num_clients=5, clients_per_round=3, losses=losses)
        assert drawn.tolist() == [1, 3, 4]
    # Among candidates only: the worst of two candidates is client 1 whenever it is one, in 2 of 5 rounds.
    sampler = power_of_choice(candidates=2)
    losses[4] = 0.0
    drawn = [sampler(seed=0, round=r, num_clients=5, clients_per_round=1, losses=losses).item() for r in range(3000)]
    shares = np.bincount(drawn, minlength=5) / 3000
    np.testing.assert_allclose(shares, [0.1, 0.4, 0.2, 0.3, 0.0], atol=0.03)


def test_power_of_choice_is_uniform_while_nothing_is_known() -> None:
    sampler: Any = power_of_choice(candidates=CLIENTS)
    drawn = [sampler(seed=0, round=r, num_clients=CLIENTS, clients_per_round=3) for r in range(4000)]
    assert np.abs(np.bincount(np.concatenate(drawn)) / 4000 - 0.25).max() < 0.03


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.startswith("available")])
def test_only_available_clients_take_part(name: str) -> None:
    for round in range(20):
        there = set(np.flatnonzero(TRACE[round % 7]).tolist())
        cohort = set(draw(SAMPLERS[name], round, wanted=3).tolist())
        assert cohort <= there
        if "poisson" not in name:
            assert len(cohort) == min(3, len(there))


def test_nobody_may_be_there() -> None:
    for sampler in (uniform, poisson, round_robin, weighted([1, 1]), power_of_choice(2)):
        cohort = draw(available(sampler, [[0, 0]]), wanted=2, clients=2)
        assert cohort.tolist() == []
        assert cohort.dtype == np.int64


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_trace_can_be_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"trace.{suffix}"
    rows = TRACE.astype(int).tolist()
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(",".join(map(str, row)) for row in rows))
    for round in range(10):
        assert draw(available(uniform, path), round).tolist() == draw(available(uniform, TRACE), round).tolist()


def test_a_daily_cycle_returns_every_day() -> None:
    sampler = daily_cycle(uniform, period=24, share=0.5)
    days = [[draw(sampler, 24 * day + hour, wanted=1000, clients=1000) for hour in range(24)] for day in range(2)]
    for first, second in zip(*days, strict=True):
        assert first.tolist() == second.tolist()
        assert 400 < len(first) < 600
    assert len(set(days[0][0].tolist()) & set(days[0][12].tolist())) == 0  # half a day later it is the others' turn


def test_drop_out_loses_the_right_share() -> None:
    left = sum(len(draw(drop_out(uniform, 0.3), round, wanted=10)) for round in range(2000))
    assert left / 20_000 == pytest.approx(0.7, abs=0.015)
    assert draw(drop_out(uniform, 0.0)).tolist() == draw(uniform).tolist()


def test_drop_out_takes_samplers_of_ones_own() -> None:
    def first(*, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
        return np.arange(clients_per_round)

    assert set(draw(drop_out(first, 0.5), wanted=8).tolist()) < set(range(8))
    with pytest.raises(TypeError, match="among"):
        available(first, TRACE)


def test_wrappers_say_that_the_losses_are_read() -> None:
    assert [name for name, sampler in SAMPLERS.items() if reads_losses(sampler)] == [
        name for name in SAMPLERS if "power_of_choice" in name or name == "all of it"
    ]


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: weighted([1.0, -1.0]), ValueError, r"weights=.*pass one finite number"),
        (lambda: weighted([0.0, 0.0]), ValueError, "not all of them 0"),
        (lambda: weighted(["many"]), TypeError, "weights=.*list of numbers"),  # type: ignore[list-item]
        (lambda: draw(weighted([1.0])), ValueError, "weights has 1 entries for 12 clients"),
        (lambda: power_of_choice(0), ValueError, "candidates=0: pass an integer of at least 1"),
        (lambda: draw(power_of_choice(3)), ValueError, "candidates=3: .*clients_per_round=4"),
        (lambda: available(uniform, [1, 0]), ValueError, "trace has shape"),
        (lambda: available(uniform, [[0.5]]), ValueError, "pass 0 and 1"),
        (lambda: available(uniform, "nowhere.csv"), ValueError, "trace='nowhere.csv'.*not found"),
        (lambda: draw(available(uniform, [[1, 0]])), ValueError, "trace has 2 columns for 12 clients"),
        (lambda: available("uniform", TRACE), TypeError, "sampler='uniform': pass a sampler"),  # type: ignore[arg-type]
        (lambda: daily_cycle(uniform, 1), ValueError, "period=1: pass an integer of at least 2"),
        (lambda: daily_cycle(uniform, 24, 0.0), ValueError, "share=0.0: .* above 0"),
        (lambda: drop_out(uniform, 1.0), ValueError, r"probability=1.0: pass a number in \[0, 1\)"),
        (lambda: drop_out(weighted, 0.1), TypeError, "sampler=<function weighted"),  # type: ignore[arg-type]
        (lambda: samplers.by_name("poison"), ValueError, "Did you mean 'poisson'"),
        (lambda: samplers.by_name("weighted"), ValueError, r"needs weights: pass an object, weighted\(weights=...\)"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_names_are_the_samplers_themselves() -> None:
    assert [samplers.by_name(name) for name in ("uniform", "poisson", "round_robin")] == [uniform, poisson, round_robin]
