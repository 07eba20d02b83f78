"""Tables of runs that are not what they seem: units, clients counted twice, words, learning rates, lost rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_fedscale.scaling import Rosenfeld, fit, law_from_file
from lightning_fedscale.scaling.runs import read_runs, runs_to_fit
from lightning_fedscale.scaling.tuning import AS_GIVEN, NOT_RECORDED, NOT_TUNED, TUNED, tuned
from tests.features.test_scaling_fit import TRUTH, made

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    """Of one client and of four, each with its own tokens and FLOPs."""
    table = made(noise=0.005, clients=(1, 4), rho=0.6)
    return table.assign(flops=6 * table.params * table.tokens)


def fitted(table: pd.DataFrame, **options: Any) -> Any:
    return fit(table, **{"bootstrap": 0, "holdout": False, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t, ""),
        (lambda t: t.assign(tokens=t.tokens * t.clients, flops=t.flops * t.clients), "which adds 1"),
        (lambda t: t.assign(tokens=t.tokens / t.clients, flops=t.flops / t.clients), "which subtracts 1"),
        (
            lambda t: t.assign(flops=t.flops * t.clients),
            "flops seem to be those of all clients, and tokens those of one",
        ),
        (
            lambda t: t.assign(tokens=t.tokens * t.clients),
            "tokens seem to be those of all clients, and flops those of one",
        ),
        (lambda t: t.assign(flops=t.flops / 1e9), "flops are 1e-09 times 6 params tokens"),
        (lambda t: t.assign(params=t.params / 1e6), "flops are 1e+06 times 6 params tokens"),
        (
            lambda t: t.assign(flops=t.flops.where(t.index != 7, t.flops / 1e3)),
            "in 1 of 70 rows (the first is row 7)",
        ),
    ],
)
def test_mistakes_of_units_are_noticed(runs: pd.DataFrame, change: Any, words: str) -> None:
    problems = fitted(change(runs)).problems
    assert any(words in each for each in problems) if words else problems == ()


def test_weights_that_are_used_often_are_no_mistake(runs: pd.DataFrame) -> None:
    """Convolutions over large images cost thousands of FLOPs per parameter and sample."""
    often = runs.assign(flops=2000 * runs.flops)
    assert any("pass flops_per=" in each for each in fitted(often).problems)
    assert fitted(often, flops_per=12_000.0).problems == ()
    assert fitted(runs.assign(flops=runs.flops * 200)).problems == ()


def test_a_rho_that_cannot_be_is_a_problem_with_its_causes(runs: pd.DataFrame) -> None:
    found = fitted(runs.assign(tokens=runs.tokens * runs.clients).drop(columns="flops"), bootstrap=20)
    assert found.rho.low > 1
    assert "tokens and flops are those of all clients instead of one client" in found.problems[-1]
    with pytest.raises(ValueError, match="do not determine a best size"):
        found.optimal(1e15)


def test_words_are_read_or_named(runs: pd.DataFrame) -> None:
    with pytest.warns(UserWarning, match="the column params holds text"):
        assert fitted(runs.assign(params=runs.params.map(str))).rho.value == pytest.approx(0.6, abs=0.05)
    words = runs.assign(params=["12k", *runs.params[1:]])
    with pytest.raises(ValueError, match=r"params='12k' in row 0 is not a number\. Write it as 12000"):
        fitted(words)


def test_rows_that_are_gone_or_double_are_noticed(runs: pd.DataFrame) -> None:
    assert runs_to_fit(runs, TRUTH).notes == ()
    assert (
        "3 rows between the first and the last were dropped" in runs_to_fit(runs.drop(index=[3, 9, 20]), TRUTH).notes[0]
    )
    twice = pd.concat([runs, runs.head(5)], ignore_index=True)
    assert "5 rows are duplicates" in runs_to_fit(twice, TRUTH).notes[0]
    largest = runs[(runs.clients == 1) | (runs.params < 2e6)].reset_index(drop=True)
    assert runs_to_fit(largest, TRUTH).notes == ("with 4 clients, 1 of 7 sizes are missing",)


def test_folders_without_counts_are_named(tmp_path: Path) -> None:
    columns = "step,compute/params,compute/tokens,compute/flops_total,compute/flops_per_client,val_loss"
    for name, header, row in (("one", columns, "1,10,100,6000,3000,0.5"), ("other", "step,val_loss", "1,0.4")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"{header}\n{row}\n")
    with pytest.warns(UserWarning, match="other did not log compute/params, and is left out"):
        assert read_runs(tmp_path)["clients"].tolist() == [2]


# ---- learning rates


def tried(losses: dict[float, float], clients: int = 1, seed: int = 0) -> pd.DataFrame:
    rows = {"params": 100.0, "tokens": 1e4, "flops": 6e6, "clients": clients, "seed": seed}
    return pd.DataFrame({**rows, "learning_rate": list(losses), "loss": list(losses.values())})


def test_the_best_rate_of_each_case_counts() -> None:
    table = pd.concat(
        [tried({0.1: 0.5, 0.2: 0.3, 0.4: 0.4}), tried({0.1: 0.9, 0.2: 0.8, 0.4: math.nan}, clients=4)],
        ignore_index=True,
    )
    found = tuned(table)
    assert found.table[["clients", "learning_rate"]].to_numpy().tolist() == [[1, 0.2], [4, 0.2]]
    assert (found.said, found.notes) == (TUNED, ())
    edge = tuned(tried({0.1: 0.5, 0.2: 0.3}))
    assert "in 1 of 1 cases the best learning rate is the smallest or the largest" in edge.notes[0]


def test_seeds_that_chose_do_not_count_beside_others() -> None:
    first, *others = tried({0.1: 0.5, 0.2: 0.3, 0.4: 0.4}), tried({0.2: 0.35}, seed=1), tried({0.2: 0.36}, seed=2)
    assert tuned(pd.concat([first, *others], ignore_index=True)).table["loss"].tolist() == [0.35, 0.36]
    # All seeds have tried everything: the mean decides.
    second = tried({0.1: 0.1, 0.2: 0.4, 0.4: 0.4}, seed=1)
    assert tuned(pd.concat([first, second], ignore_index=True)).table["loss"].tolist() == [0.5, 0.1]


def test_every_rho_says_whether_the_rate_was_tuned(runs: pd.DataFrame, tmp_path: Path) -> None:
    assert fitted(runs).learning_rate == NOT_RECORDED
    untuned = fitted(runs.assign(lr=0.1))
    assert untuned.learning_rate == NOT_TUNED
    assert "rho was measured at one learning rate, which says little" in untuned.notes[-1]
    assert fitted(runs.assign(lr=0.1 / runs.clients)).learning_rate == AS_GIVEN
    worse = runs.assign(lr=0.2, loss=runs.loss * 1.3)
    grid = pd.concat([runs.assign(lr=0.1), worse, worse.assign(lr=0.05)], ignore_index=True)
    found = fitted(grid, bootstrap=5)
    assert found.runs == len(runs)
    assert found.learning_rate == TUNED
    assert found.rho.value == pytest.approx(fitted(runs).rho.value, abs=1e-3)
    found.save(tmp_path / "law.json")
    law, rho = law_from_file(tmp_path / "law.json")
    assert law.fitted_rho is not None
    assert law.fitted_rho.source == f"measured, {TUNED}"
    assert law.fitted_rho[:3] == pytest.approx(tuple(found.rho))
    assert rho == law.fitted_rho.value
    assert json.loads((tmp_path / "law.json").read_text())["learning_rate"] == TUNED


def test_rates_that_were_too_small_for_several_clients_make_rho_one() -> None:
    """Loss that depends on steps alone, as with a rate that is too small, and what tuning makes of it."""
    law, rows = Rosenfeld(E=0.3, A=6.0, B=30.0, alpha=0.4, beta=0.35), []
    for clients in (1, 4):
        for params in np.geomspace(200, 20_000, 5):
            for flops in (6e7, 2.5e8, 1e9):
                tokens = flops / (6 * params * clients)
                for rate in (1, 4):
                    worth = tokens * clients ** (0.8 if rate == 4 else 0.0)  # rho 0.2 at the better rate
                    loss = law.loss(params, worth) * (1.02 if rate == 4 and clients == 1 else 1.0)
                    rows.append((params, tokens, clients, rate, loss))
    table = pd.DataFrame(rows, columns=["params", "tokens", "clients", "lr", "loss"])
    fixed = fitted(table[table.lr == 1].reset_index(drop=True))
    assert fixed.rho.value == pytest.approx(1.0, abs=0.02)
    assert fixed.learning_rate == NOT_TUNED
    assert fitted(table).rho.value == pytest.approx(0.2, abs=0.05)
