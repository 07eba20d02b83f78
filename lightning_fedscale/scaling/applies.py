"""Reasons why a law does not apply to a run: far from the fitted range, another loss, a mostly frozen model."""

from __future__ import annotations

import math

from lightning_fedscale.scaling.base import Law

FAR = 100.0
"""A law does not apply beyond this factor outside the range that it was fitted on."""
_LOSS = 2.0
"""A loss that is larger or smaller than predicted by more than this factor is another kind of loss."""
_TRAINED = 0.5
"""Fraction of the parameters that must be trained for a law of fully trained models to apply."""


def why_far(law: Law, *, params: float, flops: float) -> str | None:
    """Return why a run is too far from what a law was fitted on; None if it is not.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> why_far(Chinchilla(), params=42.0, flops=1e20)
        '42 parameters are 9.5e+05 times less than the smallest number that Chinchilla was fitted on (4e+07)'
    """
    for value, ends, what in ((params, law.domain.params, "parameters"), (flops, law.domain.flops, "FLOPs")):
        if value * FAR < ends[0]:
            return f"{value:.3g} {what} are {ends[0] / value:.2g} times less than the smallest {_fitted(law, ends[0])}"
        if value > ends[1] * FAR:
            return f"{value:.3g} {what} are {value / ends[1]:.2g} times more than the largest {_fitted(law, ends[1])}"
    return None


def why_frozen(law: Law, *, trained: int, total: int) -> str | None:
    """Return why a law does not apply to a partly trained model; None if it does.

    A law that was fitted to the user's own runs always applies, since those models may be partly frozen too.
    """
    if law.fitted_on is not None or trained >= _TRAINED * total:
        return None
    return (
        f"{1 - trained / total:.0%} of the parameters are frozen, and {law.name} holds for models whose parameters are"
        " all trained"
    )


def why_another_loss(law: Law, *, predicted: float, observed: float, validated: bool) -> str | None:
    """Return why a run's loss is not of the kind that a law predicts; None if it may be, or if either is unknown.

    Args:
        law: the law.
        predicted: loss that the law predicts for the run.
        observed: loss of the run.
        validated: whether ``observed`` is on validation data. The loss on repeated training data may be far below the
            prediction, so that it has no lower limit, except for laws of text, whose data are seen once.
    """
    if not (math.isfinite(predicted) and math.isfinite(observed)) or predicted <= 0:
        return None
    low = predicted / _LOSS if validated or law.domain.task == "text" else -math.inf
    if low <= observed <= predicted * _LOSS:
        return None
    return (
        f"{law.name} predicts a loss of {predicted:.3g}, but the run has {observed:.3g}, so it does not hold for this"
        " task"
    )


def _fitted(law: Law, end: float) -> str:
    return f"number that {law.name} was fitted on ({end:.3g})"
