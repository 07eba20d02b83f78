"""What laws were made for, and what is said of runs that are too mixed, too short or of too little data for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_fedscale.partitioners import Partition
from lightning_fedscale.scaling import RepeatedData, Rosenfeld, fit, law_from_file, write_report
from lightning_fedscale.scaling.made_for import Best, MadeFor, made_for
from lightning_fedscale.scaling.runs import runs_to_fit
from lightning_fedscale.scaling.selection import mixed_settings, select
from lightning_fedscale.scaling.tuning import TUNED
from tests.features.test_scaling_fit import TRUTH, made

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")

EIGHT = Partition.from_lists([[i, i + 8] for i in range(8)])
OTHER = Partition.from_lists([[2 * i, 2 * i + 1] for i in range(8)])

SAMPLES = 10**12
"""More than any run takes."""


def swept(**columns: Any) -> pd.DataFrame:
    """A table as a sweep of a perceptron's width writes it, of eight clients with a partition from a file."""
    table = made()
    widths = {params: 2.0**power for power, params in enumerate(sorted(table["params"].unique()), start=2)}
    facts: dict[str, Any] = {
        "size": table["params"].map(widths).astype(int), "argument": "width", "clients": 8, "method": "scaffold",
        "partition": EIGHT.fingerprint, "partition_name": "hospitals.json", "fingerprint": EIGHT.fingerprint,
        "mean_js_distance": 0.05, "samples": SAMPLES, "batch_size": 0, "batch": 32, "local_steps": 5,
        "optimizer": "SGD", "rounds": 50, "learning_rate": 1.0,
    }  # fmt: skip
    facts |= columns
    passes = table["tokens"] * facts["clients"] / facts["samples"]
    return table.assign(**{"passes": passes, **facts})


def test_a_law_records_what_it_was_made_for(tmp_path: Path) -> None:
    found = fit(swept(), bootstrap=0)
    made_of = found.made_for
    assert (
        str(made_of)
        == f"scaffold on partition hospitals.json ({EIGHT.fingerprint[:8]}), 8 clients, batch 32, 5 local steps"
    )
    assert made_of.fingerprint == EIGHT.fingerprint
    assert (made_of.mean_js_distance, made_of.samples, made_of.clients) == (0.05, SAMPLES, (8,))
    assert (made_of.method, made_of.batch_size, made_of.local_steps, made_of.optimizer) == ("scaffold", 32, 5, "SGD")
    assert made_of.tokens_per_sample == pytest.approx(1.0)
    assert made_of.argument == "width"
    assert [size for size, _ in made_of.sizes] == [4, 8, 16, 32, 64, 128, 256]
    assert made_of.passes == pytest.approx((swept()["passes"].min(), swept()["passes"].max()))
    assert made_of.unknown == []
    found.save(tmp_path / "law.json")
    law, _ = law_from_file(tmp_path / "law.json")
    assert law.made_for == found.law.made_for == made_of
    saved = json.loads((tmp_path / "law.json").read_text())["made_for"]
    assert saved["clients"] == [8]
    assert saved["unknown"] == []
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert f"- [x] method of the runs: {made_of}; clients' optimizer: SGD" in page


def test_what_a_table_does_not_say_is_unknown(tmp_path: Path) -> None:
    found = fit(made().drop(columns="clients"), bootstrap=0)
    assert found.made_for.clients == ()
    assert set(found.made_for.unknown) == {
        "partition", "method", "batch_size", "local_steps", "optimizer", "passes", "clients"
    }  # fmt: skip
    assert str(found.made_for) == ""
    assert "not recorded in the table of runs: partition, method" in write_report(found, tmp_path).read_text("utf-8")


def test_laws_of_before_are_read(tmp_path: Path) -> None:
    file = tmp_path / "law.json"
    fit(made(), bootstrap=0).save(file)
    before = json.loads(file.read_text())
    del before["made_for"]
    file.write_text(json.dumps(before))
    law, _ = law_from_file(file)
    assert law.made_for == MadeFor()
    assert law.optimal(1e14).params == pytest.approx(TRUTH.optimal(1e14).params, rel=0.01)


