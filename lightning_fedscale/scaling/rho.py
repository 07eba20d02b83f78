"""The cost ``rho`` of dividing compute among clients, ``C_eff = C clients**-rho``: measured, passed, or unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Rho(NamedTuple):
    """The cost of dividing compute among clients, and how it is known.

    Attributes:
        value: 1 counts the average client's compute, 0 that of all clients; the upper end if only an interval is known.
        low: lower end.
        high: upper end.
        source: how it is known, in words; empty for a number that was passed.
        is_measured: whether ``value`` is an estimate rather than an end of an interval.
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
        """Whether only two ends are known, without an estimate."""
        return self.low < self.high and not self.is_measured


UNMEASURED = Rho(1.0, 0.0, 1.0, "not measured")
"""The interval from data parallelism (0) to the average client's compute (1), as in arXiv 2511.12188."""


def rho_of(given: Any, measured: Rho | None = None) -> Rho:
    """Convert an argument ``rho=``.

    Args:
        given: a number, the two ends of an interval, or "auto" for the measured value, else `UNMEASURED`.
        measured: the value that was measured with the law.

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
            f"rho={given!r}: pass a number (1 counts the average client's compute, 0 that of all clients), the two ends"
            " of an interval, or 'auto'."
        )
    low, high = sorted(map(float, ends))
    return Rho(high, low, high)
