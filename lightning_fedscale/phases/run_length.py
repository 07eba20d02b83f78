"""Alarm limits of cumulative sums for a given rate of false alarms."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr


@lru_cache(maxsize=64)
def alarm_limit(run_length: float, drift: float = 0.5) -> float:
    """Return the limit at which two-sided cumulative sums of standard normal scores have this mean run length.

    It inverts `run_length_of`; both sides together run half as long as one.

    Args:
        run_length: mean number of observations until an alarm, at least 5.
        drift: amount that is subtracted from each score.

    Example:
        >>> round(alarm_limit(168.0, drift=0.5), 1)  # as tabulated for a limit of 4
        4.0
    """

    def excess(limit: float) -> float:
        return math.log(run_length_of(limit, drift) / 2 / run_length)

    high = 1.0
    while excess(high) < 0:
        high *= 1.5
    return float(brentq(excess, 1e-6, high, xtol=1e-9))


def run_length_of(limit: float, drift: float = 0.5) -> float:
    """Return the mean number of standard normal scores until a one-sided cumulative sum exceeds the limit.

    It solves Page's integral equation ``L(z) = 1 + L(0) Phi(drift - z) + int_0^limit L(y) phi(y + drift - z) dy`` by
    Gauss-Legendre quadrature (Vance, Journal of Quality Technology 18, 1986).

    Example:
        >>> round(run_length_of(4.0, drift=0.5), 1)
        335.4
    """
    nodes, weights = np.polynomial.legendre.leggauss(80)
    points, weights = (nodes + 1) * limit / 2, weights * limit / 2
    start = np.concatenate([[0.0], points])
    kernel = np.exp(-((points[None] + drift - start[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi) * weights[None]
    system = np.eye(len(start))
    system[:, 0] -= ndtr(drift - start)
    system[:, 1:] -= kernel
    return float(np.linalg.solve(system, np.ones(len(start)))[0])
