"""Who arrives when: a simulation that is the same however it is asked."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.server.asynchrony import AsyncSimulation, FedBuff


def simulation(clients: int, buffer: int, concurrency: int, seed: int = 0) -> AsyncSimulation:
    speeds = np.random.default_rng(seed).uniform(1.0, 20.0, clients)
    return AsyncSimulation(seed, clients, buffer, concurrency, lambda client, version: float(speeds[client]))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 20), st.integers(0, 5))
def test_every_round_is_a_full_buffer_in_the_order_of_time(
    buffer: int, concurrency: int, spare: int, seed: int
) -> None:
    made = simulation(buffer + concurrency - 1 + spare, buffer, concurrency, seed)
    before = 0.0
    for round in range(12):
        buffered = made.of_round(round)
        assert len(set(buffered.clients.tolist())) == buffer
        assert (np.diff(buffered.clients) > 0).all()
        assert (buffered.versions <= round).all()
        assert buffered.time >= before
        assert buffered.waiting <= round + 1
        before = buffered.time


def test_older_versions_are_kept_as_long_as_somebody_trains_from_them() -> None:
    made = simulation(30, 3, 9)
    kept = {0}
    for round in range(60):
        buffered = made.of_round(round)
        assert set(buffered.versions.tolist()) <= kept | {round}
        kept = {version for version in kept | {round} if version >= buffered.waiting}
        assert len(kept) < 30


def test_how_far_it_was_asked_before_does_not_matter() -> None:
    once, again = simulation(20, 4, 8), simulation(20, 4, 8)
    last = once.of_round(25)
    for round in range(26):
        step = again.of_round(round)
    for one, other in zip(last, step, strict=True):
        np.testing.assert_array_equal(one, other)


def test_by_hand() -> None:
    """Two clients of 2 and 3 seconds, no others, a buffer of one: an event list worked out on paper."""
    made = AsyncSimulation(0, 2, 1, 2, lambda client, version: (2.0, 3.0)[client])
    rounds = [made.of_round(round) for round in range(5)]
    assert [buffered.time for buffered in rounds] == [2.0, 3.0, 4.0, 6.0, 6.0]
    # Client 0 comes at 2, 4, 6, client 1 at 3, 6; at 6 the one that started earlier is first (client 1, at 3).
    assert [buffered.clients.tolist() for buffered in rounds] == [[0], [1], [0], [1], [0]]
    assert [buffered.versions.tolist() for buffered in rounds] == [[0], [0], [1], [2], [3]]


def test_same_as_a_simulation_of_another_kind() -> None:
    """As many clients as train at once and a buffer of one: every client comes again and again, by its own speed."""
    speeds = [1.5, 2.25, 4.0]
    made = AsyncSimulation(3, 3, 1, 3, lambda client, version: speeds[client])
    times = heapq.merge(*[[speed * n for n in range(1, 40)] for speed in speeds])
    assert [made.of_round(round).time for round in range(30)] == pytest.approx(list(times)[:30])


def test_clients_that_do_not_answer_are_not_asked_to_train() -> None:
    made = AsyncSimulation(0, 10, 2, 3, lambda client, version: 1.0, lambda start, client: client >= 5)
    assert min(int(made.of_round(round).clients.min()) for round in range(20)) >= 5


def test_scale_of_stale_updates() -> None:
    assert FedBuff().scale(3) == 0.5
    assert FedBuff(exponent=1.0).scale(3) == 0.25
    assert FedBuff(staleness="constant").scale(3) == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"concurrency": 0}, ValueError, "concurrency=0: pass an integer of at least 1"),
        ({"concurrency": 2.5}, TypeError, "concurrency=2.5: pass an integer"),
        ({"staleness": "hinge"}, ValueError, "staleness='hinge': pass 'polynomial'"),
        ({"exponent": "half"}, TypeError, "exponent='half': pass a number of at least 0"),
        ({"seconds": "fast"}, ValueError, "seconds='fast': pass one number above 0 per client"),
        ({"seconds": 3.0}, ValueError, "seconds=3.0: pass one number above 0 per client"),
        ({"exponent": -1.0}, ValueError, "exponent=-1.0: pass a number of at least 0"),
        ({"seconds": [1.0, 0.0]}, ValueError, "pass one number above 0 per client"),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FedBuff(**options)  # type: ignore[arg-type]


def test_too_few_clients() -> None:
    assert FedBuff().concurrent(5, 100) == 10
    assert FedBuff().concurrent(5, 8) == 4
    with pytest.raises(ValueError, match=r"concurrency=8 with clients_per_round=5: this needs 12 clients.*10"):
        FedBuff(concurrency=8).concurrent(5, 10)
