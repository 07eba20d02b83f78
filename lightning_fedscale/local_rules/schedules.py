"""Schedules of local steps: functions from the round to the clients' number of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from lightning_fedscale.utils import checks


def post_local(until: int, steps: int) -> Callable[[int], int]:
    """Post-local SGD (arXiv 1808.07217): take one step a round at first, then ``steps``.

    While every round is one step, training is synchronous SGD on the clients' joint batch, for example until the
    learning rate first falls. Then clients take more local steps, which saves communication and, in the paper,
    generalises better than large batches.

    Args:
        until: the first round of local training, > 0.
        steps: steps a round from then on, > 0.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if it is too small.

    Example:
        >>> schedule = post_local(until=2, steps=16)
        >>> [schedule(round) for round in range(4)]
        [1, 1, 16, 16]
    """
    return in_stages({0: 1, checks.integer("until", until): checks.integer("steps", steps)})


def in_stages(stages: Mapping[int, int]) -> Callable[[int], int]:
    """Set the number of local steps by stages of rounds.

    Args:
        stages: maps the first round of each stage, one of them 0, to the stage's steps a round.

    Raises:
        TypeError: if a round or a number of steps is not an integer.
        ValueError: if one is too small, or the stages do not begin with round 0.

    Example:
        >>> schedule = in_stages({0: 1, 10: 4, 20: 16})
        >>> [schedule(round) for round in (0, 9, 10, 25)]
        [1, 1, 4, 16]
    """
    checked = {checks.integer("round", r, minimum=0): checks.integer("steps", h) for r, h in sorted(stages.items())}
    if 0 not in checked:
        raise ValueError(
            f"stages={dict(stages)}: the first stage begins with round 0, as in in_stages({{0: 1, 10: 4}})."
        )
    schedule = partial(_stage_of, stages=checked)
    schedule.__name__ = f"in_stages({checked})"  # type: ignore[attr-defined]  # what messages call it
    return schedule


def _stage_of(round: int, *, stages: Mapping[int, int]) -> int:
    return stages[max(first for first in stages if first <= round)]
