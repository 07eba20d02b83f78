"""Shamir's secret sharing over a prime field: any ``threshold`` shares reveal the secret, fewer reveal nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRIME = (1 << 127) - 1
"""The field of secrets and shares, a Mersenne prime."""


def share(coefficients: Sequence[int], holder: int) -> int:
    """Return a holder's share: the polynomial's value at ``holder + 1``.

    Args:
        coefficients: the secret, then ``threshold - 1`` random numbers below `PRIME`.
        holder: number of the holder, from 0.

    Example:
        >>> share([42, 7], holder=0)
        49
    """
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * (holder + 1) + coefficient) % PRIME
    return value


def secret(shares: Mapping[int, int]) -> int:
    """Recover the secret by Lagrange's interpolation at 0 from at least ``threshold`` holders' shares.

    Example:
        >>> secret({holder: share([42, 7], holder) for holder in (3, 8)})
        42
    """
    total = 0
    for holder, value in shares.items():
        over, under = 1, 1
        for other in shares:
            if other != holder:
                over = over * (other + 1) % PRIME
                under = under * (other - holder) % PRIME
        total = (total + value * over * pow(under, -1, PRIME)) % PRIME
    return total
