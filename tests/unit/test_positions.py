"""Positions over a span of rho: a verdict only where all of it agrees, and sentences that name what was assumed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.scaling import Chinchilla, DiLoCo, Interval, Porian, position_of
from lightning_fedscale.scaling.position import plot
from lightning_fedscale.scaling.rho import UNMEASURED, Rho, rho_of

pytestmark = pytest.mark.filterwarnings("ignore")


def stands(params: float = 1e9, clients: int = 10, law: Any = None, flops: float = 1e20, **options: Any) -> Any:
    law = Chinchilla() if law is None else law
    return position_of(law, params=params, tokens=flops / (6 * params), flops=flops, clients=clients, **options)


@settings(max_examples=25, deadline=None)
@given(st.floats(7.5, 10.5), st.integers(2, 1000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_verdict_over_a_span_is_that_of_everything_in_it(
    size: float, clients: int, one: float, other: float, share: float
) -> None:
    low, high = sorted((one, other))
    over = stands(10**size, clients, rho=(low, high))
    inside = stands(10**size, clients, rho=low + share * (high - low), full=False)
    if over.verdict is not None:
        assert inside._verdict(inside.optimal_params) == over.verdict
        assert over.verdict.removeprefix("right") in over.advice()
    else:
        assert "no verdict" in over.advice()


def test_the_assumption_is_never_hidden() -> None:
    assert "no verdict for 10 clients" in stands().advice()
    assert "rho 0 (all compute counts, as in data parallelism) the size is right" in stands().advice()
    assert (
        "rho 1 (only the average client's compute counts) it is 3.8 times (3.4 to 4.2) too large" in stands().advice()
    )
    words = (
        "the model is 2.1 to 3.8 times too large for 10 clients, depending on rho (0.5 to 1; measure it with fedscale"
        " sweep)"
    )
    assert stands(rho=(0.5, 1.0)).advice().startswith(words)
    assert stands(4e7).advice().startswith("the model is 6.6 to 21.3 times too small")
    for rho in (0.24, 1.0, 0.0):
        assert f"for 10 clients (rho {rho:g})" in stands(rho=rho).advice()
    assert "the size is right for 2 clients at any rho from 0 to 1" in stands(clients=2).advice()
    assert "rho" not in stands(clients=1).advice()  # nothing is divided


def test_ends_of_the_span_are_in_the_interval() -> None:
    over = stands()
    lower, upper = over.readings
    assert (lower.rho, upper.rho) == (0.0, 1.0)
    assert over.ends == pytest.approx((upper.ends[0], lower.ends[1]))
    saved = over.as_dict()
    assert saved["rho_ends"] == [0.0, 1.0]
    assert saved["rho_source"] == "not measured"
    assert saved["verdict"] is None
    assert [each["rho"] for each in saved["readings"]] == [0.0, 1.0]


def test_constants_that_are_hardly_known_give_no_verdict() -> None:
    from dataclasses import replace

    position = stands(rho=1.0)
    wide = replace(position, uncertainty=Interval(position.optimal_params, 5e7, 2e9))
    assert wide.verdict is None
    assert (
        "no verdict for 10 clients (rho 1): the best size lies anywhere between 50 M and 2 B parameters"
        in wide.advice()
    )


def test_what_rho_may_be() -> None:
    measured = Rho(0.5, 0.3, 0.8, "measured, tuned", is_measured=True)
    assert rho_of("auto") == rho_of(None) == UNMEASURED
    assert rho_of("auto", measured) == measured
    assert rho_of(0.24, measured) == Rho(0.24, 0.24, 0.24)
    assert rho_of([1.0, 0.5]) == Rho(1.0, 0.5, 1.0)
    for wrong in ("x", True, (0.1, 0.2, 0.3), (0.0, math.inf), object()):
        with pytest.raises(ValueError, match="rho="):
            rho_of(wrong)


def test_diloco_knows_what_replicas_cost() -> None:
    """On its 20 tokens per parameter with a loss, elsewhere with a size."""
    flops = 120 * 9e8**2
    at = stands(9e8, 4, DiLoCo(), flops)
    assert at.predicted_loss == pytest.approx(DiLoCo(replicas=4).loss(9e8, 18e9))
    assert at.verdict == "right"
    assert "rho" not in at.advice()
    assert stands(9e8, 4, DiLoCo(), flops, rho=0.3) == at
    large = stands(9e9, 4, DiLoCo(), flops)
    assert large.optimal_params == pytest.approx(9e8)
    assert math.isnan(large.predicted_loss)
    assert large.advice().startswith(
        "the model is 10.0 times too large for 4 clients; a model of 900 M parameters would reach a loss of"
        f" {at.optimal_loss:.3g}"
    )
    assert large.sentences().endswith(
        "DiLoCo does not predict the loss of this run: it was fitted at 20 tokens of all replicas together per"
        " parameter."
    )
    assert at.no_loss == ""
    with pytest.raises(ValueError, match="20 tokens per parameter"):
        DiLoCo().loss(1e9, 1e9)


def test_a_law_of_sizes_has_no_band_of_its_own() -> None:
    best = Porian().optimal(1e19).params
    assert stands(1.9 * best, 1, Porian(), 1e19).verdict == "right"
    assert stands(2.1 * best, 1, Porian(), 1e19).verdict == "too large"
    assert stands(best / 2.1, 1, Porian(), 1e19).verdict == "too small"


def test_a_span_has_a_picture() -> None:
    (axes,) = plot(stands(), Chinchilla()).axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"best size (rho 0)", "best size (rho 1)"} <= set(labels)
