"""Find the largest argument of an increasing function within a bound, in few evaluations if it is convex."""

from __future__ import annotations

import math
from collections.abc import Callable

UNLIMITED = 2**24
"""Largest batch of the search if nothing else bounds it."""


def largest_within(excess: Callable[[int], float], limit: int, *, start: int = 1, gentle: bool = False) -> int:
    """Return the largest integer up to ``limit`` at which ``excess`` is not positive, which must hold at ``start``.

    Peak memory is the maximum of a few lines. A line through two points never lies above such a function beyond them,
    and never below it between them. Extrapolation therefore bounds the result from above and interpolation from below,
    and the two meet after about six evaluations. Every third one bisects, in case the function jumps and is not convex.

    Args:
        excess: difference between the function and the bound; may be infinite if it is unknown.
        limit: largest integer to evaluate, if above ``start``.
        start: smallest integer to evaluate.
        gentle: never evaluate more than twice the largest fitting integer, for when an evaluation takes the memory that
            it measures.

    Example:
        >>> largest_within(lambda n: 7 * n + 5 - 1000, limit=10**6)
        142
    """
    fitting = [(start, excess(start))]  # ascending
    high, high_excess = limit + 1, math.inf
    turn = 0
    while high - fitting[-1][0] > 1:
        low, low_excess = fitting[-1]
        if turn % 3 == 2 and high <= limit:
            guess = math.isqrt(low * high)
        elif turn % 3 == 1 and math.isfinite(high_excess):
            guess = low + math.floor(-low_excess * (high - low) / (high_excess - low_excess))
        elif len(fitting) > 1:
            before, before_excess = fitting[-2]
            slope = (low_excess - before_excess) / (low - before)
            guess = low + math.floor(min(-low_excess / slope, limit)) if slope > 0 else limit
        else:
            guess = low + 1
        most = min(high - 1, 2 * low) if gentle else high - 1
        guess = min(max(guess, low + 1), most)
        found = excess(guess)
        if found <= 0:
            fitting.append((guess, found))
        else:
            high, high_excess = guess, found
        turn += 1
    return fitting[-1][0]
