"""What division among clients costs, ``C_eff = C clients**-rho``: measured, passed, or not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Rho(NamedTuple):
    """What division among clients costs, and how that is known.

    Attributes:
        value: 1 counts the average client's compute, 0 all of it; where only a span is known, its upper end.
        low: lower end of what it may be.
        high: upper end.
        source: in words, how it is known; empty for a number that was passed.
        is_measured: whether ``value`` is an estimate, and not an end of a span.
    """

    value: float
    low: float
    high: float
    source: str = ""
    is_measured: bool = False

    def __str__(self) -> str:
        ends = f"{self.low:.3g} to {self.high:.3g}"
        if not self.is_measured:
            return f"rho {self.value:g}" if self.low == self.high else f"rho {ends}"
        known = math.isfinite(self.low + self.high)
        return f"rho {self.value:.3g}{f', {ends}' if known else ''}: {self.source}"

    @property
    def is_span(self) -> bool:
        """Whether there is no best guess, but two ends only."""
        return self.low < self.high and not self.is_measured


UNMEASURED = Rho(1.0, 0.0, 1.0, "not measured")
"""Everything from data parallelism to the average client, which arXiv 2511.12188 goes by."""


def rho_of(given: Any, measured: Rho | None = None) -> Rho:
    """What an argument ``rho=`` means.

    Args:
        given: a number, the two ends of a span, or "auto" for the measured one, and `UNMEASURED` without.
        measured: with the law that is in use.

    Raises:
        ValueError: for anything else.

    Example:
        >>> print(rho_of("auto"), rho_of(0.24), rho_of((0.5, 1.0)), sep="; ")
        rho 0 to 1; rho 0.24; rho 0.5 to 1
    """
    if isinstance(given, Rho):
        return given
    if given is None or (isinstance(given, str) and given == "auto"):
        return measured or UNMEASURED
    ends = given if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2 else (given, given)
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) or not math.isfinite(end) for end in ends):
        raise ValueError(
            f"rho={given!r}: pass a number, 1 for the average client, 0 for data parallelism; the two ends of a span;"
            " or 'auto'."
        )
    low, high = sorted(map(float, ends))
    return Rho(high, low, high)
