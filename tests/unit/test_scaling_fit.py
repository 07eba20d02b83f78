"""Fits against the replication of Chinchilla, against laws that made the data, and what they refuse."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import approx_fprime, minimize

from lightning_fedscale.scaling import Chinchilla, Rosenfeld, fit, law_from_file
from lightning_fedscale.scaling.fit import _Data, _starts, runs_table

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_points = pytest.mark.skipif(
    not (DATA / "chinchilla_svg_extracted_data.csv").exists(), reason="needs the digitised points of arXiv 2203.15556"
)
TRUTH = Rosenfeld(E=1.2, A=60.0, B=400.0, alpha=0.35, beta=0.4)


def made(noise: float = 0.0, clients: tuple[int, ...] = (1,), rho: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Runs of a known law on a grid of sizes and compute."""
    rng, rows = np.random.default_rng(seed), []
    for number in clients:
        for params in np.geomspace(1e4, 3e6, 7):
            for flops in np.geomspace(1e12, 1e15, 5):
                tokens = flops / (6 * params)
                loss = TRUTH.loss(params, tokens * number ** (1 - rho)) * math.exp(noise * rng.normal())
                rows.append((params, tokens, number, loss))
    return pd.DataFrame(rows, columns=["params", "tokens", "clients", "loss"])


def chinchilla_points() -> pd.DataFrame:
    """240 of the 245 digitised points: as in the replication, five with the least data per parameter are left out."""
    with (DATA / "chinchilla_svg_extracted_data.csv").open(newline="") as file:
        rows = [(float(r["Model Size"]), float(r["Training FLOP"]), float(r["loss"])) for r in csv.DictReader(file)]
    table = pd.DataFrame(rows, columns=["params", "flops", "loss"])
    ratio = table["flops"] / table["params"] ** 2
    return table.drop(ratio.nsmallest(5).index)


@needs_points
def test_the_replication_of_chinchilla() -> None:
    """arXiv 2404.10102: E 1.817, A 482, B 2085, alpha 0.348, beta 0.366, exponent 0.513, from the same points."""
    found = fit(chinchilla_points(), "Chinchilla", holdout=False, bootstrap=60)
    law = found.law
    assert isinstance(law, Chinchilla)
    assert found.runs == 240
    assert abs(law.E - 1.817) < 0.001
    assert abs(law.A - 480) < 6
    assert abs(law.B - 2100) < 60
    assert 0.3465 < law.alpha < 0.3485
    assert 0.3655 < law.beta < 0.3675
    exponent = found.intervals["exponent"]
    assert 0.512 < exponent.value < 0.5145
    assert exponent.low < 0.5126 < exponent.high
    assert exponent.high - exponent.low < 0.1
    assert not found.problems
    best = found.optimal(1e21)
    assert best.low < Chinchilla().optimal(1e21).params < best.high


@needs_points
def test_one_start_and_a_mean_would_fail() -> None:
    data = _Data.of(runs_table(chinchilla_points()), several=False)
    good = float(data.objective(np.array([math.log(1.8172), math.log(482.01), math.log(2085.43), 0.3478, 0.3658, 1.0])))

    def mean(theta: np.ndarray) -> float:
        return float(data.objective(np.append(theta, 1.0))) / len(data.loss)

    # The mean of Huber losses of 1e-3 is below the usual tolerance long before its minimum.
    early = minimize(mean, [0.0, 5.0, 5.0, 0.5, 0.5], method="L-BFGS-B")
    assert early.fun * len(data.loss) > 1.02 * good
    single = minimize(data.with_gradient, [0.0, 0.0, 0.0, 2.0, 2.0, 1.0], jac=True, method="BFGS")
    assert float(data.objective(single.x)) > 1.02 * good


