"""Fairness measures against their definitions and invariances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedscale.utils.fairness import jain_index, spread, tail_mean

VALUES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=40)


@given(VALUES, st.floats(0.01, 100), st.randoms())
def test_jain_is_bounded_and_ignores_scale_and_order(values, scale, random):
    index = jain_index(values)
    x = np.array(values)
    assert index == pytest.approx(x.mean() ** 2 / (x**2).mean())
    assert 1 / len(values) - 1e-12 <= index <= 1 + 1e-12
    shuffled = random.sample(values, len(values))
    assert jain_index([scale * value for value in shuffled]) == pytest.approx(index)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_jain_at_its_ends(count):
    assert jain_index([0.3] * count) == pytest.approx(1)
    assert jain_index([5.0] + [0.0] * (count - 1)) == pytest.approx(1 / count)
    assert jain_index([0.0] * count) == 1


@given(VALUES)
def test_tails_enclose_the_mean_and_mirror_each_other(values):
    low, high = (tail_mean(values, 0.1, highest=side) for side in (False, True))
    mean = np.mean(values)
    assert low <= mean * (1 + 1e-12)
    assert mean <= high * (1 + 1e-12)
    assert tail_mean(values, 1, highest=True) == pytest.approx(mean)
    assert tail_mean([-value for value in values], 0.1, highest=True) == pytest.approx(-low)


def test_ten_per_cent_of_twenty_is_two():
    assert tail_mean(list(range(20)), 0.1, highest=False) == 0.5
    assert tail_mean(list(range(20)), 0.1, highest=True) == 18.5
    assert tail_mean(list(range(100)), 0.07, highest=False) == 3


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="values"):
        jain_index([])
    with pytest.raises(ValueError, match="fraction=0"):
        tail_mean([1.0], 0, highest=True)


@given(VALUES, st.booleans(), st.integers(0, 2**32))
def test_a_spread_is_what_numpy_says(values, higher, seed):
    weights = np.random.default_rng(seed).integers(1, 50, len(values))
    found, x = spread(values, weights.tolist(), higher_is_better=higher), np.array(values)
    assert found.mean == pytest.approx(x.mean())
    assert found.weighted_mean == pytest.approx(np.average(x, weights=weights))
    assert found.std == pytest.approx(x.std(), abs=1e-9)
    worst, best = np.sort(x)[:: 1 if higher else -1], np.sort(x)[:: -1 if higher else 1]
    tenth = -(-len(x) // 10)
    assert (found.worst10, found.best10) == pytest.approx((worst[:tenth].mean(), best[:tenth].mean()))
    mirrored = spread([-value for value in values], weights.tolist(), higher_is_better=not higher)
    assert mirrored.worst10 == pytest.approx(-found.worst10)
    assert mirrored.jain == pytest.approx(found.jain)


def test_evenness_of_values_of_both_signs_is_not_told():
    assert np.isnan(spread([-1.0, 1.0], [1, 1], higher_is_better=True).jain)
    with pytest.raises(ValueError, match="values"):
        spread([], [], higher_is_better=True)
