"""Statistics of how evenly a value is spread over clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TAIL = 0.1
"""Share of clients that count as the worst, or as the best."""


class Spread(NamedTuple):
    """A value's spread over clients.

    Attributes:
        mean: mean over clients with equal weights.
        weighted_mean: mean weighted by samples.
        worst10: mean of the worst tenth of the clients, at least one.
        best10: mean of the best tenth.
        std: population standard deviation over these clients.
        jain: Jain's index, see `jain_index`; NaN if values differ in sign, since it is meaningless then.
    """

    mean: float
    weighted_mean: float
    worst10: float
    best10: float
    std: float
    jain: float


def part_of_spread(name: str) -> tuple[str, str] | None:
    """Split a logged name of `ClientMetrics` into the value and the part of its spread; return None for other names.

    Example:
        >>> part_of_spread("clients/val/acc/worst10"), part_of_spread("clients/evaluated"), part_of_spread("val_acc")
        (('clients/val/acc', 'worst10'), None, None)
    """
    value, _, part = name.rpartition("/")
    is_one = value.startswith(("clients/", "personal/")) and part in Spread._fields
    return (value, part) if is_one else None


def spread(values: Sequence[float], weights: Sequence[float], *, higher_is_better: bool) -> Spread:
    """Compute how a value is spread over clients.

    Args:
        values: one finite number for each client.
        weights: numbers >= 0, not all 0, such as numbers of samples.
        higher_is_better: whether the lowest values are the worst.

    Raises:
        ValueError: there is no client.

    Example:
        >>> spread([1.0, 0.5, 0.0], [1, 1, 2], higher_is_better=True)
        Spread(mean=0.5, weighted_mean=0.375, worst10=0.0, best10=1.0, std=0.408..., jain=0.6)
    """
    mean = math.fsum(_some(values)) / len(values)
    return Spread(
        mean,
        math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights),
        tail_mean(values, TAIL, highest=not higher_is_better),
        tail_mean(values, TAIL, highest=higher_is_better),
        math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
        jain_index(values) if min(values) >= 0 or max(values) <= 0 else math.nan,
    )


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index, ``(sum x)^2 / (n sum x^2)`` (Jain, Chiu and Hawe, 1984).

    For values of one sign it is 1 if all are equal (even all zero) and 1/n if one client has everything.

    Raises:
        ValueError: ``values`` is empty.

    Example:
        >>> jain_index([1.0, 0.0])
        0.5
    """
    largest = max(map(abs, _some(values)))
    if largest == 0:
        return 1.0
    scaled = [value / largest for value in values]  # squares neither overflow nor vanish
    return math.fsum(scaled) ** 2 / (len(scaled) * math.fsum(x * x for x in scaled))


def tail_mean(values: Sequence[float], fraction: float, *, highest: bool) -> float:
    """Return the mean of the ``ceil(fraction * n)`` highest (or lowest) values, which are at least one.

    Raises:
        ValueError: ``values`` is empty or ``fraction`` lies outside (0, 1].

    Example:
        >>> tail_mean([3.0, 1.0, 2.0], 0.1, highest=False)
        1.0
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: pass a number in (0, 1], 0.1 for ten per cent.")
    ordered = sorted(_some(values), reverse=highest)
    tail = ordered[: math.ceil(fraction * len(ordered) - 1e-9)]  # 0.07 * 100 is above 7
    return math.fsum(tail) / len(tail)


def _some(values: Sequence[float]) -> Sequence[float]:
    if not values:
        raise ValueError("values=[]: pass one value per client, at least one.")
    return values