def test_the_gradient_is_analytic() -> None:
    data = _Data.of(runs_table(made(noise=0.01, clients=(1, 4), rho=0.3)), several=True)
    rng = np.random.default_rng(0)
    for _ in range(5):
        theta = np.array([0.2, 4.0, 6.0, 0.35, 0.4, 0.3]) + 0.1 * rng.normal(size=6)
        value, gradient = data.with_gradient(theta)
        numeric = approx_fprime(theta, lambda t: data.with_gradient(t)[0], 1e-7)
        assert np.allclose(gradient, numeric, rtol=1e-4, atol=1e-4 * abs(value))
    assert len(_starts(data)) == 60


def test_a_law_is_found_again() -> None:
    found = fit(made(), bootstrap=0)
    for name, value in TRUTH.constants.items():
        assert getattr(found.law, name) == pytest.approx(value, rel=1e-3), name
    assert found.error < 1e-5
    assert found.held_out < 1e-4
    assert math.isnan(found.intervals["alpha"].low)


def test_the_price_of_division_is_found_again() -> None:
    found = fit(made(noise=0.003, clients=(1, 4, 16, 64), rho=0.4), bootstrap=20)
    assert found.rho is not None
    assert found.rho.value == pytest.approx(0.4, abs=0.03)
    assert found.rho.low < 0.4 < found.rho.high
    alone, divided = found.optimal(1e15), found.optimal(1e15, clients=16)
    assert divided.value == pytest.approx(alone.value * 16 ** (-0.4 * found.intervals["exponent"].value), rel=0.05)
    assert divided.low < divided.value < divided.high


def test_intervals_cover() -> None:
    """Of 30 fits to noisy runs, about 95 % of the intervals hold the truth."""
    covered, asked = 0, 0
    for seed in range(30):
        found = fit(made(noise=0.01, seed=seed), holdout=False, bootstrap=40, seed=seed)
        truth = {**TRUTH.constants, "exponent": TRUTH.exponent}
        for name in ("alpha", "beta", "exponent"):
            covered += found.intervals[name].low <= truth[name] <= found.intervals[name].high
            asked += 1
    assert covered / asked > 0.8


def test_laws_are_saved_and_read(tmp_path: Path) -> None:
    found = fit(made(clients=(1, 8), rho=0.5), bootstrap=2)
    found.save(tmp_path / "law.json")
    law, rho = law_from_file(tmp_path / "law.json")
    assert law == found.law
    assert rho == pytest.approx(0.5, abs=0.01)
    assert json.loads((tmp_path / "law.json").read_text())["runs"] == found.runs
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a law file"):
        law_from_file(tmp_path / "other.json")


def test_what_the_runs_cannot_say_is_not_said() -> None:
    one_ratio = made()
    one_ratio["tokens"] = 20 * one_ratio["params"]
    one_ratio["loss"] = [TRUTH.loss(n, d) for n, d in zip(one_ratio["params"], one_ratio["tokens"], strict=True)]
    found = fit(one_ratio, bootstrap=2)
    assert "size and data always grow together" in found.problems
    with pytest.raises(ValueError, match=r"do not determine a best size: .*grow together"):
        found.optimal(1e18)
    few = made()
    few = few[few["params"] < 1e5]
    with pytest.raises(ValueError, match="only 3 sizes"):
        fit(few, bootstrap=2).optimal(1e18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="loss"), "the column loss is missing; there are params, tokens, clients"),
        (lambda t: t.drop(columns="tokens"), "a column tokens or flops is missing"),
        (lambda t: t.assign(loss=math.nan), "loss=nan in row 0"),
        (lambda t: t.assign(clients=0), "clients=0 in row 0"),
        (lambda t: t.assign(params=1e6), "all have 1,000,000 parameters"),
        (lambda t: t.head(3), "3 runs for five constants"),
    ],
)
def test_bad_runs_are_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(change(made()))


def test_unknown_laws_are_named() -> None:
    with pytest.raises(ValueError, match="Did you mean 'Chinchilla'"):
        fit(made(), "chinchila")
