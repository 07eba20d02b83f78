"""Detectors against sequences computed by hand, their false alarms against what was asked for, and scale rules."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, poisson

from lightning_fedscale.phases import (
    DETECTORS,
    Decision,
    Detector,
    Observation,
    Phase,
    ScaleRule,
    accordion,
    adascale,
    alarm_limit,
    capped,
    check_rule,
    detector_by_name,
    federated_gradient_norm,
    fisher_trace,
    linear_ramp,
    page_hinkley,
    reads_noise,
    relative_change,
    run_length_of,
    step,
)
from lightning_fedscale.phases.regression import empty_triangle, predicted, take_row


def judged(detector: Detector, observations: Iterable[Observation]) -> list[Decision]:
    state, decisions = detector.init(), []
    for observation in observations:
        decision, state = detector.update(state, observation)
        decisions.append(decision)
    return decisions


def of_norms(values: Iterable[float]) -> list[Observation]:
    return [Observation([float(value)]) for value in values]


class MovingAverage:
    """SelSync's own smoothing, as its paper and code describe it: a list, weighted by age, of at most ``window``."""

    def __init__(self, window: int, alpha: float) -> None:
        self.window, self.alpha, self.values = window, alpha, list[float]()

    def __call__(self, value: float) -> float:
        self.values.append(value)
        self.values = self.values[-self.window :]
        top = bottom = 0.0
        for age, old in enumerate(reversed(self.values), start=1):
            top += (1 - self.alpha) ** age * old
            bottom += (1 - self.alpha) ** age
        return top / bottom


@pytest.mark.parametrize(("window", "alpha", "threshold"), [(25, 0.01, 0.02), (3, 0.5, 0.3), (1, 0.0, 0.1)])
def test_relative_change_is_selsyncs(window: int, alpha: float, threshold: float) -> None:
    rng = np.random.default_rng(1)
    layers = np.exp(rng.normal(size=(80, 3)) * 0.3)
    layers[40:] *= 4
    decisions = judged(relative_change(threshold, window, alpha), [Observation(row.tolist()) for row in layers])
    norm_meter, change_meter, previous = MovingAverage(window, alpha), MovingAverage(window, alpha), None
    for number, (row, decision) in enumerate(zip(layers, decisions, strict=True)):
        smoothed = norm_meter(row.sum())  # of the layers' norms, not the norm of all
        if previous is not None:
            change = change_meter(abs(smoothed - previous) / previous)
            assert decision.statistic == pytest.approx(change, rel=1e-12)
            assert decision.critical == (number < window or change >= threshold)
        else:
            assert decision.critical
            assert math.isnan(decision.statistic)
        previous = smoothed
    assert {decision.critical for decision in decisions} == {True, False}


class PublishedMeter:
    """SelSync's smoothing to the letter: nothing until the window is full, then the oldest leaves with each answer."""

    def __init__(self, window: int, alpha: float) -> None:
        self.window, self.alpha, self.held, self.answer = window, alpha, list[float](), 0.0

    def __call__(self, value: float) -> float:
        self.held.append(value)
        if len(self.held) == self.window:
            weights = [(1 - self.alpha) ** (self.window - place) for place in range(self.window)]
            self.answer = sum(w * v for w, v in zip(weights, self.held, strict=True)) / sum(weights)
            del self.held[0]
        return self.answer


@pytest.mark.parametrize(("window", "alpha"), [(25, 0.01), (5, 0.2), (1, 0.0)])
def test_relative_change_becomes_the_published_code(window: int, alpha: float) -> None:
    """That divides by the zero of its empty window, here kept from it; two windows later nothing is left of that."""
    rng = np.random.default_rng(2)
    layers = np.exp(rng.normal(size=(6 * window + 30, 4)) * 0.3)
    layers[4 * window :] *= 4
    threshold = 0.3 / window
    decisions = judged(relative_change(threshold, window, alpha), [Observation(row.tolist()) for row in layers])
    norm_meter, change_meter, before, seen = PublishedMeter(window, alpha), PublishedMeter(window, alpha), 1.0, set()
    for number, (row, decision) in enumerate(zip(layers, decisions, strict=True)):
        now = norm_meter(row.sum())
        change, before = change_meter(abs(now - before) / before if before else 0.0), now
        if number >= 2 * window:
            assert decision.statistic == pytest.approx(change, rel=1e-12)
            assert decision.critical == (change >= threshold)
            seen.add(decision.critical)
    assert seen == {True, False}


