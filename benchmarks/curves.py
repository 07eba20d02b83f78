"""Cost curves: how the time of a round grows with one thing, all else being equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.contest import Turns
from benchmarks.tasks import Recipe, digits, small_mlp, vectors

CONTENDERS = ("floor", "sequential", "vectorized")
TURNS = 5


class Curve(NamedTuple):
    """A recipe for every value of what varies.

    Attributes:
        title: for tables.
        axis: what varies.
        values: the points.
        recipe: the task at a point.
    """

    title: str
    axis: str
    values: tuple[int, ...]
    recipe: Callable[[int], Recipe]


def by_cohort(clients: int) -> Recipe:
    turns = Turns(warm_up=30, number=TURNS, rounds=max(1, 300 // clients))
    return Recipe(f"{clients} clients a round", partial(vectors, 1000, 20), small_mlp, 0.1, clients, turns)


def by_population(clients: int) -> Recipe:
    data = partial(vectors, clients, 4, width=16)
    return Recipe(f"{clients} clients registered", data, small_mlp, 0.1, 100, Turns(30, TURNS, 5))


def by_width(width: int) -> Recipe:
    model = ["mlp", 64, width, width, 10]
    return Recipe(f"width {width}", digits, lambda data: model, 0.1, 10, Turns(30, TURNS, 10))


CURVES = {
    "curve-cohort": Curve(
        "Cost curve: clients per round, of 1,000 with 20 samples each, MLP 64-128-10, batch 10",
        "clients per round", (1, 10, 100, 1000), by_cohort,
    ),
    "curve-population": Curve(
        "Cost curve: registered clients with 4 samples each, 100 a round, MLP 16-128-10, batch 10",
        "registered clients", (100, 1000, 10_000, 100_000, 1_000_000), by_population,
    ),
    "curve-width": Curve(
        "Cost curve: model size, MLP 64-width-width-10 on digits, 10 clients a round, batch 10",
        "width", (16, 64, 256, 1024), by_width,
    ),
}  # fmt: skip
