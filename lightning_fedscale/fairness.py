"""How evenly a value is spread over clients: pure maths on a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def jain_index(values: Sequence[float]) -> float:
    """Jain's fairness index, ``(sum x)^2 / (n sum x^2)`` (Jain, Chiu and Hawe, 1984).

    For values of one sign it is 1 when all are equal and 1/n when one client has everything.
    All zeros are equal, hence 1.

    Raises:
        ValueError: ``values`` is empty.

    >>> jain_index([1.0, 0.0])
    0.5
    """
    largest = max(map(abs, _some(values)))
    if largest == 0:
        return 1.0
    scaled = [value / largest for value in values]  # squares neither overflow nor vanish
    return math.fsum(scaled) ** 2 / (len(scaled) * math.fsum(x * x for x in scaled))


def tail_mean(values: Sequence[float], fraction: float, *, highest: bool) -> float:
    """Mean of the ``ceil(fraction * n)`` highest (or lowest) values: at least one client.

    Raises:
        ValueError: ``values`` is empty or ``fraction`` lies outside (0, 1].

    >>> tail_mean([3.0, 1.0, 2.0], 0.1, highest=False)
    1.0
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1]; 0.1 means ten per cent.")
    ordered = sorted(_some(values), reverse=highest)
    tail = ordered[: math.ceil(fraction * len(ordered) - 1e-9)]  # 0.07 * 100 is above 7
    return math.fsum(tail) / len(tail)


def _some(values: Sequence[float]) -> Sequence[float]:
    if not values:
        raise ValueError("values=[] holds no client; give one value per client.")
    return values
