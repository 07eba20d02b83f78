"""The gradient noise scale in words."""

from __future__ import annotations

import math

from lightning_fedscale.phases.noise import MIN_ESTIMATES, NoiseScale


def noise_in_words(noise: NoiseScale, unit: str, more: str) -> str:
    """Return the noise scale in words, or the additional evidence that it would need.

    Args:
        noise: the noise scale.
        unit: "round" or "step".
        more: what each of them could have more of: "as many clients", "as large batches".

    Example:
        >>> from lightning_fedscale.phases.noise import NoiseEstimate, noise_scale
        >>> little = noise_scale([NoiseEstimate(0.5 + (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)])
        >>> print(noise_in_words(little, "round", "as many clients").partition(": ")[2])
        about 5.7 (at least 1.4) times as many rounds, or about 10 (at least 1.6) times as many clients, would be enough
    """
    if noise.enough:
        return f"gradient noise scale {noise.scale:,.0f} samples ({noise.low:,.0f} to {noise.high:,.0f})"
    said = "not enough evidence on the gradient noise scale"
    if noise.estimates < MIN_ESTIMATES:
        return f"{said}: {noise.estimates} of at least {MIN_ESTIMATES} estimates: train for more {unit}s"
    known = f"{noise.low:,.0f} to {noise.high:,.0f}" if noise.high < math.inf else f"above {noise.low:,.0f}"
    times = noise.needed[0] / noise.estimates, noise.needed[1] / noise.estimates
    ways = [f"{_times(times)} times as many {unit}s"] if times[1] < math.inf else []
    if noise.shortfall[1] < math.inf:
        ways.append(f"{_times(noise.shortfall)} times {more}")
    remedy = f"{', or '.join(ways)}, would be enough" if ways else "there is no sign of a gradient in the noise"
    return f"{said} ({known} samples, with 95 % confidence): {remedy}"


def _times(factors: tuple[float, float]) -> str:
    """Return a factor by the mean, and the least one, in words."""
    mean, least = factors
    return f"about {mean:.2g} (at least {least:.2g})" if mean < math.inf else f"at least {least:.2g}"
