"""Messages of `core.plan`."""

from __future__ import annotations

from typing import Any

from lightning_fedscale.core.plan import sampled
from tests.wording import Row


class Answers:
    """A sampler that always returns the same."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __call__(self, **_: Any) -> Any:
        return self._answer

    def __repr__(self) -> str:
        return "mine"


ROWS: list[Row] = [
    Row(
        lambda: sampled(Answers(None), 0, 3, 10, 2),
        TypeError,
        "sampler=mine: must return a one-dimensional array of client numbers, but returned None in round 3.",
    ),
    Row(
        lambda: sampled(Answers([1, 1]), 0, 3, 10, 2),
        ValueError,
        "sampler=mine: must return distinct clients below 10 in ascending order, but returned [1, 1] in round 3.",
    ),
]
