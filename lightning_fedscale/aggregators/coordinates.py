"""Coordinate-wise rules: the median and the trimmed mean."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.rows import needing
from lightning_fedscale.aggregators.stacked import Stack, stacked
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils.factory_repr import record_call

_PART = 1 << 16  # coordinates at a time, so that sorting needs no second copy of all updates


@record_call
def median() -> Aggregator:
    """Take every coordinate's median; for even numbers it is the mean of the middle two (Yin et al., 1803.01498).

    **It tolerates any number of attackers below half of the round's clients**: every coordinate of the result lies
    between two honest clients' values. All clients count the same, whatever their number of samples.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(median(), torch.tensor([[1.0, 9.0], [2.0, 8.0], [1e9, -1e9]])).tolist()
        [2.0, 8.0]
    """
    return stacked(mean("uniform").weigh, _middle)


@record_call
def trimmed_mean(trim: int | float) -> Aggregator:
    """Average every coordinate without its smallest and largest values (Yin et al., arXiv 1803.01498).

    **It tolerates as many attackers as it trims at each end**: then every coordinate of the result lies between two
    honest clients' values. All clients count the same, whatever their number of samples.

    Args:
        trim: amount trimmed at each end: an int is a number of clients, a float in [0, 0.5) a share, rounded down.

    Raises:
        TypeError: if ``trim`` is not a number.
        ValueError: if it is negative or trims everything; a number of clients that is too large for the cohort is found
            at the beginning of a round.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> aggregate(trimmed_mean(0.25), torch.tensor([[-1e9], [1.0], [2.0], [4.0]])).tolist()
        [1.5]
    """
    if isinstance(trim, bool) or not isinstance(trim, int | float):
        raise TypeError(f"trim={trim!r}: pass a number of clients such as 2, or a share of them in [0, 0.5).")
    if isinstance(trim, float):
        if not 0.0 <= trim < 0.5:
            raise ValueError(f"trim={trim}: pass a share of the clients in [0, 0.5), cut off at each end, or an int.")
        return stacked(mean("uniform").weigh, partial(_read, share=trim, count=0))
    if trim < 0:
        raise ValueError(f"trim={trim}: pass the number of clients to cut off at each end, at least 0.")
    rule = stacked(mean("uniform").weigh, partial(_read, share=0.0, count=trim))
    return needing(rule, 2 * trim + 1, f"trimmed_mean(trim={trim})")


def _read(stack: Stack, cohort: Cohort, *, share: float, count: int) -> Tensor:
    # A share such as 0.29 of 100 clients is 29 of them, although their floating-point product is smaller.
    return _trimmed(stack.deltas, count + math.floor(share * len(stack.deltas) + 1e-9))


def _middle(stack: Stack, cohort: Cohort) -> Tensor:
    return middle(stack.deltas)


def middle(rows: Tensor) -> Tensor:
    """Return the coordinate-wise median of rows."""
    return _trimmed(rows, len(rows))


def _trimmed(rows: Tensor, trim: int) -> Tensor:
    # Trim at most to the median: updates that are not finite are left out, so there may be fewer than clients.
    cut = min(trim, (len(rows) - 1) // 2)
    parts = (part.T.contiguous().sort(dim=1).values for part in torch.split(rows, _PART, dim=1))
    return torch.cat([part[:, cut : len(rows) - cut].mean(dim=1) for part in parts])
