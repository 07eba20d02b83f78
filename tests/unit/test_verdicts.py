"""Verdicts are withheld where constants are open or runs contradict the law; predictions say how far they are off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_fedscale.scaling import FORMS, Chinchilla, Law, Rosenfeld, fit, law_from_file, plan, position_of
from lightning_fedscale.scaling.form import EXPONENT, Interval, Refit
from lightning_fedscale.scaling.verdicts import APART, problems_of
from tests.features.test_scaling_fit import TRUTH, made

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")

LARGEST = 1e15
"""FLOPs of the largest runs of `made`."""


def low_floor(noise: float, floor: float = 0.05) -> pd.DataFrame:
    """Runs that end far above the irreducible loss."""
    truth, rng, rows = Rosenfeld(E=floor, A=6.0, B=12.0, alpha=0.25, beta=0.2), np.random.default_rng(0), []
    for params in np.geomspace(1e3, 1e5, 6):
        for flops in np.geomspace(1e9, 1e12, 3):
            loss = truth.loss(params, flops / (6 * params)) * math.exp(noise * rng.normal())
            rows.append((params, flops / (6 * params), loss))
    return pd.DataFrame(rows, columns=["params", "tokens", "loss"])


def top(table: pd.DataFrame) -> pd.Series:
    return 6 * table["params"] * table["tokens"] > 0.9 * LARGEST


def test_a_floor_that_is_lost_in_noise_withholds_the_verdict(tmp_path: Path) -> None:
    found = fit(low_floor(0.02), bootstrap=25)
    (problem,) = found.problems
    assert problem.startswith("E, the irreducible loss, is not determined: 0 to 0.")
    found.save(tmp_path / "law.json")
    law, _ = law_from_file(tmp_path / "law.json")
    for asked in (
        lambda: found.optimal(1e12),
        lambda: law.optimal(1e12),
        lambda: plan(1e12, law=law),
        lambda: position_of(law, params=1e4, tokens=1e7, flops=6e11),
    ):
        with pytest.raises(ValueError, match=r"its runs do not determine a best size .*E, the irreducible loss"):
            asked()
    assert fit(low_floor(0.0), bootstrap=25).problems == ()
    # Where there is none, that is determined.
    assert fit(low_floor(0.0, floor=1e-9), bootstrap=25).problems == ()


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if EXPONENT in form.unknowns.values()])
def test_exponents_that_are_open_are_named(name: str) -> None:
    """Of every form that has some."""
    form = FORMS[name]
    constants: dict[str, Any] = dict.fromkeys(form().missing, 1.0)
    law = form(**constants)
    assert isinstance(law, Law)
    law = law.replace(refits=tuple(Refit(dict(law.constants)) for _ in range(20)))
    table = made().assign(flops=lambda t: 6 * t.params * t.tokens)
    open_, known = Interval(0.3, 0.1, 0.1 * APART * 1.01), Interval(0.3, 0.1, 0.1 * APART * 0.99)
    for exponent in (key for key, unknown in law.unknowns.items() if unknown == EXPONENT):
        said = problems_of(table, law, 1.0, 1.0, {exponent: open_})
        assert [each for each in said if each.startswith(f"{exponent} is not determined: 0.1 to 0.3, more than 3")]
        assert not [each for each in problems_of(table, law, 1.0, 1.0, {exponent: known}) if "not determined" in each]


@pytest.mark.parametrize("factor", [1.14, 0.86])
def test_runs_that_contradict_the_law_withhold_the_verdict(factor: float) -> None:
    """The largest compute is out of line with the law of the rest, above or below."""
    table = made(noise=0.002)
    table.loc[top(table), "loss"] *= factor
    best = table.loc[top(table), "loss"].min()
    found = fit(table, bootstrap=0)
    (problem,) = found.problems
    size = found.law._best_params(LARGEST)
    promised = found.law._loss(size, LARGEST / 6 / size)
    assert f"the law predicts a loss of {promised:.4g} for the best size ({size:,.0f} parameters)" in problem
    assert f"the best run measured {best:.4g} (" in problem
    with pytest.raises(ValueError, match="the best run measured"):
        plan(LARGEST, law=found.law)
    assert fit(made(noise=0.002), bootstrap=0).problems == ()


def test_a_best_size_that_nobody_tried_is_a_note() -> None:
    table = made()
    table = table[~top(table) | (table["params"] < 3e5)].reset_index(drop=True)
    found = fit(table, bootstrap=0)
    assert found.problems == ()
    (note,) = found.notes
    assert note.startswith(
        f"at 1e+15 FLOPs and 1 client, the law predicts a loss of {TRUTH.optimal(LARGEST).loss:.4g} for the best size"
    )
    assert note.endswith("; no run is as large as that size")


def test_the_best_runs_are_fitted() -> None:
    """The error is that of a fit without the largest compute; constants and intervals are of all runs."""
    table = made(noise=0.002)
    table.loc[top(table), "loss"] *= 1.04
    before = fit(table[~top(table)].reset_index(drop=True), bootstrap=0, holdout=False).law
    rows = table[top(table)]
    misses = [
        math.log(before.loss(n, d) / loss) for n, d, loss in zip(rows.params, rows.tokens, rows.loss, strict=True)
    ]
    found, every = fit(table, bootstrap=6), fit(table, bootstrap=6, holdout=False)
    assert found.held_out == pytest.approx(np.sqrt(np.mean(np.square(misses))))
    assert (found.runs, found.law, found.intervals) == (35, every.law, every.intervals)
    assert found.law != before


def test_predictions_are_as_wide_as_the_error_on_held_out_runs(tmp_path: Path) -> None:
    table = made(noise=0.002)
    table.loc[top(table), "loss"] *= 1.04
    found = fit(table, bootstrap=25)
    law = found.law
    assert law.error == found.held_out
    known = law.replace(error=0.0).interval_of_loss(1e6, 1e8)
    wide = law.interval_of_loss(1e6, 1e8)
    assert wide.value == known.value
    for end, narrow in ((wide.low, known.low), (wide.high, known.high)):
        expected = math.hypot(1.96 * found.held_out, math.log(narrow / wide.value))
        assert abs(math.log(end / wide.value)) == pytest.approx(expected)
        assert abs(math.log(end / wide.value)) >= found.held_out
    # Without refits it is the error alone, and of a law that nobody fitted here nothing is added.
    alone = law.replace(refits=()).interval_of_loss(1e6, 1e8)
    assert math.log(alone.high / alone.value) == pytest.approx(1.96 * found.held_out)
    assert Chinchilla().error == 0
    found.save(tmp_path / "law.json")
    assert law_from_file(tmp_path / "law.json")[0].interval_of_loss(1e6, 1e8) == wide
    here = plan(1e14, law=law)
    assert (here.loss_low, here.loss_high) == pytest.approx(
        tuple(law.interval_of_loss(here.params, here.tokens_per_client))[1:]
    )
    without = fit(table, bootstrap=0, holdout=False)
    assert without.law.error == without.error
    without.save(tmp_path / "law.json")
    assert json.loads((tmp_path / "law.json").read_text())["held_out"] is None
    assert law_from_file(tmp_path / "law.json")[0].error == without.error