def test_relative_change_by_hand() -> None:
    """Window 2, alpha 1/2: a mean weighs the newest twice as much as the one before."""
    decisions = judged(relative_change(0.25, window=2, alpha=0.5), of_norms([3.0, 6.0, 6.0, 3.0, 3.0, 3.0]))
    means = [3.0, 5.0, 6.0, 4.0, 3.0, 3.0]
    changes = [2 / 3, 1 / 5, 1 / 3, 1 / 4, 0.0]
    assert means == [3.0] + [(2 * new + old) / 3 for old, new in [(3, 6), (6, 6), (6, 3), (3, 3), (3, 3)]]
    smoothed = [2 / 3, (2 / 5 + 2 / 3) / 3, (2 / 3 + 1 / 5) / 3, (2 / 4 + 1 / 3) / 3, (0 + 1 / 4) / 3]
    assert changes == pytest.approx([abs(b - a) / a for a, b in pairwise(means)])
    assert [decision.statistic for decision in decisions[1:]] == pytest.approx(smoothed)
    assert [decision.critical for decision in decisions] == [True, True, True, True, True, False]


def test_relative_change_survives_vanishing_gradients() -> None:
    decisions = judged(relative_change(0.3, window=1), of_norms([0, 0, 0, 1, 1, 0]))
    assert [decision.statistic for decision in decisions[1:]] == [0, 0, 1, 0, 1]
    assert [decision.critical for decision in decisions] == [True, False, False, True, False, True]


def test_accordion_looks_every_interval() -> None:
    norms = [(1.0, 1.0), (9.0, 9.0), (1.2, 1.4), (9.0, 9.0), (1.2, 0.5), (1.2, 0.5), (1.2, 0.5)]
    decisions = judged(accordion(0.5, interval=2), [Observation(pair) for pair in norms])
    # Compared are the 1st, 3rd, 5th and 7th: first by 20 and 40 %, then by 64 % in one layer, then not at all.
    assert [decision.critical for decision in decisions] == [True, True, False, False, True, True, False]
    assert decisions[4].statistic == pytest.approx(0.9 / 1.4)


def test_accordion_is_critical_after_the_learning_rate_decays() -> None:
    rates = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    decisions = judged(accordion(0.5, interval=2), [Observation([1.0], learning_rate=rate) for rate in rates])
    assert [decision.critical for decision in decisions] == [True, True, False, True, False, False]


def test_growth_detectors_look_upwards_only() -> None:
    squares = [1.0, 1.0, 1.005, 1.02, 0.5, 0.6]
    for make, field in ((federated_gradient_norm, "client_square"), (fisher_trace, "fisher_trace")):
        detector = make()
        assert detector.needs == field
        decisions = judged(detector, [Observation([1.0], **{field: square}) for square in squares])
        assert [decision.critical for decision in decisions] == [True, False, False, True, False, True]
        assert decisions[4].statistic == pytest.approx(0.5 / 1.02 - 1)
    unknown = judged(fisher_trace(), of_norms([1, 2]))
    assert all(decision.critical and math.isnan(decision.statistic) for decision in unknown)


# ---- false alarms


def alarms_and_delay(detector: Detector, norms: np.ndarray) -> list[int]:
    """Positions of alarms: where the phase becomes critical, or stays so by a further alarm."""
    state, alarms = detector.init(), []
    for number, observation in enumerate(of_norms(norms)):
        decision, state = detector.update(state, observation)
        if decision.statistic > decision.threshold:
            alarms.append(number)
    return alarms


