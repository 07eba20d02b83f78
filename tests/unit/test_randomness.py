"""Random numbers as a function of their keys."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.randomness import BATCH, CLIENT, COHORT, LOADER, ORDER

CPU = torch.device("cpu")
PURPOSES = (COHORT, ORDER, CLIENT, BATCH, LOADER)


def test_nearby_keys_never_collide() -> None:
    # Each purpose has one number of keys, so lengths need not be mixed (a zero at the end would not be seen).
    for keys in (list(product(range(8), PURPOSES, range(12), range(12))), list(product(range(8), PURPOSES, range(99)))):
        assert len({randomness.derive(*key) for key in keys}) == len(keys)


def test_clients_of_many_rounds_never_collide() -> None:
    keys = list(product(range(2), range(200), range(100)))
    assert len({randomness.derive(seed, CLIENT, round, client) for seed, round, client in keys}) == len(keys)


def test_derived_seeds_fit_every_generator_and_never_change() -> None:
    # A change of these numbers changes every run: it belongs into the change log under "Numerics".
    assert randomness.derive(0, CLIENT, 3, 7) == 2303769623222782618
    assert randomness.derive(2**70, ORDER, 0) >= 0
    seeds = [randomness.derive(0, CLIENT, round, 0) for round in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Every one of the 63 bits is a coin.
    ones = (np.array(seeds)[:, None] >> np.arange(63) & 1).mean(axis=0)
    assert abs(ones - 0.5).max() < 6 * 0.5 / np.sqrt(2000)


def test_generators_of_equal_keys_agree_and_of_others_do_not() -> None:
    def draw(*keys: int) -> list[int]:
        return randomness.generator(0, ORDER, *keys).integers(0, 2**62, 4).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(2, 1)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_restore_brings_back_what_was_captured() -> None:
    state = randomness.capture(CPU)
    first = drawn()
    randomness.seed_globals(5, CPU)
    other = drawn()
    randomness.restore(state, CPU)
    assert drawn() == first
    assert len({*first, *other}) == 6


def test_captured_state_is_not_moved_by_later_draws() -> None:
    state = randomness.capture(CPU)
    first = [drawn() for _ in range(3)]
    for _ in range(2):
        randomness.restore(state, CPU)
        assert [drawn() for _ in range(3)] == first


def test_seed_globals_equals_seeding_each() -> None:
    seed = randomness.derive(0, CLIENT, 1, 2)
    before = randomness.capture(CPU)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    expected = drawn()
    randomness.seed_globals(seed, CPU)
    assert drawn() == expected
    randomness.restore(before, CPU)


@pytest.mark.parametrize("keys", [(0, 0), (7, 1, 2, 3), (2**32 - 1, 4), (2**32, 4), (1, 2, 2**40), (2**70, 0, 1)])
def test_streams_are_numpys_for_these_keys(keys: tuple[int, ...]) -> None:
    """However the keys are handed over."""
    sequence = np.random.SeedSequence(list(keys))
    assert randomness.derive(*keys) == int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    drawn = randomness.generator(*keys).permutation(50)
    assert drawn.tolist() == np.random.default_rng(list(keys)).permutation(50).tolist()