MIXED: dict[str, Any] = {
    "method": "fed_avg", "partition": OTHER.fingerprint, "batch_size": 64, "local_steps": 20, "optimizer": "Adam",
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_a_table_of_two_kinds_of_runs_is_noticed_and_taken_apart(name: str) -> None:
    worse = swept(**{name: MIXED[name]})
    worse["loss"] *= 1.3
    if name == "partition":
        worse = worse.assign(fingerprint=OTHER.fingerprint, partition_name="others.json")
    both = pd.concat([swept(batch_size=32), worse.assign(**({} if name == "batch_size" else {"batch_size": 32}))])
    both = both.reset_index(drop=True)
    found = runs_to_fit(both, TRUTH)
    assert len(found.table) == len(both)  # the best rate of one is not that of the other
    (note,) = [each for each in found.notes if "fit each separately" in each]
    assert " two " in note
    assert getattr(found.made_for, name) is None
    if name == "optimizer":
        return
    asked: Any = OTHER if name == "partition" else MIXED[name]
    alone = runs_to_fit(both, TRUTH, **{name: asked})
    assert len(alone.table) == len(worse)
    assert not any("fit each separately" in each or "dropped" in each for each in alone.notes)
    assert alone.table["loss"].tolist() == worse["loss"].tolist()


def test_a_partition_is_named_by_its_file_or_its_partitioner(tmp_path: Path) -> None:
    EIGHT.save(tmp_path / "mine.json")
    both = pd.concat([swept(), swept(partition="iid", partition_name="iid", fingerprint=OTHER.fingerprint)])
    for given, number in ((str(tmp_path / "mine.json"), 35), (tmp_path / "mine.json", 35), ("iid", 35)):
        assert len(select(both, partition=given)) == number
    # The same partitioner among several numbers of clients makes several partitions, which are no mixture.
    divided = pd.concat([swept(partition="iid", fingerprint="a"), swept(partition="iid", fingerprint="b", clients=4)])
    assert mixed_settings(divided) == []
    assert mixed_settings(divided.drop(columns="partition")) == []
    assert made_for(divided.assign(partition_name="iid")).partition == "iid"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "scafold"}, "method='scafold': no run.* scaffold"),
        ({"local_steps": 7}, "local_steps=7: no run.* 5"),
        ({"partition": OTHER}, f"partition=.*: no run.* {EIGHT.fingerprint[:8]}"),
        ({"partition": "none.json"}, "partition='none.json': .*does not exist"),
        ({"partition": "wrong.json"}, "partition='wrong.json': .* no saved partition"),
    ],
)
def test_rows_that_are_not_there_are_named(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text("[1]")
    with pytest.raises(ValueError, match=message):
        fit(swept(), **asked)
    with pytest.raises(ValueError, match=r"method='scaffold': .*not record"):
        fit(made(), method="scaffold")
    with pytest.raises(TypeError, match="partition=3: pass a partitioner's name"):
        fit(swept(), partition=3)


def test_best_runs_are_the_measured_ones() -> None:
    table = runs_to_fit(swept(), TRUTH).table
    best = made_for(table, TUNED).best
    assert len(best) == 5
    for each in best:
        rows = table[np.isclose(table["flops"] * 8, each.flops)]
        assert len(rows) == 7
        assert (each.clients, each.loss) == (8, rows["loss"].min())
    twice = pd.concat([table, table.assign(loss=table["loss"] * 1.2)])  # of seeds, the mean
    assert made_for(twice).best[0].loss == pytest.approx(1.1 * best[0].loss)
    assert MadeFor(best=(Best(1e9, 8, 10.0, 0.5),)).best_at(1.1e9, 8) is not None
    assert MadeFor(best=(Best(1e9, 8, 10.0, 0.5),)).best_at(1.1e9, 4) is None
    assert MadeFor(best=(Best(1e9, 8, 10.0, 0.5),)).best_at(2e9, 8) is None


def test_sizes_are_read_between_runs() -> None:
    known = MadeFor(argument="depth", sizes=((1.0, 100.0), (2.0, 400.0), (4.0, 1600.0)))
    for params, value in ((100, 1), (400, 2), (1600, 4)):
        assert known.size_of(params) == (value, None, False)
    assert known.size_of(900) == (3, (2.0, 4.0), False)
    assert known.size_of(6400) == (8, None, True)
    assert known.size_of(50) == (1, None, False)
    assert MadeFor(sizes=((0.5, 100.0), (1.0, 400.0))).size_of(200).value == pytest.approx(0.5**0.5)  # type: ignore[union-attr]
    assert MadeFor(sizes=((1.0, 100.0),)).size_of(100) is None
    # An argument that makes the model no larger says nothing.
    assert made_for(swept(size=3)).sizes == ()


# ---- runs that are too short, or of too little data


def test_runs_of_one_or_two_rounds_are_left_out() -> None:
    table = swept()
    is_short = (table["params"] > 2e6) & (table["tokens"] * table["params"] < 1e12)
    table.loc[is_short, ["rounds", "loss"]] = [2, 50.0]
    found = fit(table, bootstrap=0)
    assert found.runs == len(table) - is_short.sum()
    assert found.law.alpha == pytest.approx(TRUTH.alpha, rel=1e-2)
    (note,) = [each for each in found.notes if "rounds" in each]
    assert note.startswith(f"{is_short.sum()} of 35 runs had one or two rounds (3,000,000 parameters at ")
    assert note.endswith("are left out")
    every = runs_to_fit(swept(rounds=1), TRUTH)
    assert len(every.table) == 35
    (note,) = [each for each in every.notes if "rounds" in each]
    assert note.startswith("35 of 35 runs had one or two rounds")
    assert note.endswith(", and 32 more): they are kept, since too few others remain")
    assert not any("rounds" in each for each in runs_to_fit(swept(), TRUTH).notes)


def test_no_number_of_clients_goes_with_short_runs() -> None:
    both = pd.concat([swept(partition="iid"), swept(partition="iid", clients=4, rounds=2)], ignore_index=True)
    assert set(runs_to_fit(both, TRUTH).table["clients"]) == {4, 8}


def test_passes_over_few_data_are_flagged_with_the_remedy() -> None:
    few = swept(samples=3000, passes=np.linspace(1, 37, 35))
    (note,) = [each for each in runs_to_fit(few, TRUTH).notes if "passes" in each]
    assert note.startswith("up to 37 passes over 3,000 samples: a law of unlimited data does not hold beyond 4")
    assert "RepeatedData" in note
    # Without the column they are what tokens are to the samples of the data.
    of_samples = runs_to_fit(few.drop(columns="passes"), TRUTH)
    most = (few["tokens"] * 8 / 3000).max()
    assert of_samples.made_for.passes is not None
    assert of_samples.made_for.passes[1] == pytest.approx(most)
    assert any("passes over 3,000 samples" in each for each in of_samples.notes)
    assert not any("passes" in each for each in runs_to_fit(swept(passes=4.0), TRUTH).notes)


def test_the_law_of_repeated_data_takes_passes_as_its_own() -> None:
    truth = RepeatedData(E=1.0, A=60.0, B=400.0, alpha=0.35, beta=0.4, half_life=8.0, half_life_params=6.0)
    rows = [
        (n, d, passes) for n in np.geomspace(1e4, 3e6, 6) for d in np.geomspace(1e6, 1e9, 6) for passes in (1, 8, 40)
    ]
    table = pd.DataFrame(rows, columns=["params", "tokens", "passes"])
    table["loss"] = [truth.replace(unique_tokens=d / p).loss(n, d) for n, d, p in rows]
    found = fit(table, "RepeatedData", bootstrap=0)
    assert found.law.half_life == pytest.approx(8.0, rel=0.02)
    assert not any("passes" in note for note in found.notes)
    assert any("passes" in note for note in fit(table, Rosenfeld, bootstrap=0).notes)
    with pytest.raises(ValueError, match="the column unique_tokens is missing"):
        fit(table.drop(columns="passes"), "RepeatedData")


def test_clients_that_are_unlike_have_a_floor() -> None:
    (note,) = [each for each in runs_to_fit(swept(mean_js_distance=0.34), TRUTH).notes if "non-IID" in each]
    assert "distance of their labels 0.34" in note
    assert not any("non-IID" in each for each in runs_to_fit(swept(mean_js_distance=0.1), TRUTH).notes)


@pytest.mark.parametrize("value", ["strict", "[1]", 3, 2.5])
def test_a_column_of_the_users_own_called_rules_is_none_of_ours(value: object) -> None:
    table = pd.DataFrame(
        {"params": [10.0, 20.0], "tokens": [1e3, 1e3], "clients": 1, "loss": [0.5, 0.3], "rules": value}
    )
    assert made_for(table).rules is None
