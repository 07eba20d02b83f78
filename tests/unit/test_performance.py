"""The performance model against brute force, scipy's own fit, and the formula of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from lightning_fedscale.devices import DeviceClass, PerformanceModel, StepCost, StepTime
from lightning_fedscale.devices.communication import ring_all_reduce
from lightning_fedscale.devices.performance import StepTimes, fit_step_time, roofline, roofline_step_time

POSITIVE = st.floats(1e-4, 10)
MEASURED = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 512), st.floats(0.5, 2)), min_size=2, max_size=30
)  # steps, batch, noise


def measurements(parts: list[tuple[int, int, float]], fixed: float, per_sample: float) -> list[tuple[int, int, float]]:
    return [
        (steps, steps * batch, (fixed * steps + per_sample * steps * batch) * noise) for steps, batch, noise in parts
    ]


def added(rows: list[tuple[int, int, float]]) -> StepTimes:
    times = StepTimes()
    for steps, samples, seconds in rows:
        times = times.add(steps=steps, samples=samples, seconds=seconds)
    return times


@given(MEASURED, POSITIVE, POSITIVE)
def test_exact_times_give_exact_lines(parts: list[tuple[int, int, float]], fixed: float, per_sample: float) -> None:
    assume(max(batch for _, batch, _ in parts) >= 2 * min(batch for _, batch, _ in parts))
    fitted = added(measurements([(steps, batch, 1.0) for steps, batch, _ in parts], fixed, per_sample)).fit()
    assert fitted.identified
    assert fitted.seconds(100) == pytest.approx(fixed + 100 * per_sample, rel=1e-4)
    assert fitted.residual < 1e-5


@given(MEASURED, POSITIVE, POSITIVE)
def test_noisy_times_are_fitted_as_scipy_does(
    parts: list[tuple[int, int, float]], fixed: float, per_sample: float
) -> None:
    rows = measurements(parts, fixed, per_sample)
    fitted = added(rows).fit()
    design = np.array([[steps / seconds, samples / seconds] for steps, samples, seconds in rows])
    _, norm = nnls(design, np.ones(len(rows)))
    assert fitted.residual == pytest.approx(norm / math.sqrt(len(rows)), rel=1e-3, abs=1e-5)
    assert fitted.fixed >= 0
    assert fitted.per_sample >= 0


@given(MEASURED, st.randoms())
def test_the_order_of_measurements_does_not_matter(parts: list[tuple[int, int, float]], random: object) -> None:
    rows = measurements(parts, 0.1, 0.01)
    shuffled = rows[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = added(rows).fit(), added(shuffled).fit()
    assert one.seconds(10) == pytest.approx(other.seconds(10), rel=1e-5)


def test_batches_of_one_size_do_not_tell_the_parts_apart() -> None:
    fitted = fit_step_time([8, 8, 8], [0.5, 0.5, 0.5])
    assert not fitted.identified
    assert fitted.seconds(8) == pytest.approx(0.5)


@pytest.mark.parametrize("small", [1, 21, 31])
def test_noise_alone_does_not_tell_the_parts_apart(small: int) -> None:
    """A loader's batches are of one size but for the last: whichever way that one errs, it is no slope."""
    noise = np.random.default_rng(small)
    batches = ([32] * 43 + [small]) * 2
    hidden = [fit_step_time(batches, noise.lognormal(math.log(0.09), 0.2, len(batches))).identified for _ in range(200)]
    assert sum(hidden) <= 10  # two standard errors: 2.5 % of them


def test_the_parts_are_told_apart_where_both_exceed_the_noise() -> None:
    noise = np.random.default_rng(0)
    batches = [8, 16, 32, 64] * 50
    fitted = fit_step_time(batches, [(0.02 + 0.001 * batch) * noise.lognormal(0, 0.2) for batch in batches])
    assert fitted.identified
    assert fitted.per_sample == pytest.approx(0.001, rel=0.1)
    for fixed, per_sample in ((0.02, 0.0), (0.0, 0.001)):  # of one part there is nothing to see
        seconds = [(fixed + per_sample * batch) * noise.lognormal(0, 0.2) for batch in batches]
        assert not fit_step_time(batches, seconds).identified


def test_nothing_measured() -> None:
    with pytest.raises(ValueError, match="no step has been measured"):
        StepTimes().fit()
    assert StepTimes().add(steps=1, samples=3, seconds=0.0) == StepTimes()
    assert StepTimes().add(steps=1, samples=3, seconds=math.nan) == StepTimes()


# ---- the best batch


@settings(deadline=None)
@given(
    fixed=st.floats(1e-3, 1),
    per_sample=st.floats(1e-3, 0.1),
    sync=st.floats(0, 5),
    noise=st.floats(1, 3000),
    clients=st.integers(1, 20),
    local_steps=st.integers(1, 20),
    most=st.sampled_from([None, 1, 17, 300]),
)
def test_best_batch_is_the_best_of_all(
    fixed: float, per_sample: float, sync: float, noise: float, clients: int, local_steps: int, most: int | None
) -> None:
    model = PerformanceModel(StepTime(fixed, per_sample), sync, noise, most)
    best = model.best_batch(clients, local_steps)
    formula = math.sqrt(noise * (fixed + sync / local_steps) / (clients * per_sample))
    everything = range(1, (most or math.ceil(formula) + 50) + 1)
    seconds = [model.seconds_to_target(batch, clients, local_steps) for batch in everything]
    assert best in everything
    assert seconds[best - 1] == pytest.approx(min(seconds), rel=1e-12)
    if most is None and formula >= 1:
        assert abs(best - formula) <= 1


