"""Rules for the factor of updates outside of critical phases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

from lightning_fedscale.utils.checks import integer, positive


class Phase(NamedTuple):
    """The phase of training, as input of scale rules.

    Attributes:
        critical: whether training is in a critical phase.
        quiet: steps or rounds since the last critical one, 0 during a critical phase.
        noise_scale: gradient noise scale in samples; NaN if unknown.
    """

    critical: bool
    quiet: int
    noise_scale: float = math.nan


ScaleRule: TypeAlias = Callable[[Phase], float]
"""A function that returns the factor of an update in a phase."""


def step(factor: float = 2.0) -> ScaleRule:
    """Scale by ``factor`` in non-critical phases and by 1 in critical ones: the step function of arXiv 2509.10537.

    Example:
        >>> rule = step(3.0)
        >>> rule(Phase(critical=True, quiet=0)), rule(Phase(critical=False, quiet=1))
        (1.0, 3.0)
    """
    return partial(_step, factor=positive("scale", factor))


def _step(phase: Phase, *, factor: float) -> float:
    return 1.0 if phase.critical else factor


def linear_ramp(factor: float = 2.0, length: int = 100) -> ScaleRule:
    """Scale from 1 to ``factor`` within ``length`` non-critical steps or rounds, and by 1 in critical ones.

    Example:
        >>> rule = linear_ramp(3.0, length=4)
        >>> [rule(Phase(critical=False, quiet=quiet)) for quiet in (1, 2, 4, 9)]
        [1.5, 2.0, 3.0, 3.0]
    """
    return partial(_linear_ramp, factor=positive("scale", factor), length=integer("length", length))


def _linear_ramp(phase: Phase, *, factor: float, length: int) -> float:
    return 1.0 if phase.critical else 1.0 + (factor - 1.0) * min(1.0, phase.quiet / length)


def adascale(batch: float, reference: float) -> ScaleRule:
    """Scale by AdaScale's gain: the number of steps of the reference batch that one step of this batch is worth.

    With ``S = batch / reference``, variance ``v`` of a gradient over ``reference`` samples and squared mean gradient
    ``m``, the gain is ``(v + m) / (v / S + m)``, between 1 and ``S`` (Johnson et al., arXiv 2007.05105). It is computed
    from the noise scale, since ``v / m = noise_scale / reference``. It is 1 in critical phases, and while the noise
    scale is unknown.

    Args:
        batch: samples in one update.
        reference: batch size for which the learning rate was chosen.

    Example:
        >>> rule = adascale(batch=1024, reference=128)
        >>> rule(Phase(critical=False, quiet=1, noise_scale=1024.0))
        4.5
    """
    of_update, of_reference = positive("batch", batch), positive("reference", reference)
    if of_reference > of_update:
        raise ValueError(f"reference={reference!r}: pass at most batch={batch!r}, the samples of one update.")
    return partial(_adascale, batch=of_update, reference=of_reference)


def _adascale(phase: Phase, *, batch: float, reference: float) -> float:
    if phase.critical or not phase.noise_scale >= 0:
        return 1.0
    if math.isinf(phase.noise_scale):
        return batch / reference
    return (phase.noise_scale / reference + 1.0) / (phase.noise_scale / batch + 1.0)


def reads_noise(rule: ScaleRule) -> bool:
    """Return whether a rule depends on the noise scale, and so has to wait for one.

    Example:
        >>> reads_noise(adascale(batch=1024, reference=128)), reads_noise(step(2.0))
        (True, False)
    """
    far = 10**9  # beyond any ramp
    return rule(Phase(False, far)) != rule(Phase(False, far, math.inf))


def check_rule(rule: ScaleRule) -> None:
    """Reject a rule that does not return positive numbers.

    Raises:
        ValueError: if it returns anything else.
    """
    for phase in (Phase(True, 0), Phase(False, 1)):
        factor = rule(phase)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(
                f"scale={rule!r}: it returns {factor!r} for {phase}: pass a number above 0, or a function that returns"
                " one for a Phase, such as lightning_fedscale.phases.step(2.0)."
            )


def capped(rule: ScaleRule, limit: float) -> ScaleRule:
    """Limit a rule's factor to ``limit``; by the linear scaling rule this is the factor by which the batch grew.

    Example:
        >>> capped(step(8.0), limit=4.0)(Phase(critical=False, quiet=1))
        4.0
    """
    return partial(_capped, rule=rule, limit=positive("limit", limit))


def _capped(phase: Phase, *, rule: ScaleRule, limit: float) -> float:
    return min(rule(phase), limit)
