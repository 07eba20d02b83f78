"""The settings of a study: sizes, methods, batch sizes, local steps and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

FED_AVG = "fed_avg"


class Setting(NamedTuple):
    """A combination of values to train with.

    Attributes:
        size: value of the module's argument.
        method: name of the method, in `METHODS` or custom.
        batch_size: a client's batch size, in samples; 0 for that of the data.
        local_steps: batches that a client trains on in a round.
        rate: learning rate of the clients, as a multiple of the module's own.
    """

    size: int
    method: str
    batch_size: int
    local_steps: int
    rate: float

    def __str__(self) -> str:
        return (
            f"size {self.size}, {self.method}, batch {self.batch_size}, {self.local_steps} local steps,"
            f" {self.rate:g} times the learning rate"
        )


class Space(NamedTuple):
    """All settings of a study: every combination of these values.

    Attributes:
        sizes: sizes, ascending.
        methods: names of the methods.
        batch_sizes: batch sizes, ascending.
        local_steps: numbers of local steps, ascending.
        rates: learning rates, ascending.

    Example:
        >>> space = Space((16, 64), ("fed_avg", "scaffold"), (32,), (5, 20), (0.5, 1.0, 2.0))
        >>> space.number
        24
    """

    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    local_steps: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def number(self) -> int:
        """Number of settings."""
        return math.prod(len(axis) for axis in self)

    def spread(self, seed: int = 0) -> Iterator[Setting]:
        """Yield every setting once, so that the first few cover the space.

        All pairs of size and method take turns, since these matter most and a small budget ranks them worst. The other
        fields of each pair follow a Sobol sequence.
        """
        rest = list(product(self.batch_sizes, self.local_steps, self.rates))
        cells = list(product(self.sizes, self.methods))
        generator = np.random.default_rng(seed)
        generator.shuffle(cells)
        orders = {cell: _covering(len(rest), int(generator.integers(2**31))) for cell in cells}
        for turn in range(len(rest)):
            for size, method in cells:
                yield Setting(size, method, *rest[orders[size, method][turn]])

    def neighbours(self, at: Setting, name: str) -> list[Setting]:
        """Return the settings that differ in one field: half or twice its value, or another method.

        Sizes, which cost most, are instead the geometric means with the next sizes of the space; beyond its ends they
        are twice or half as large.

        Args:
            at: setting to vary.
            name: name of the field.
        """
        values: dict[str, Sequence[Any]] = {
            "size": _between(self.sizes, at.size),
            "method": [each for each in self.methods if each != at.method],
            "rate": [at.rate / 2, at.rate * 2],
            "local_steps": _half_and_twice(at.local_steps),
            "batch_size": _half_and_twice(at.batch_size),
        }
        return [at._replace(**{name: value}) for value in values[name]]


def ladder(current: int) -> tuple[int, ...]:
    """Return sizes around the current one, by factors of two: from a sixteenth to four times.

    Example:
        >>> ladder(256), ladder(3)
        ((16, 32, 64, 128, 256, 512, 1024), (1, 2, 3, 6, 12))
    """
    return tuple(sorted({max(1, round(current * 2.0**power)) for power in range(-4, 3)}))


def best_of_each(losses: dict[Setting, float], names: Sequence[str]) -> list[Setting]:
    """Return the best setting for every combination of values of the named fields.

    Example:
        >>> a, b = Setting(16, "fed_avg", 32, 5, 1.0), Setting(16, "fed_avg", 32, 5, 2.0)
        >>> best_of_each({a: 0.5, b: 0.4}, ["size"]) == [b]
        True
    """
    found: dict[Any, Setting] = {}
    for setting in sorted(losses, key=lambda each: losses[each]):
        found.setdefault(tuple(getattr(setting, name) for name in names), setting)
    return list(found.values())


def without_duplicates(settings: Iterable[Setting]) -> list[Setting]:
    """Remove duplicates; the order is that of first occurrence."""
    return list(dict.fromkeys(settings))


def _covering(number: int, seed: int) -> list[int]:
    """Return an order of the indices below ``number`` whose first ones are spread evenly."""
    power = max(1, math.ceil(math.log2(max(2, number))))
    places = qmc.Sobol(1, seed=seed).random_base2(power + 2)[:, 0] * number
    return list(dict.fromkeys([*places.astype(int).tolist(), *range(number)]))


def _half_and_twice(value: int) -> list[int]:
    return [each for each in (value // 2, value * 2) if each >= 1]


def _between(sizes: Sequence[int], at: int) -> list[int]:
    """Return the geometric means of a size and its neighbours; beyond the ends, half or twice the size."""
    below, above = (
        max((each for each in sizes if each < at), default=at // 4),
        min((each for each in sizes if each > at), default=at * 4),
    )
    found = {round(math.sqrt(max(1, below) * at)), round(math.sqrt(above * at))}
    return sorted(found - {at, 0})
