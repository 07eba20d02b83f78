"""Costs of communication against numbers that others measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedscale.devices import communication

MESSAGE, WORKERS = 4e8, 8  # 1e8 numbers in FP32
TEN_GIGABIT, GIGABIT = 1.25e9, 1.25e8


@pytest.mark.parametrize(
    ("latency", "bandwidth", "published", "measured"),
    [
        (0.010, TEN_GIGABIT, 0.700, 0.716),
        (0.050, TEN_GIGABIT, 1.260, 1.271),
        (0.010, GIGABIT, 5.740, 5.773),
        (0.100, TEN_GIGABIT, 1.960, 1.975),
        (0.100, GIGABIT, 7.000, 7.028),
    ],
)
def test_a_ring_of_eight_as_measured(latency: float, bandwidth: float, published: float, measured: float) -> None:
    seconds = communication.ring_all_reduce(MESSAGE, WORKERS, latency, bandwidth)
    assert seconds == pytest.approx(published, rel=1e-9)
    assert seconds == pytest.approx(measured, rel=0.03)


def test_sparse_all_gather_as_measured() -> None:
    seconds = communication.top_k_all_gather(MESSAGE, WORKERS, 0.010, TEN_GIGABIT, ratio=0.1)
    assert seconds == pytest.approx(0.478, rel=1e-9)
    assert seconds < 0.525  # measured with the time that compression took


# The formulae once more, term by term as the table has them, with a latency and b seconds per byte.
TABLE = {
    "parameter_server": lambda a, b, m, n, c: 2 * a + 2 * (n - 1) * m * b,
    "ring_all_reduce": lambda a, b, m, n, c: 2 * (n - 1) * a + 2 * ((n - 1) / n) * m * b,
    "tree_all_reduce": lambda a, b, m, n, c: 2 * a * math.log2(n) + 2 * math.log2(n) * m * b,
    "broadcast": lambda a, b, m, n, c: a * math.log2(n) + math.log2(n) * m * b,
    "all_gather": lambda a, b, m, n, c: a * math.log2(n) + (n - 1) * m * b,
    "top_k_all_gather": lambda a, b, m, n, c: a * math.log2(n) + 2 * m * c * b * (n - 1),
    "ar_top_k_ring": lambda a, b, m, n, c: (
        a * (2 * (n - 1) + math.log2(n)) + m * c * b * (2 * (n - 1) / n + math.log2(n))
    ),
    "ar_top_k_tree": lambda a, b, m, n, c: 3 * a * math.log2(n) + 3 * m * c * b * math.log2(n),
}


@pytest.mark.parametrize("name", TABLE)
@given(
    workers=st.integers(2, 1000),
    message=st.floats(1, 1e11),
    latency=st.floats(0, 1),
    bandwidth=st.floats(1e3, 1e11),
    ratio=st.floats(1e-4, 1),
)
def test_the_whole_table(
    name: str, workers: int, message: float, latency: float, bandwidth: float, ratio: float
) -> None:
    options = {"ratio": ratio} if "top_k" in name else {}
    seconds = getattr(communication, name)(message, workers, latency, bandwidth, **options)
    assert seconds == pytest.approx(TABLE[name](latency, 1 / bandwidth, message, workers, ratio))


def test_a_star_is_two_messages() -> None:
    assert communication.star(3e6, up=1e6, down=3e6, latency=0.5) == 1 + 1 + 3
