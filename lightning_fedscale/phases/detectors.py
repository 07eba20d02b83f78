"""Detectors of critical phases: they decide from observations of steps or rounds whether training is critical."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import mul
from typing import Any, NamedTuple, TypeAlias

from scipy.special import ndtri, stdtr

from lightning_fedscale.phases.regression import empty_triangle, predicted, take_row
from lightning_fedscale.phases.run_length import alarm_limit
from lightning_fedscale.utils.checks import in_interval, integer, positive

State: TypeAlias = dict[str, Any]
"""State of a detector: numbers, booleans and lists of numbers by name, so that any checkpoint can store it."""


class Observation(NamedTuple):
    """Input of a detector from one step or round.

    Attributes:
        layer_norms: L2 norm of the gradient of each parameter tensor.
        client_square: mean squared norm of the clients' updates, weighted as in their aggregate; NaN if unknown.
        fisher_trace: trace of the empirical Fisher matrix, the mean squared gradient norm of single samples; NaN if
            unknown.
        learning_rate: sum over the optimizer's parameter groups (over all optimizers if a round's update is observed),
            so that it falls if one of them falls; NaN if unknown.
    """

    layer_norms: Sequence[float]
    client_square: float = math.nan
    fisher_trace: float = math.nan
    learning_rate: float = math.nan


class Decision(NamedTuple):
    """Output of a detector for an observation.

    Attributes:
        critical: whether training is in a critical phase.
        statistic: the number that decides; NaN while there is none.
        threshold: the value that the statistic is compared with.
    """

    critical: bool
    statistic: float
    threshold: float


class Detector(NamedTuple):
    """A detector of critical phases, as a pair of pure functions.

    Attributes:
        init: returns the state before the first observation.
        update: returns the decision and the next state for a state and an observation.
        needs: the field of `Observation` that it reads.
        statistic: name of its statistic.
        accumulate: number of steps or rounds whose gradients are summed; the norms of the sum are one observation.
    """

    init: Callable[[], State]
    update: Callable[[State, Observation], tuple[Decision, State]]
    needs: str = "layer_norms"
    statistic: str = "relative_change"
    accumulate: int = 1


def relative_change(threshold: float = 0.3, window: int = 25, alpha: float = 0.01) -> Detector:
    """Detect phases in which the smoothed gradient norm changes by a large relative amount from step to step.

    With ``n`` the sum of the layers' norms, as SelSync computes it (Tyagi and Swany, arXiv 2307.07950, and its code)::

        m_t = sum_j (1 - alpha)^j n_{t-j} / sum_j (1 - alpha)^j,    j = 1 .. window, newest first
        d_t = |m_t - m_{t-1}| / m_{t-1}, smoothed in the same way
        critical if t < window or d_t >= threshold

    Before the window is full, where SelSync's code divides by zero, the means are over the observations so far; a
    change from zero counts as 100 %. Two windows later both are equal. SelSync's code counts steps from 1 and therefore
    already judges the last step of the first window.

    Args:
        threshold: least relative change of a critical phase. SelSync used 0.25, 0.3 and 0.5. These are large changes of
            a smoothed norm: the right value depends on window and noise; see the detection curves in
            ``benchmarks/results/phases.md``.
        window: number of observations in a mean; as many at the beginning are always critical.
        alpha: share by which the weight falls with each earlier observation, in [0, 1).

    Example:
        >>> detector = relative_change(threshold=0.5, window=2, alpha=0.0)
        >>> state = detector.init()
        >>> for norm in (1.0, 1.0, 1.0, 5.0):
        ...     decision, state = detector.update(state, Observation([norm]))
        ...     print(decision.critical, round(decision.statistic, 2))
        True nan
        True 0.0
        False 0.0
        True 1.0
    """
    update = partial(
        _update_relative_change,
        threshold=positive("threshold", threshold),
        window=integer("window", window),
        alpha=in_interval("alpha", alpha, 0, 1, closed_end=False),
    )
    start: State = {"norms": [], "changes": [], "smoothed": math.nan, "seen": 0}
    return Detector(partial(dict, start), update)


def _update_relative_change(
    state: State, observation: Observation, *, threshold: float, window: int, alpha: float
) -> tuple[Decision, State]:
    norms = [*state["norms"], _total(observation)][-window:]
    smoothed = _smoothed(norms, alpha)
    changes = state["changes"]
    if state["seen"]:
        changes = [*changes, _relative(smoothed, state["smoothed"])][-window:]
    change = _smoothed(changes, alpha) if changes else math.nan
    critical = state["seen"] < window or change >= threshold
    state = {"norms": norms, "changes": changes, "smoothed": smoothed, "seen": state["seen"] + 1}
    return Decision(critical, change, threshold), state


def accordion(threshold: float = 0.5, interval: int = 10, accumulate: int = 1) -> Detector:
    """Detect phases in which a layer's accumulated gradient norm changes from one check to the next.

    As in Accordion (Agarwal et al., MLSys 2021, and its code), each layer's norm is compared every ``interval``
    observations with the previous check; training is critical if ``|before - now| / before >= threshold`` for any layer
    (Accordion compresses each layer by its own result). The first observations are critical, and after a lower learning
    rate all are critical until the next check.

    Args:
        threshold: least relative change of a critical phase; Accordion's code has 0.5.
        interval: observations from one check to the next; Accordion's observations are epochs, and its interval 10.
        accumulate: steps or rounds whose gradients are summed for one observation: those of an epoch.
    """
    update = partial(
        _update_accordion, threshold=positive("threshold", threshold), interval=integer("interval", interval)
    )
    start: State = {"norms": [], "seen": 0, "critical": True, "change": math.nan, "learning_rate": math.nan}
    return Detector(partial(dict, start), update, accumulate=integer("accumulate", accumulate))


def _update_accordion(
    state: State, observation: Observation, *, threshold: float, interval: int
) -> tuple[Decision, State]:
    norms, before = list(observation.layer_norms), state["norms"]
    critical, change = state["critical"], state["change"]
    if state["seen"] % interval == 0:
        if before and len(before) == len(norms):
            change = max(map(_relative, norms, before))
            critical = change >= threshold
        before = norms
    critical = critical or observation.learning_rate < state["learning_rate"]
    state = {
        "norms": before,
        "seen": state["seen"] + 1,
        "critical": critical,
        "change": change,
        "learning_rate": observation.learning_rate,
    }
    return Decision(critical, change, threshold), state


def page_hinkley(false_alarms: float = 1.0, drift: float = 0.5, hold: int = 25, order: int = 4) -> Detector:
    """Detect changes of the gradient norm's level, with a given rate of false alarms.

    The test uses Page's two-sided cumulative sums of deviations from the past (Hinkley), in Hawkins' self-starting form
    (Hawkins 1987, The Statistician 36). Norms are correlated from step to step (momentum, overlapping batches, a loss
    surface that changes slowly), so each log-norm is compared with its regression on the ``order`` previous ones, whose
    coefficients are corrected for most of their small-sample bias. The spread and the tails of the recursive residuals
    (Brown, Durbin and Evans 1975, J. R. Stat. Soc. B 37) are estimated from the previous ones, and the matching
    Student's distribution turns each residual into a standard normal score. While nothing changes, scores are nearly
    independent and normal for any level, spread and memory of the norms, so that the alarm limit follows from the
    requested rate. After an alarm everything is estimated again, and the phase stays critical until ``hold``
    observations have passed without another alarm.

    The rate is correct within a tenth at 1 in 1,000 and within a fifth at 5, if log-norms are normal or heavy-tailed
    and have an autocorrelation of up to 0.9. Longer memory, a slow component under noise, and skewed noise cause up to
    half more false alarms: see ``benchmarks/results/phases.md``. A slow and steady drift is learnt as normal and
    raises no alarm.

    Args:
        false_alarms: expected number in 1,000 observations without any change.
        drift: deviation, in standard deviations, that is always tolerated; half the change that matters.
        hold: observations that are critical after an alarm, and at the beginning. The first 25 of them only serve for
            estimation; with fewer, norms with a long memory cause more false alarms.
        order: number of previous norms on which each may depend; 0 for independent norms, whose changes are detected a
            little sooner.

    Example:
        >>> detector = page_hinkley(hold=5)
        >>> state, critical = detector.init(), []
        >>> for norm in [1.0, 1.1, 0.9] * 10 + [3.0] * 3:
        ...     decision, state = detector.update(state, Observation([norm]))
        ...     critical.append(decision.critical)
        >>> critical.index(False), critical[-1]
        (5, True)
    """
    rate, drift = positive("false_alarms", false_alarms), positive("drift", drift)
    hold, order = integer("hold", hold), integer("order", order, 0)
    least = 2 * order + 2  # the regressors, one for each coefficient, and one for the spread
    if (most := int(1000 / (least + _SHORTEST))) < rate:
        raise ValueError(f"false_alarms={false_alarms!r}: pass at most {most} in 1,000 observations.")
    unscored = max(least, min(hold, _LEARNT, int(1000 / rate / 3)))
    limit = alarm_limit(1000 / rate - unscored, drift)
    update = partial(_update_page_hinkley, limit=limit, drift=drift, hold=hold, order=order, learnt=unscored - order)
    return Detector(partial(_init_page_hinkley, order), update, statistic="cumulative_sum")


def _init_page_hinkley(order: int) -> State:
    return {
        "count": 0,
        "origin": math.nan,
        "before": [],
        "triangle": empty_triangle(order + 1),
        "squares": 0.0,
        "fourths": 0.0,
        "up": 0.0,
        "down": 0.0,
        "quiet": 0,
    }


def _update_page_hinkley(
    state: State, observation: Observation, *, limit: float, drift: float, hold: int, order: int, learnt: int
) -> tuple[Decision, State]:
    value = math.log(max(_total(observation), 1e-300))
    if "triangle" not in state:  # the state of an earlier version, or of another detector
        state = {**_init_page_hinkley(order), "quiet": state.get("quiet", 0)}
    origin = value if math.isnan(state["origin"]) else state["origin"]  # close to all values, so sums keep digits
    value, before, quiet = value - origin, state["before"], state["quiet"] + 1
    state = {**state, "origin": origin, "before": [*before, value][-order:] if order else [], "quiet": quiet}
    if len(before) < order:
        return Decision(quiet <= hold, 0.0, limit), state
    known, rows, up, down = state["triangle"], state["count"], state["up"], state["down"]
    weight, deviation, triangle = take_row(known, [1.0, *before], value)
    if scored := rows >= learnt:
        deviation -= _forgotten(known, before, rows)
    residual = math.sqrt(weight) * deviation
    residual = 0.0 if abs(residual) < _NOTHING else residual
    if scored:
        score = _normal_score(residual, state["squares"], state["fourths"], rows - order - 1)
        up, down = max(0.0, up + score - drift), max(0.0, down - score - drift)
    if (statistic := max(up, down)) > limit:
        return Decision(True, statistic, limit), _init_page_hinkley(order)
    state |= {"count": rows + 1, "triangle": triangle, "up": up, "down": down}
    state["squares"] += residual**2
    state["fourths"] += residual**4
    return Decision(quiet <= hold, statistic, limit), state


def federated_gradient_norm(threshold: float = 0.01, window: int = 1) -> Detector:
    """Detect phases in which the clients' mean squared update norm grows from round to round.

    This is the federated gradient norm of CriticalFL (Yan et al., KDD 2023), up to a factor that cancels in its ratio;
    training is critical if ``(F_t - F_{t-1}) / F_{t-1} >= threshold``.

    Args:
        threshold: least relative growth of a critical phase; 0.01 in the paper's code.
        window: observations that are averaged first; 1 as published.
    """
    return _growth("client_square", threshold, window)


def fisher_trace(threshold: float = 0.01, window: int = 1) -> Detector:
    """Detect phases in which the trace of the empirical Fisher matrix grows from observation to observation.

    It works as `federated_gradient_norm`, on the mean squared gradient norm of single samples (FedFIM, Yan et al., AAAI
    2022), which is the sum of noise and gradient: ``E|g_i|^2 = tr(Sigma) + |G|^2``.

    Args:
        threshold: least relative growth of a critical phase.
        window: observations that are averaged first; 1 as published.
    """
    return _growth("fisher_trace", threshold, window)


# ---- parts


_LEARNT = 25
"""Most observations used for estimation before the first score; at most a third of those between two alarms."""

_SHORTEST = 5
"""Least average number of observations between two alarms for which a limit exists."""


def _growth(field: str, threshold: float, window: int) -> Detector:
    threshold, window = positive("threshold", threshold), integer("window", window)
    update = partial(_update_growth, field=field, threshold=threshold, window=window)
    start: State = {"values": [], "before": math.nan}
    return Detector(partial(dict, start), update, needs=field)


def _update_growth(
    state: State, observation: Observation, *, field: str, threshold: float, window: int
) -> tuple[Decision, State]:
    value = getattr(observation, field)
    if math.isnan(value):  # nothing is known yet
        return Decision(True, math.nan, threshold), state
    values = [*state["values"], value][-window:]
    mean, before = math.fsum(values) / len(values), state["before"]
    growth = math.nan if math.isnan(before) else math.copysign(_relative(mean, before), mean - before)
    critical = math.isnan(growth) or growth >= threshold
    return Decision(critical, growth, threshold), {"values": values, "before": mean}


def _total(observation: Observation) -> float:
    return math.fsum(observation.layer_norms)


def _smoothed(values: Sequence[float], alpha: float) -> float:
    weights, total = _weights(len(values), alpha)
    return math.fsum(map(mul, weights, values)) / total


@lru_cache(maxsize=128)
def _weights(length: int, alpha: float) -> tuple[list[float], float]:
    weights = [(1 - alpha) ** age for age in range(length, 0, -1)]
    return weights, math.fsum(weights)


def _relative(now: float, before: float) -> float:
    if before == 0:
        return 0.0 if now == 0 else 1.0
    return abs(now - before) / abs(before)


def _forgotten(triangle: Sequence[float], before: Sequence[float], rows: int) -> float:
    """Return the small-sample bias of a prediction, which is too close to the mean since memory is underestimated.

    The sum of the coefficients is too small by ``(1 + 3 sum) / rows`` (Kendall 1954, Biometrika 41); the correction
    never raises it above 1. Without it, all residuals have the same sign while norms lie on one side of the mean.
    """
    if not before:
        return 0.0
    memory = predicted(triangle, [0.0] + [1.0] * len(before))
    missing = max(0.0, min((1 + 3 * memory) / rows, 1 - memory))
    mean = triangle[len(before) + 1]  # the coefficient of the column of ones alone
    return missing * (math.fsum(before) / len(before) - mean)


def _normal_score(residual: float, squares: float, fourths: float, freedom: int) -> float:
    """Return the standard normal score of a residual, for any tails of the distribution.

    Args:
        residual: the residual, scaled so that all have the same spread.
        squares: sum of the squares of the previous residuals.
        fourths: sum of their fourth powers, for the Student's distribution with their kurtosis.
        freedom: number of the previous residuals.
    """
    if squares == 0:
        return 0.0 if residual == 0 else math.copysign(_FARTHEST, residual)
    excess = max(0.0, fourths * freedom / squares**2 - 3)
    tail = excess / (4 * excess + 6)  # 1 / its degrees of freedom
    student = abs(residual) / math.sqrt(squares / freedom * (1 - 2 * tail))
    # Use the lower tail, where the distribution function keeps its digits.
    return math.copysign(min(-float(ndtri(stdtr(1 / (tail + 1 / freedom), -student))), _FARTHEST), residual)


_FARTHEST = 8.0
"""Largest score; larger values would carry no information."""

_NOTHING = 1e-9
"""Largest residual that rounding causes if log-norms are equal."""
