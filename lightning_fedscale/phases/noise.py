"""The noise of gradients: its size, the batch and cohort that suit it, and how to add it back.

The gradient of a batch of ``B`` samples is the true gradient ``G`` plus noise of covariance ``Sigma / B``. The simple
noise scale ``tr(Sigma) / |G|^2`` is the batch at which both are equal in size, the critical batch (McCandlish et al.,
arXiv 1812.06162). In federated training the gradient of a client with different data differs from ``G`` even without
sampling noise. If ``V`` is the mean square of this difference, a client's gradient over ``b`` samples has the variance
``V + tr(Sigma) / b``. Divided by ``|G|^2`` it is the critical cohort, beyond which more clients hardly help. Everything
here is a pure function of numbers or tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_fedscale.types import FloatArray
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(
    __name__,
    {
        "Look": "NoiseEstimate", "look_at_halves": "estimate_from_half_batches",
        "look_at_members": "estimate_from_members", "FEWEST": "MIN_ESTIMATES", "MOST_LOOKS": "MAX_ESTIMATES",
    },
)  # fmt: skip

MIN_ESTIMATES = 5
"""Least number of estimates from which a noise scale is computed."""

MAX_ESTIMATES = 300
"""Number of latest estimates that are kept; the weight of older ones would be negligible."""


class NoiseEstimate(NamedTuple):
    """Unbiased estimates of signal and noise from several gradients at the same weights.

    Attributes:
        square: estimated squared norm of the true gradient; may be negative.
        variance: mean squared distance of a member's gradient from it; a member is a client, or a batch.
        batch: samples in a member's gradient.
        within: the part of the variance that comes from sampling, ``tr(Sigma) / batch``; NaN if it is unknown.
    """

    square: float
    variance: float
    batch: float
    within: float = math.nan


def estimate_from_members(
    squares: FloatArray, weights: FloatArray, mean_square: float, batches: FloatArray
) -> NoiseEstimate:
    """Estimate noise from the gradients of several members and their weighted mean.

    With weights ``p`` that sum to 1, ``E sum p |g_k|^2 = |G|^2 + U`` and ``E |mean|^2 = |G|^2 + U sum p^2``.

    Args:
        squares: squared norm of each member's gradient.
        weights: weight of each in the mean.
        mean_square: squared norm of the weighted mean.
        batches: samples of each member.

    Raises:
        ValueError: if fewer than two members have weight.

    Example:
        >>> estimate_from_members(np.array([4.0, 4.0]), np.array([0.5, 0.5]), 3.0, np.array([8, 8]))
        NoiseEstimate(square=2.0, variance=2.0, batch=8.0, within=nan)
    """
    shared = float(weights @ weights)
    if shared >= 1.0 - 1e-12:
        raise ValueError(
            f"weights={weights!r}: pass at least two weights above 0, since noise is the difference of gradients."
        )
    variance = (float(weights @ squares) - mean_square) / (1.0 - shared)
    return NoiseEstimate(mean_square - shared * variance, variance, float(weights @ batches))


def estimate_from_half_batches(
    differences: FloatArray, halves: FloatArray, squares: FloatArray, weights: FloatArray, mean_square: float
) -> NoiseEstimate:
    """Estimate noise from both halves of each member's batch, and separate sampling noise from members' differences.

    ``E |g' - g''|^2 = tr(Sigma) (1/b' + 1/b'')`` holds within a member for any true gradient of the member. With a
    single member all variance is within.

    Args:
        differences: squared norm of the difference of the two halves' gradients, for each member.
        halves: samples in the halves, of shape (members, 2).
        squares: squared norm of each member's gradient over both halves.
        weights: weight of each member in the mean; they sum to 1.
        mean_square: squared norm of the weighted mean of the members' gradients.

    Example:
        >>> one = np.array([1.0])
        >>> estimate_from_half_batches(np.array([4.0]), np.array([[8, 8]]), np.array([5.0]), one, 5.0)
        NoiseEstimate(square=4.0, variance=1.0, batch=16.0, within=1.0)
    """
    batches = halves.sum(1)
    trace = float(weights @ (differences / (1.0 / halves).sum(1)))
    batch, shared = float(weights @ batches), float(weights @ weights)
    noise_of_mean = trace * float((weights**2) @ (1.0 / batches))
    if len(weights) == 1:
        return NoiseEstimate(mean_square - noise_of_mean, trace / batch, batch, trace / batch)
    spread = float(weights @ squares) - mean_square
    from_sampling = trace * float((weights * (1.0 - weights)) @ (1.0 / batches))
    between = (spread - from_sampling) / (1.0 - shared)
    within = trace / batch
    return NoiseEstimate(mean_square - noise_of_mean - shared * between, between + within, batch, within)


class NoiseScale(NamedTuple):
    """The gradient noise scale with its uncertainty, from all estimates so far.

    Attributes:
        scale: variance over squared gradient, in samples: a batch of this size has as much noise as signal. NaN while
            there is not enough evidence.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval; infinite if the data give none.
        critical_batch: the scale from sampling noise alone; NaN if it is unknown.
        critical_cohort: variance over squared gradient, in members.
        square: squared norm of the true gradient.
        fisher_trace: mean squared gradient norm of single samples; NaN if sampling noise is unknown.
        estimates: number of estimates.
        needed: number of estimates that would suffice for a scale if they continued like this: by the mean squared
            gradient, and at least, by the upper end of its interval. Infinite if no number suffices, since the
            weight of older estimates decays; NaN if there is enough evidence, or fewer estimates than `MIN_ESTIMATES`.
        shortfall: factor by which more members, or samples per member, would have sufficed with as many
            estimates, in the same two ways. The variance of an estimate falls at least in proportion.
    """

    scale: float
    low: float
    high: float
    critical_batch: float
    critical_cohort: float
    square: float
    fisher_trace: float
    estimates: int
    needed: tuple[float, float] = (math.nan, math.nan)
    shortfall: tuple[float, float] = (math.nan, math.nan)

    @property
    def enough(self) -> bool:
        """Whether there is enough evidence: the squared gradient differs from zero at 99.9 % confidence."""
        return not math.isnan(self.scale)

    @property
    def looks(self) -> int:
        """The old name of ``estimates``."""
        warnings.warn("NoiseScale: looks is called estimates now: use that.", DeprecationWarning, stacklevel=2)
        return self.estimates


UNKNOWN = NoiseScale(math.nan, 0.0, math.inf, math.nan, math.nan, math.nan, math.nan, 0)


def noise_scale(
    estimates: Sequence[NoiseEstimate] = (), decay: float = 0.99, confidence: float = 0.95, *,
    looks: Sequence[NoiseEstimate] | None = None,
) -> NoiseScale:  # fmt: skip
    """Estimate the noise scale from a series of estimates, latest last.

    Numerator and denominator are averaged separately, with weights that fall by ``decay`` with age, and then divided:
    the mean of the quotients would be biased, and a single estimate of the squared gradient is often negative. The
    interval is Fieller's for a quotient of means, with jackknife variances; it has no upper end if the mean squared
    gradient does not differ from zero at that confidence. A noise scale requires a difference at 99.9 %: with a weaker
    condition, the scales that pass it would be too small.

    Args:
        estimates: the estimates; at least `MIN_ESTIMATES` are needed.
        decay: weight of an estimate relative to the next one, in (0, 1].
        confidence: confidence of the interval, in (0, 1).
        looks: the old name of ``estimates``, which goes after one release.

    Example:
        >>> noise_scale([NoiseEstimate(1.0 + 0.1 * (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)]).critical_cohort
        2.0...
        >>> noise_scale([NoiseEstimate(0.1 - (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)]).enough
        False
    """
    if looks is not None:
        warnings.warn("noise_scale: looks is estimates now: use that.", DeprecationWarning, stacklevel=2)
        estimates = looks
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay!r}: pass a number in (0, 1].")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: pass a number in (0, 1).")
    number = len(estimates)
    if number < MIN_ESTIMATES:
        return UNKNOWN._replace(estimates=number)
    squares, variances, batches, withins = np.array(estimates, dtype=np.float64).T
    weights = decay ** np.arange(number - 1, -1, -1.0)
    weights /= weights.sum()
    noises, square = variances * batches, float(weights @ squares)
    trace = float(weights @ (withins * batches))
    low, high = _quotient_interval(noises, squares, weights, confidence)
    known = UNKNOWN._replace(low=low, high=high, square=square, fisher_trace=trace + square, estimates=number)
    if _quotient_interval(noises, squares, weights, _BEYOND_DOUBT)[1] == math.inf:
        needed, shortfall = _what_is_lacking(squares, weights, decay)
        return known._replace(needed=needed, shortfall=shortfall)
    return known._replace(
        scale=max(0.0, float(weights @ noises) / square),
        critical_batch=trace if math.isnan(trace) else max(0.0, trace / square),
        critical_cohort=max(0.0, float(weights @ variances) / square),
    )


_BEYOND_DOUBT = 0.999


def _what_is_lacking(
    squares: FloatArray, weights: FloatArray, decay: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return `NoiseScale.needed` and `NoiseScale.shortfall`."""
    shared, mean = float(weights @ weights), float(weights @ squares)
    variance = float(weights @ (squares - mean) ** 2) / (1.0 - shared)  # variance of an estimate
    upper = mean + float(stdtrit(1.0 / shared - 1.0, 0.975)) * math.sqrt(variance * shared)

    def doubt(shared: float) -> float:
        """Return the least squared mean that differs from zero, for this sum of squared weights."""
        return float(stdtrit(1.0 / shared - 1.0, 0.5 + _BEYOND_DOUBT / 2)) ** 2 * variance * shared

    def number(mean: float) -> float:
        few, many = len(squares), max(len(squares), MAX_ESTIMATES)
        if mean <= 0 or doubt(_shared(many, decay)) >= mean**2:
            return math.inf
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if doubt(_shared(middle, decay)) < mean**2 else (middle, many)
        return float(many)

    def factor(mean: float) -> float:
        return max(1.0, doubt(shared) / mean**2) if mean > 0 else math.inf

    return (number(mean), number(upper)), (factor(mean), factor(upper))


def _shared(estimates: int, decay: float) -> float:
    """Return the sum of the squared weights of this many estimates.

    Example:
        >>> _shared(4, 1.0), round(1 / _shared(10**6, 0.99))
        (0.25, 199)
    """
    if decay == 1.0:
        return 1.0 / estimates
    faded = decay**estimates
    return (1.0 - decay) / (1.0 + decay) * (1.0 + faded) / (1.0 - faded)


def _quotient_interval(
    numerators: FloatArray, denominators: FloatArray, weights: FloatArray, confidence: float
) -> tuple[float, float]:
    """Return Fieller's interval for a non-negative quotient of weighted means; without an upper end it is infinite."""
    means = float(weights @ numerators), float(weights @ denominators)
    centred = np.stack([numerators - means[0], denominators - means[1]])
    shared = float(weights @ weights)
    (a, b), (_, d) = ((centred * weights**2) @ centred.T / (1.0 - shared)).tolist()
    t = float(stdtrit(1.0 / shared - 1.0, 0.5 + confidence / 2))
    # The interval has all q with (N - q D)^2 <= t^2 Var(N - q D), that is bottom q^2 - 2 middle q + top <= 0.
    top, bottom = means[0] ** 2 - t**2 * a, means[1] ** 2 - t**2 * d
    middle = means[0] * means[1] - t**2 * b
    root = math.sqrt(max(0.0, middle**2 - top * bottom))
    if bottom > 0 and means[1] > 0:
        return max(0.0, (middle - root) / bottom), max(0.0, (middle + root) / bottom)
    # The roots then lie on both sides of zero, if zero itself is not among the solutions.
    return ((middle - root) / bottom if top > 0 and bottom < 0 and means[0] > 0 else 0.0), math.inf


# ---- adding noise back


def reweighted(weights: FloatArray, signs: FloatArray, batch: float, target: float) -> FloatArray:
    """Return random weights that make the members' mean as noisy as that of a smaller batch, without new gradients.

    Each weight is multiplied by ``1 + s (xi_k - sum p xi)`` with signs ``xi`` from a fair coin. The change of the mean
    gradient has expectation zero and, averaged over samples, the covariance ``s^2 (1 - sum p^2) Sigma / B``; with ``s``
    of `reweighting_strength` it is ``(1 / target - 1 / B) Sigma``. If members have different data, their differences
    count as noise too.

    Args:
        weights: weight of each member, proportional to its samples; they sum to 1.
        signs: 1 or -1 for each member, by a fair coin.
        batch: samples in the mean, of all members together.
        target: batch size whose noise is wanted, at most ``batch``.

    Returns:
        Weights that sum to 1; some may be negative.

    Example:
        >>> reweighted(np.full(2, 0.5), np.array([1.0, -1.0]), batch=64, target=32)
        array([ 1.20710678, -0.20710678])
    """
    new: FloatArray = weights * (1.0 + reweighting_strength(weights, batch, target) * (signs - weights @ signs))
    return new


def reweighting_strength(weights: FloatArray, batch: float, target: float) -> float:
    """Return the factor ``s`` of `reweighted`: ``s^2 = (batch / target - 1) / (1 - sum p^2)``.

    Raises:
        ValueError: if there are fewer than two members, or the target is not in (0, batch].
    """
    _check_target(batch, target)
    shared = float(weights @ weights)
    if shared >= 1.0 - 1e-12:
        raise ValueError(
            f"weights={weights!r}: pass at least two weights above 0, since reweighting changes their proportion."
        )
    return math.sqrt((batch / target - 1.0) / (1.0 - shared))


class Diagonal(NamedTuple):
    """Running mean and variance of every coordinate of a gradient.

    Attributes:
        mean: mean of each tensor's coordinates.
        variance: variance around the mean.
        seen: number of gradients so far.
    """

    mean: list[Tensor]
    variance: list[Tensor]
    seen: int

    def to(self, device: torch.device) -> Diagonal:
        """Move the mean and variance to another device."""
        return Diagonal([t.to(device) for t in self.mean], [t.to(device) for t in self.variance], self.seen)

    def clone(self) -> Diagonal:
        """Return a copy, since `diagonal_update` works in place."""
        return Diagonal([t.clone() for t in self.mean], [t.clone() for t in self.variance], self.seen)


def diagonal_init(gradients: Sequence[Tensor]) -> Diagonal:
    """Return the state before the first gradient, which takes twice the memory of the gradients."""
    return Diagonal([torch.zeros_like(g) for g in gradients], [torch.zeros_like(g) for g in gradients], 0)


@torch.no_grad()
def diagonal_update(state: Diagonal, gradients: Sequence[Tensor], decay: float = 0.99) -> Diagonal:
    """Add a gradient to the mean and variance, in place.

    The first ``1 / (1 - decay)`` gradients all count the same; after them, older ones count less. The variance is that
    of successive gradients around their running mean, so that slow changes of the true gradient do not count.

    Example:
        >>> state = diagonal_init([torch.zeros(1)])
        >>> for value in (1.0, 3.0):
        ...     state = diagonal_update(state, [torch.tensor([value])])
        >>> state.mean[0].item(), state.variance[0].item()
        (2.0, 2.0)
    """
    seen = state.seen + 1
    share = max(1.0 / seen, 1.0 - decay)
    # Welford's update is unbiased while all count the same. Later the running mean is itself noisy: `expected` is what
    # the product below has on average for a stationary gradient, over its variance.
    expected = 1.0 if share * seen == 1.0 else 2.0 * (1.0 - share) / (2.0 - share)
    of_variance = max(1.0 / max(1, seen - 1), 1.0 - decay)
    for mean, variance, gradient in zip(state.mean, state.variance, gradients, strict=True):
        before = gradient - mean
        mean.add_(before, alpha=share)
        if seen > 1:
            variance.lerp_(before.mul_(gradient - mean).div_(expected), of_variance)
    return Diagonal(state.mean, state.variance, seen)


@torch.no_grad()
def diagonal_noise(state: Diagonal, batch: float, target: float, generator: torch.Generator) -> list[Tensor]:
    """Draw normal noise that makes gradients over ``batch`` samples as noisy per coordinate as over ``target``.

    Args:
        state: the state of gradients over ``batch`` samples each.
        batch: samples in a gradient.
        target: batch size whose noise is wanted, at most ``batch``.
        generator: a generator on the gradients' device.
    """
    _check_target(batch, target)
    factor = math.sqrt(batch / target - 1.0)
    return [
        torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device) * v.sqrt() * factor
        for v in state.variance
    ]


def _check_target(batch: float, target: float) -> None:
    if not 0 < target <= batch:
        raise ValueError(
            f"target_batch={target!r}: pass a number of samples above 0 and at most {batch:g}, the batch size."
        )