@pytest.mark.parametrize(("rate", "spread"), [(1.0, 0.05), (5.0, 0.5)])
def test_false_alarms_come_at_the_rate_asked_for(rate: float, spread: float) -> None:
    """On runs of 500 stationary, noisy norms, the number of alarms lies where it should, whatever their level."""
    rng = np.random.default_rng(0)
    detector, runs = page_hinkley(rate), 200 if rate == 1.0 else 100
    counts = [
        len(alarms_and_delay(detector, np.exp(rng.uniform(-5, 5) + spread * rng.normal(size=500)))) for _ in range(runs)
    ]
    expected = rate / 1000 * 500 * runs
    # Runs that start anew have no alarm at once, so short ones have a few less than the rate.
    assert poisson.ppf(0.001, 0.85 * expected) <= sum(counts) <= poisson.ppf(0.999, expected)


def autoregressive(rng: np.random.Generator, memory: float, length: int) -> np.ndarray:
    noise = rng.normal(size=length)
    for i in range(1, length):
        noise[i] = memory * noise[i - 1] + math.sqrt(1 - memory**2) * noise[i]
    return noise


NULL: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "half from step to step": lambda rng, n: autoregressive(rng, 0.5, n),
    "nearly all": lambda rng, n: autoregressive(rng, 0.95, n),
    "a slow part and noise": lambda rng, n: autoregressive(rng, 0.95, n) + rng.normal(size=n),
    "means of ten": lambda rng, n: np.convolve(rng.normal(size=n + 9), np.full(10, 0.3), "valid"),
    "heavy tails": lambda rng, n: rng.standard_t(3, size=n),
}


# A long memory is forgotten only within long runs without an alarm.
@pytest.mark.parametrize(("name", "rate"), [(name, 2.0 if name == "nearly all" else 4.0) for name in NULL])
def test_no_kind_of_noise_gives_many_more_alarms(name: str, rate: float) -> None:
    """At most a third more than asked for, where independent, normal norms are supposed it is two to thirty times."""
    rng = np.random.default_rng(0)
    detector, runs = page_hinkley(rate), [np.exp(0.2 * NULL[name](rng, 1000)) for _ in range(int(200 / rate))]
    found = sum(len(alarms_and_delay(detector, norms)) for norms in runs)
    assert poisson.ppf(0.001, 0.85 * 200) <= found <= poisson.ppf(0.999, 4 / 3 * 200)


def test_noise_counts_by_its_own_spread() -> None:
    """However small that is: what a constant learning signal leaves is judged as coarse noise is."""
    deviations = np.random.default_rng(5).normal(size=300)
    deviations[200:] += 1.5
    coarse, fine = (judged(page_hinkley(), of_norms(np.exp(s * deviations))) for s in (0.1, 1e-6))
    assert [d.statistic for d in fine] == pytest.approx([d.statistic for d in coarse], abs=1e-3)
    assert max(d.statistic for d in coarse) > coarse[0].threshold


@pytest.mark.parametrize("same", [False, True])
def test_rows_are_regressed_as_by_least_squares(same: bool) -> None:
    """Weight, deviation and prediction of each row, also where a column is twice another."""
    rng = np.random.default_rng(6)
    given = np.column_stack([np.ones(30), rng.normal(size=(30, 3)).cumsum(0)])
    if same:
        given[:, 2] = 2 * given[:, 1]
    values, triangle = given @ [1.0, 0.5, -1.0, 2.0] + rng.normal(size=30), empty_triangle(4)
    for number, (row, value) in enumerate(zip(given.tolist(), values.tolist(), strict=True)):
        before = given[:number]
        expected = predicted(triangle, row)
        weight, deviation, triangle = take_row(triangle, row, value)
        if number >= 4:
            fit = np.linalg.lstsq(before, values[:number], rcond=None)[0]
            leverage = row @ np.linalg.pinv(before.T @ before) @ row
            assert weight == pytest.approx(1 / (1 + leverage))
            assert value - deviation == pytest.approx(row @ fit)
            assert value - deviation == pytest.approx(expected)
        elif number < 3:
            assert weight == 0


