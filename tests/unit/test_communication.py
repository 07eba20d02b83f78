"""Costs of communication against numbers that others measured."""

from __future__ import annotations

import pytest

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


def test_a_star_is_two_messages() -> None:
    assert communication.star(3e6, up=1e6, down=3e6, latency=0.5) == 1 + 1 + 3
