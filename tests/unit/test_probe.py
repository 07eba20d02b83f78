"""How real steps correct a prediction, with steps that only pretend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.devices import DeviceClass, MemoryModel, probe
from lightning_fedscale.devices.memory import SIMULATED
from lightning_fedscale.devices.probe import ProbeResult
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.dry_run import DryRunResult
from lightning_fedscale.devices.profiling.memory_tracker import Peak
from lightning_fedscale.devices.profiling.real_step import RealStep
from tests.networks import mlp


def dry_run(batch: int, **how: Any) -> DryRunResult:
    """The bytes of `tests.networks.mlp`: the optimizer's step takes the most up to 113 samples, backward from there."""
    most = max(549_564 + 264 * batch, 318_660 + 2312 * batch)
    return DryRunResult(Peak(most, {"parameters": 104_488, "temporaries": most - 104_488}), StepCost(0.0, 0.0), 0)


PRETENDED: Any = SimpleNamespace(
    run=dry_run, learn=lambda known, smallest: None, learns=False, makes_batches=False, borders=[], assumed=""
)
MODEL = MemoryModel(PRETENDED, mlp(), {})


def machine(factor: float, memory: float, seen: list[int], more: int = 0) -> Callable[[int], RealStep]:
    """Takes ``factor`` times what is predicted and some ``more``, and has so much memory."""

    def measure(batch: int) -> RealStep:
        seen.append(batch)
        peak = int(MODEL.peak(batch) * factor) + more
        return RealStep(peak <= memory, peak > memory, peak if peak <= memory else None, 0.5, "")

    return measure


@settings(deadline=None, max_examples=60)
@given(
    factor=st.floats(1, 1.8),
    more=st.integers(0, 400_000),
    limit=st.sampled_from([None, 50, 10**4]),
    headroom=st.sampled_from([0.0, 0.1]),
)
def test_never_above_the_truth_and_at_most_two_steps(
    factor: float, more: int, limit: int | None, headroom: float
) -> None:
    seen: list[int] = []
    budget = 5_000_000
    found = probe(MODEL, budget, headroom=headroom, limit=limit, measure=machine(factor, budget, seen, more))
    assert found.real_steps == len(seen) <= 2
    assert MODEL.peak(found.max_batch) * factor + more <= budget * (1 + 1e-6)
    if found.verified:
        confirmed = max(n for n in seen if MODEL.peak(n) * factor + more <= budget)
        keeps_headroom = MODEL.peak(confirmed) * factor + more <= budget * (1 - headroom)
        assert found.max_batch == confirmed if keeps_headroom else found.max_batch <= confirmed
    if not found.out_of_memory and factor == 1 and limit is None:
        assert MODEL.peak(found.max_batch + 1) + more > budget * (1 - headroom)  # all that an offset leaves


def test_a_model_that_promises_too_little_is_believed() -> None:
    """More than is predicted to fit is never tried, even where a step took less."""
    found = probe(MODEL, 5_000_000, headroom=0.0, measure=machine(0.5, 5_000_000, []))
    assert found.max_batch == MODEL.max_batch(5_000_000, headroom=0.0)


def test_a_step_that_runs_out_of_memory_halves_once() -> None:
    seen: list[int] = []
    predicted = MODEL.max_batch(5_000_000, headroom=0.0)
    found = probe(MODEL, 5_000_000, headroom=0.0, measure=machine(1.9, 3_000_000, seen))
    assert seen == [predicted // 2, predicted // 4]
    assert (found.max_batch, found.out_of_memory, found.verified) == (predicted // 4, 1, True)


def test_two_that_do_are_an_error() -> None:
    with pytest.raises(ValueError, match="something else uses this memory"):
        probe(MODEL, 5_000_000, measure=machine(10, 5_000_000, []))


def test_less_room_here_than_in_the_budget() -> None:
    """A second copy of the weights lies beside the module, so the largest step cannot be tried, only be calculated."""
    seen: list[int] = []
    found = probe(MODEL, 5_000_000, headroom=0.0, measure=machine(1.0, 4_000_000, seen), physical=4_000_000)
    assert MODEL.peak(max(seen)) <= 4_000_000 < MODEL.peak(found.max_batch)
    assert found.max_batch == MODEL.max_batch(5_000_000, headroom=0.0)
    assert found.measured_batch == max(seen)


@pytest.mark.parametrize("off", [1.0, 1.1, 1.5])
def test_steps_on_a_copy_show_nothing_of_what_the_strategy_keeps(off: float) -> None:
    """They take more than predicted, which must not be taken for memory of the strategy."""
    model = MemoryModel(PRETENDED, mlp(), SIMULATED)
    budget, kept = 5_000_000, model.kept_besides
    assert kept > 0.1 * budget

    def taken(batch: int) -> int:
        return int((model.peak(batch) - kept) * off)

    found = probe(model, budget, headroom=0.0, measure=lambda batch: RealStep(True, False, taken(batch), 0.5, ""))
    truth = taken(found.max_batch) + kept
    assert 0.99 * budget < truth <= budget
    limited = probe(
        model, budget, headroom=0.0, physical=budget - kept,
        measure=lambda batch: RealStep(True, False, taken(batch), 0.5, ""),
    )  # fmt: skip
    assert limited.max_batch == found.max_batch


def test_what_grows_faster_than_predicted_keeps_the_headroom() -> None:
    budget, seen = 5_000_000, []

    def measure(batch: int) -> RealStep:  # 8 % more for every sample, half of which a half batch shows
        seen.append(batch)
        peak = int(MODEL.peak(1) + 1.08 * (MODEL.peak(batch) - MODEL.peak(1)))
        return RealStep(peak <= budget, peak > budget, peak, 0.5, "")

    found = probe(MODEL, budget, headroom=0.1, measure=measure)
    assert (found.real_steps, found.out_of_memory, found.verified) == (2, 0, True)
    assert found.max_batch < max(seen)
    taken = MODEL.peak(1) + 1.08 * (MODEL.peak(found.max_batch) - MODEL.peak(1))
    assert 0.89 * budget < taken <= 0.9 * budget + 1


def test_a_peak_that_does_not_depend_on_the_batch() -> None:
    found = probe(MODEL, 10**8, limit=2, measure=machine(1.0, 10**8, [], more=95_000_000))
    assert found.real_steps <= 2


def test_prediction_alone() -> None:
    found = probe(MODEL, 5_000_000, headroom=0.2, device_classes=[DeviceClass("d", 10**6, 1, 1, 1, 1)])
    assert (found.real_steps, found.verified, found.measured_bytes) == (0, False, None)
    assert found.predicted_bytes == sum(found.parts.values()) == MODEL.peak(found.max_batch) <= 4_000_000
    assert found.predicted_bytes + found.bytes_per_sample > 4_000_000
    assert found.predicted[found.max_batch] == found.predicted_bytes
    assert found.device_classes == {"d": MODEL.max_batch(10**6, 0.2)}
    assert ProbeResult(**found.state_dict()) == found
    assert found.metrics()["probe/max_batch/d"] == MODEL.max_batch(10**6, 0.2)


def test_limits_name_their_kind() -> None:
    assert probe(MODEL, 10**9, limit=10).limited_by == "samples"
    assert probe(MODEL, 10**6, limit=10**9).limited_by == "memory"
