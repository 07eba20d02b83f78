"""What a study chooses among: sizes, methods, batches, local steps and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

FED_AVG = "fed_avg"


class Setting(NamedTuple):
    """One way to train.

    Attributes:
        size: of the module's argument.
        method: its name in `METHODS`, or among the user's own.
        batch_size: of a client, in samples; 0 for what the data has.
        local_steps: batches of a client in a round.
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
    """All settings of a study: each combination of these.

    Attributes:
        sizes: ascending.
        methods: by name.
        batch_sizes: ascending.
        local_steps: ascending.
        rates: ascending.

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
        """Of settings."""
        return math.prod(len(axis) for axis in self)

    def spread(self, seed: int = 0) -> Iterator[Setting]:
        """Every setting once, so that the first few cover the space.

        All pairs of size and method come in turn, since these matter most and a small budget says least about them;
        what remains of each is taken in the order of a Sobol sequence.
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
        """Settings that differ from one in one thing: a half or twice as much of it, or another method.

        Of sizes, which cost most, the next ones halve the distance to those of the space; beyond its ends they are
        twice or half as large.

        Args:
            at: the one.
            name: of what differs.
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
    """Sizes around the one that there is, by factors of two: from a sixteenth to four times.

    Example:
        >>> ladder(256), ladder(3)
        ((16, 32, 64, 128, 256, 512, 1024), (1, 2, 3, 6, 12))
    """
    return tuple(sorted({max(1, round(current * 2.0**power)) for power in range(-4, 3)}))


def best_of_each(losses: dict[Setting, float], names: Sequence[str]) -> list[Setting]:
    """The best setting for every value of what is named.

    Example:
        >>> a, b = Setting(16, "fed_avg", 32, 5, 1.0), Setting(16, "fed_avg", 32, 5, 2.0)
        >>> best_of_each({a: 0.5, b: 0.4}, ["size"]) == [b]
        True
    """
    found: dict[Any, Setting] = {}
    for setting in sorted(losses, key=lambda each: losses[each]):
        found.setdefault(tuple(getattr(setting, name) for name in names), setting)
    return list(found.values())


def without_twins(settings: Iterable[Setting]) -> list[Setting]:
    """Each setting once, in the order in which it came first."""
    return list(dict.fromkeys(settings))


def _covering(number: int, seed: int) -> list[int]:
    """An order of so many indices whose first ones are spread evenly."""
    power = max(1, math.ceil(math.log2(max(2, number))))
    places = qmc.Sobol(1, seed=seed).random_base2(power + 2)[:, 0] * number
    return list(dict.fromkeys([*places.astype(int).tolist(), *range(number)]))


def _half_and_twice(value: int) -> list[int]:
    return [each for each in (value // 2, value * 2) if each >= 1]


def _between(sizes: Sequence[int], at: int) -> list[int]:
    """The geometric means of a size and its neighbours, and what is beyond the ends."""
    below, above = (
        max((each for each in sizes if each < at), default=at // 4),
        min((each for each in sizes if each > at), default=at * 4),
    )
    found = {round(math.sqrt(max(1, below) * at)), round(math.sqrt(above * at))}
    return sorted(found - {at, 0})
