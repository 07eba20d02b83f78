"""What issue 3 asks of the round times, and whether it is so."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Goal(NamedTuple):
    """A limit for the ratio of two contenders' measures on a task, or for the measure of one.

    Attributes:
        text: for the table.
        task: where.
        of: the contender whose measure is above the line.
        to: the one below it; empty for none.
        sense: "at most" or "at least".
        limit: for the ratio.
        measure: "seconds" per round, "start_up", or "utilisation" of the GPU.
    """

    text: str
    task: str
    of: str
    to: str
    sense: Literal["at most", "at least"]
    limit: float
    measure: Literal["seconds", "start_up", "utilisation"] = "seconds"


class Verdict(NamedTuple):
    """How a goal went: "met", "missed" (by what factor), or "not judged" (why)."""

    measured: str
    word: str


GOALS = [
    Goal("digits: at most 0.7 of the hand-written loop", "digits", "auto", "floor", "at most", 0.7),
    Goal("digits: below the tuned loop", "digits", "auto", "tuned", "at most", 1.0),
    Goal("digits: at most 0.4 of pfl", "digits", "auto", "pfl", "at most", 0.4),
    Goal("digits: below fedjax", "digits", "auto", "fedjax", "at most", 1.0),
    Goal("digits: flwr at least 10 times slower", "digits", "flwr", "auto", "at least", 10.0),
    Goal("CNN: at most 1.03 of the loop", "cnn", "auto", "floor", "at most", 1.03),
    Goal("CNN: two processes at most 0.53 of one", "cnn", "auto-2", "auto", "at most", 0.53),
    Goal("transformer: at most 1.03 of the loop", "transformer", "auto", "floor", "at most", 1.03),
    Goal("start-up at most twice plain Lightning's", "digits", "auto", "trainer", "at most", 2.0, "start_up"),
    Goal("GPU, digits: vectorized 8 times faster", "digits-gpu", "sequential", "vectorized", "at least", 8.0),
    Goal("GPU, CNN: vectorized 3 times faster", "cnn-gpu", "sequential", "vectorized", "at least", 3.0),
    Goal("GPU, ResNet18: utilisation above 85 %", "resnet-gpu", "auto", "", "at least", 0.85, "utilisation"),
]


def verdict(goal: Goal, sections: Mapping[str, Any]) -> Verdict:
    """Judge a goal by the sections that were measured."""
    section = sections.get(goal.task)
    if section is None or section.get("not_run"):
        return Verdict("", "not run" + (f": {section['not_run']}" if section else ""))
    for name in filter(None, (goal.of, goal.to)):
        if reason := obstacle(section, name):
            return Verdict("", reason)
    found = ratios(section, goal.of, goal.to, goal.measure)
    if not found:
        return Verdict("", f"not judged: no {goal.measure} was measured")
    middle = statistics.median(found)
    met = middle <= goal.limit if goal.sense == "at most" else middle >= goal.limit
    word = "met" if met else f"**missed** by a factor of {factor(middle, goal.limit):.2f}"
    return Verdict(f"{middle:.2f}", word + reservation(section, len(found)))


def reservation(section: Mapping[str, Any], repeats: int) -> str:
    """Why a verdict is not to be relied on; empty for a full run of unchanged sources."""
    doubts = ["the sources changed meanwhile"] if section.get("source_changed") else []
    doubts += [f"{repeats} of 5 repeats"] if repeats < 5 else []
    return f" ({', '.join(doubts)})" if doubts else ""


def factor(measured: float, limit: float) -> float:
    """How far off, always above 1."""
    return max(measured / limit, limit / measured)


def obstacle(section: Mapping[str, Any], name: str) -> str:
    """Why a contender's times cannot be used; empty if they can."""
    row = row_of(section, name)
    if row is None:
        return f"not run: {name} did not take part"
    if row["not_run"]:
        return f"not run: {name}: {row['not_run']}"
    return f"not judged: {name} is refused" if row["refused"] else ""


def row_of(section: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A contender's row."""
    found: dict[str, Any] | None = next((row for row in section["rows"] if row["name"] == name), None)
    return found


def ratios(section: Mapping[str, Any], of: str, to: str, measure: str = "seconds") -> list[float] | None:
    """Ratio of two contenders' measures in each repeat, or one's own; None if it was not measured."""
    above = (row_of(section, of) or {}).get(measure)
    below = (row_of(section, to) or {}).get(measure) if to else [1.0] * len(above or [])
    if not above or not below:
        return None
    return [a / b for a, b in zip(above, below, strict=True)]