def test_a_state_of_another_detector_or_an_earlier_version_starts_anew() -> None:
    detector, decision = page_hinkley(hold=3), None
    numbers = {"count": 9, "squares": 2.0, "up": 0.0, "down": 0.0, "quiet": 40}
    regressed = {"origin": 0.0, "before": [0.1] * 4, "products": [1.0] * 36}
    for other in ({**numbers, "mean": 1.0}, {**numbers, **regressed}, {"norms": [1.0]}):
        state: dict[str, Any] = other
        for observation in of_norms([1.0, 1.1, 0.9, 1.0]):
            decision, state = detector.update(state, observation)
        assert decision is not None
        assert not decision.critical
        assert state.keys() == detector.init().keys()


@pytest.mark.parametrize(("order", "soon"), [(0, 7), (4, 12)])
def test_planted_changes_are_found_soon(order: int, soon: int) -> None:
    rng, delays = np.random.default_rng(0), []
    detector = page_hinkley(1.0, order=order)
    for _ in range(200):
        norms = np.exp(0.1 * rng.normal(size=150))
        norms[100:] *= 1.2  # about 1.8 standard deviations
        found = [alarm for alarm in alarms_and_delay(detector, norms) if alarm >= 100]
        delays.append(found[0] - 100 if found else math.inf)
    assert binomtest(sum(delay <= 12 for delay in delays), 200, 0.8 if order == 0 else 0.5, "less").pvalue > 0.001
    assert np.median(delays) <= soon


def test_a_phase_is_critical_as_long_as_held() -> None:
    detector = page_hinkley(1.0, hold=10)
    norms = [1.0, 1.05, 0.95] * 20 + [3.0, 3.1, 2.9] * 10
    decisions = judged(detector, of_norms(norms))
    critical = [decision.critical for decision in decisions]
    assert critical[:10] == [True] * 10
    assert not any(critical[10:60])
    first = critical.index(True, 10)
    assert first in (60, 61)
    assert critical[first : first + 11] == [True] * 11
    assert not any(critical[first + 11 :])


def test_the_alarm_limit_is_that_of_the_tables() -> None:
    """Average run lengths of one-sided sums with a drift of half a standard deviation, as tabulated (Hawkins 1993)."""
    for limit, run_length in ((3.0, 117.6), (4.0, 335.4), (5.0, 930.9)):
        assert run_length_of(limit) == pytest.approx(run_length, rel=2e-3)
        assert alarm_limit(run_length / 2) == pytest.approx(limit, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 100.0), st.floats(0.1, 1.5))
def test_the_alarm_limit_inverts_the_run_length(rate: float, drift: float) -> None:
    assert run_length_of(alarm_limit(1000 / rate, drift), drift) / 2 == pytest.approx(1000 / rate, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=30, max_size=60), st.floats(0.01, 100.0), st.sampled_from(sorted(DETECTORS))
)
def test_detectors_do_not_mind_the_unit(norms: list[float], factor: float, name: str) -> None:
    """Gradients in another unit (a loss times a constant) give the same phases."""

    def seen(scale: float) -> list[Observation]:
        return [Observation([scale * n], client_square=(scale * n) ** 2, fisher_trace=scale * n) for n in norms]

    decisions, others = (judged(detector_by_name(name, 0.3), seen(scale)) for scale in (1.0, factor))
    for one, other in zip(decisions, others, strict=True):
        near = abs(one.statistic - one.threshold) < 1e-6 * max(1.0, abs(one.threshold))
        assert near or one.critical == other.critical


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_states_are_left_alone(name: str) -> None:
    detector = detector_by_name(name, 0.3)
    state = detector.init()
    for norm in (1.0, 2.0, 1.5):
        kept = {key: [*value] if isinstance(value, list) else value for key, value in state.items()}
        _, following = detector.update(state, Observation([norm], norm, norm))
        assert str(state) == str(kept)
        state = following


# ---- scale rules


