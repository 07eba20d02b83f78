"""Where a law says nothing of a run: far from what it was fitted on, another loss, a model that is mostly frozen."""

from __future__ import annotations

import math

from lightning_fedscale.scaling.base import Law

FAR = 100.0
"""How many times outside of the range that it was fitted on a law says nothing any more."""
_LOSS = 2.0
"""A loss that is so many times larger or smaller than predicted is another loss."""
_TRAINED = 0.5
"""Share of the parameters that must be trained, for a law of models that were trained as a whole."""


def why_far(law: Law, *, params: float, flops: float) -> str | None:
    """Why a run is too far from what a law was fitted on; None if it is not.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> why_far(Chinchilla(), params=42.0, flops=1e20)
        '42 parameters are 9.5e+05 times less than the least of those that Chinchilla was fitted on (4e+07)'
    """
    for value, ends, what in ((params, law.domain.params, "parameters"), (flops, law.domain.flops, "FLOPs")):
        if value * FAR < ends[0]:
            return f"{value:.3g} {what} are {ends[0] / value:.2g} times less than the least of {_fitted(law, ends[0])}"
        if value > ends[1] * FAR:
            return f"{value:.3g} {what} are {value / ends[1]:.2g} times more than the most of {_fitted(law, ends[1])}"
    return None


def why_frozen(law: Law, *, trained: int, total: int) -> str | None:
    """Why a law says nothing of a model of which a part is trained; None if it does.

    A law that was fitted to runs of one's own may be one of such models.
    """
    if law.fitted_on is not None or trained >= _TRAINED * total:
        return None
    return f"{1 - trained / total:.0%} of the parameters are frozen, and {law.name} is of models that are trained whole"


def why_another_loss(law: Law, *, predicted: float, observed: float, validated: bool) -> str | None:
    """Why the loss of a run is not the one that a law predicts; None if it may be, or if one of them is not known.

    Args:
        law: the law.
        predicted: for the run.
        observed: of it.
        validated: whether that is on validation data. On training data that are seen again and again it may be far
            below any prediction; laws of text are of data that are seen once.
    """
    if not (math.isfinite(predicted) and math.isfinite(observed)) or predicted <= 0:
        return None
    low = predicted / _LOSS if validated or law.domain.task == "text" else -math.inf
    if low <= observed <= predicted * _LOSS:
        return None
    return f"{law.name} predicts a loss of {predicted:.3g}, and the run has {observed:.3g}: it is no law of this task"


def _fitted(law: Law, end: float) -> str:
    return f"those that {law.name} was fitted on ({end:.3g})"
