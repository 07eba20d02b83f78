"""Detectors by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from lightning_fedscale.phases.detectors import (
    Detector,
    accordion,
    federated_gradient_norm,
    fisher_trace,
    page_hinkley,
    relative_change,
)
from lightning_fedscale.utils.checks import positive

DETECTORS: dict[str, Callable[..., Detector]] = {
    "relative_change": relative_change,
    "accordion": accordion,
    "page_hinkley": page_hinkley,
    "federated_gradient_norm": federated_gradient_norm,
    "fisher_trace": fisher_trace,
}


def detector_by_name(name: str, threshold: float | None = None) -> Detector:
    """Return the detector that a string argument names.

    Args:
        name: one of `DETECTORS`.
        threshold: of the detector; for "page_hinkley" the false alarms in 1,000 observations. None is its own default.

    Raises:
        ValueError: for another name, with the closest match.

    Example:
        >>> detector_by_name("accordian", 0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: detector='accordian' is not known. Did you mean 'accordion'? Known: 'relative_change', ...
    """
    if name not in DETECTORS:
        close = get_close_matches(name, DETECTORS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"detector={name!r} is not known.{hint} Known: {', '.join(map(repr, DETECTORS))}.")
    if threshold is None:
        return DETECTORS[name]()
    positive("threshold", threshold)
    try:
        return DETECTORS[name](threshold)
    except ValueError as error:
        raise ValueError(f"threshold={threshold!r} of detector={name!r}: {error}") from None