@pytest.mark.parametrize(
    "make",
    [
        lambda: relative_change(np.float32(0.25), np.int64(2), np.float32(0.01)),  # type: ignore[arg-type]
        lambda: accordion(np.float32(0.25), np.int64(1), np.int64(1)),  # type: ignore[arg-type]
        lambda: page_hinkley(np.float32(2.0), np.float32(0.5), np.int64(3), np.int64(1)),  # type: ignore[arg-type]
        lambda: federated_gradient_norm(np.float32(0.25), np.int64(2)),  # type: ignore[arg-type]
        lambda: fisher_trace(np.float32(0.25), np.int64(2)),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_numpy_leave_states_that_any_checkpoint_can_store(make: Callable[[], Detector]) -> None:
    detector = make()
    state = detector.init()
    for value in (1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 9.0):
        decision, state = detector.update(state, Observation([value], value, value, value))
        saved = io.BytesIO()
        torch.save([state, list(decision), detector.accumulate], saved)
        assert torch.load(io.BytesIO(saved.getvalue()), weights_only=True)[1][0] is decision.critical


@pytest.mark.parametrize("rule", [step, linear_ramp, partial(adascale, reference=2.0), partial(capped, step(8.0))])
def test_rules_of_numpy_return_floats(rule: Callable[..., ScaleRule]) -> None:
    factor = rule(np.float32(4.0))(Phase(critical=False, quiet=1, noise_scale=8.0))
    assert type(factor) is float


def test_step_ramp_and_cap() -> None:
    critical, quiet = Phase(True, 0), Phase(False, 50)
    assert [rule(critical) for rule in (step(4.0), linear_ramp(4.0, 100), capped(step(4.0), 2.0))] == [1.0, 1.0, 1.0]
    assert [rule(quiet) for rule in (step(4.0), linear_ramp(4.0, 100), capped(step(4.0), 2.0))] == [4.0, 2.5, 2.0]


@settings(max_examples=100, deadline=None)
@given(st.floats(1, 1e4), st.floats(1, 100), st.floats(0, 1e6))
def test_adascale_is_the_papers_gain(reference: float, ratio: float, noise_scale: float) -> None:
    gain = adascale(reference * ratio, reference)(Phase(False, 1, noise_scale))
    variance, square = (
        noise_scale / reference,
        1.0,
    )  # of the reference batch's gradient, in units of the squared gradient
    assert gain == pytest.approx((variance + square) / (variance / ratio + square), rel=1e-9)
    assert 1.0 - 1e-9 <= gain <= ratio * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda phase: -1.0, r"scale=.* -1.0 for Phase\(critical=True"),
        (lambda phase: 1.0 if phase.critical else math.inf, r"scale=.* inf for Phase\(critical=False"),
        (lambda phase: "twice", "scale=.*'twice'"),
        (lambda phase: True, "scale=.* True for Phase"),
    ],
)
def test_rules_that_answer_otherwise_are_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rule(rule)
    for good in (step(), linear_ramp(), adascale(64, 8), capped(step(3.0), 2.0)):
        check_rule(good)


def test_which_rules_read_the_noise_scale() -> None:
    rules = [step(), linear_ramp(), capped(linear_ramp(), 1.5), adascale(64, 8), capped(adascale(64, 8), 2.0)]
    assert [reads_noise(rule) for rule in rules] == [False, False, False, True, True]


def test_adascale_waits_for_evidence() -> None:
    rule = adascale(512, 64)
    assert rule(Phase(False, 10)) == 1.0
    assert rule(Phase(True, 0, 1000.0)) == 1.0
    assert rule(Phase(False, 1, math.inf)) == 8.0


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: relative_change(threshold=0), "threshold=0"),
        (lambda: relative_change(threshold=math.nan), r"threshold=nan"),
        (lambda: relative_change(window=0), "window=0"),
        (lambda: relative_change(alpha=1.0), "alpha=1.0"),
        (lambda: page_hinkley(false_alarms=500), "false_alarms=500: .*66"),
        (lambda: page_hinkley(order=-1), "order=-1"),
        (lambda: step(-1.0), "scale=-1.0"),
        (lambda: linear_ramp(2.0, length=0), r"length=0"),
        (lambda: adascale(64, 128), "reference=128: .*batch=64"),
        (lambda: capped(step(), 0), r"limit=0"),
        (lambda: detector_by_name("page-hinkley", 1.0), r"Did you mean 'page_hinkley'\?"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_arguments_of_a_wrong_type_are_named() -> None:
    with pytest.raises(TypeError, match=r"interval=2\.5"):
        accordion(interval=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="hold=True"):
        page_hinkley(hold=True)