@given(st.floats(1, 1e5), st.floats(1, 1e4), st.floats(0.1, 1e3), st.floats(0.1, 1e3))
def test_statistical_efficiency_is_adaptdls(batch: float, base: float, variance: float, square: float) -> None:
    """Steps saved per sample, relative to a base batch, as AdaptDL (Qiao et al. 2021) writes it."""
    scale = batch / base
    theirs = (variance + square) / (variance / scale + square) / scale
    noise = base * variance / square
    model = PerformanceModel(StepTime(0, 1), noise_scale=noise)

    def steps(size: float) -> float:
        return model.rounds_to_target(size, clients=1)  # type: ignore[arg-type]

    assert steps(base) / steps(batch) / scale == pytest.approx(theirs)


def test_the_knee() -> None:
    model = PerformanceModel(StepTime(0.1, 0.01))
    assert model.best_batch(clients=3) == 10  # half of a step is work
    assert model.best_batch(clients=3, work_share=0.9) == 90
    assert PerformanceModel(StepTime(0.1, 0.01), max_batch=4).best_batch(1) == 4
    with_sync = PerformanceModel(StepTime(0.1, 0.01), sync=1.0)
    assert with_sync.best_batch(1, local_steps=10) == 20


def test_more_clients_take_smaller_batches() -> None:
    model = PerformanceModel(StepTime(0.1, 0.001), lambda n: ring_all_reduce(1e6, n, 0.01, 1e8), noise_scale=1000)
    assert model.best_batch(4) > model.best_batch(16)
    assert model.time_per_round(10, 4) == pytest.approx(0.11 + ring_all_reduce(1e6, 4, 0.01, 1e8))


def test_nothing_bounds_the_batch() -> None:
    with pytest.raises(ValueError, match="max_batch=None"):
        PerformanceModel(StepTime(0.1, 0.0)).best_batch(1)
    assert PerformanceModel(StepTime(0.1, 0.0), max_batch=99).best_batch(1) == 99


def test_what_is_not_known_is_not_made_up() -> None:
    with pytest.raises(ValueError, match="noise_scale=None"):
        PerformanceModel(StepTime(0.1, 0.01)).rounds_to_target(1, 1)
    assert "rounds_to_target" not in PerformanceModel(StepTime(0.1, 0.01)).table([1, 2], clients=2)


@pytest.mark.parametrize("name", ["batch", "clients", "local_steps"])
def test_nothing_of_something(name: str) -> None:
    model = PerformanceModel(StepTime(0.1, 0.01), noise_scale=10.0)
    arguments = {"batch": 4, "clients": 2, "local_steps": 3, name: 0}
    for ask in (model.time_per_round, model.rounds_to_target, model.seconds_to_target):
        with pytest.raises(ValueError, match=f"{name}=0: pass a number above 0"):
            ask(**arguments)


@pytest.mark.parametrize("name", ["noise_scale", "max_batch"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        PerformanceModel(StepTime(0.1, 0.01), **{name: 0})
    with pytest.raises(ValueError, match="work_share=1"):
        PerformanceModel(StepTime(0.1, 0.01)).best_batch(1, work_share=1)


# ---- devices that are not here


def test_roofline() -> None:
    device = DeviceClass("d", 10**9, flops=100.0, memory_bandwidth=10.0, up=1, down=1)
    assert roofline(StepCost(200.0, 10.0), device) == 2.0
    assert roofline(StepCost(200.0, 100.0), device) == 10.0

    def cost(batch: int) -> StepCost:
        return StepCost(50.0 * batch, 30.0 + batch)

    step = roofline_step_time(cost, device, (10, 100))
    assert step.seconds(10) == pytest.approx(roofline(cost(10), device))
    assert step.seconds(100) == pytest.approx(roofline(cost(100), device))


def test_table_and_plot() -> None:
    model = PerformanceModel(StepTime(0.02, 0.001), 0.1, noise_scale=800, max_batch=256)
    table = model.table([1, 64, 256], clients=4, local_steps=5)
    assert table.loc[64, "seconds_per_round"] == model.time_per_round(64, 4, 5)
    assert table.loc[64, "samples_per_second"] == pytest.approx(4 * 5 * 64 / model.time_per_round(64, 4, 5))
    product = table["rounds_to_target"] * table["seconds_per_round"]
    assert np.allclose(product, table["seconds_to_target"])
    for shown in (model, PerformanceModel(StepTime(0.02, 0.001))):
        (axis,) = shown.plot(clients=4, local_steps=5).axes
        legend = axis.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        assert f"best: {shown.best_batch(4, 5)}" in texts


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: PerformanceModel(3), TypeError, "step=3: pass a StepTime"),  # type: ignore[arg-type]
        (lambda: PerformanceModel(StepTime(1, 1), sync=-1), ValueError, "sync=-1: pass seconds, at least 0, or"),
        (lambda: PerformanceModel(StepTime(1, 1), sync="a"), TypeError, "sync='a': pass seconds"),  # type: ignore[arg-type]
        (
            lambda: PerformanceModel(StepTime(1, 1), noise_scale="a"),  # type: ignore[arg-type]
            TypeError,
            "noise_scale='a': pass a number above 0",
        ),
        (lambda: StepTime(fixed=-1, per_sample=1), ValueError, "fixed=-1: pass seconds, at least 0"),
        (lambda: StepTime(fixed="x", per_sample=1), TypeError, "fixed='x': pass seconds"),  # type: ignore[arg-type]
        (lambda: StepTime(0, math.nan), ValueError, "per_sample=nan: pass seconds"),
    ],
)
def test_what_takes_no_time_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
