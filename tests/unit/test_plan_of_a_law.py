"""Plans keep to what their law was made for, give sizes in the module's argument, and say what is asked besides."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_fedscale import cli
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.scaling import Fit, Plan, RepeatedData, fit, plan, position_of
from lightning_fedscale.scaling.made_for import MadeFor
from tests.features.test_scaling_fit import TRUTH, made
from tests.unit.test_made_for import EIGHT, OTHER, swept

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")

BUDGET = 8e15
"""Of eight clients together, as much as the largest runs."""


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(swept(), bootstrap=30, task="leaves")


def planned(found: Fit, *, warned: str | None = None, **asked: Any) -> Plan:
    """A plan, with the one warning that it gives or without any."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made_plan = plan(BUDGET, law=found.law, **asked)
    lines = [str(each.message) for each in said if "extrapolation" not in str(each.message)]
    assert len(lines) == (warned is not None), lines
    if warned is not None:
        assert warned in lines[0]
        assert "\n" not in lines[0]
        assert lines[0] == f"plan: {made_plan.notes[0]}."
    return made_plan


def test_a_plan_is_that_of_the_runs(found: Fit) -> None:
    here = planned(found)
    assert (here.clients, here.local_steps, here.batch_per_client, here.method) == (8, 5, 32, "scaffold")
    assert here.batch_limit == "as in the law's runs"
    assert here.rounds == pytest.approx(here.tokens_per_client / (32 * 5))
    assert here.made_for == str(found.made_for)
    assert here.notes == ()
    # As many clients as the runs had cost nothing besides, whatever rho is.
    assert here.params == pytest.approx(TRUTH.optimal(BUDGET / 8).params, rel=0.01)
    assert here.of_rho == "rho 1"
    assert planned(found, rho=0.2).params == pytest.approx(here.params)
    assert planned(found, clients=8, local_steps=5, batch_size=32, method="scaffold", partition=EIGHT) == here
    assert plan(1e20).local_steps == 30  # without runs of one's own


def test_another_number_of_clients_takes_a_rho(found: Fit) -> None:
    with pytest.raises(ValueError, match=r"clients=16: .*\b8\b.* clients=8, or rho="):
        plan(BUDGET, 16, law=found.law)
    single = fit(swept(clients=1), bootstrap=0).law
    with pytest.raises(ValueError, match=r"clients=4: .* clients=1, or rho="):
        plan(BUDGET, 4, law=single)
    here = planned(found, clients=16, rho=0.5, warned="may not hold for clients=16;")
    # Twice as many clients: C_eff falls by 2^0.5, as from 8 to 16.
    assert here.params == pytest.approx(TRUTH.optimal(BUDGET / 8 / 2**0.5).params, rel=0.01)
    spanned = planned(found, clients=16, rho=(0.0, 1.0), warned="clients=16")
    assert spanned.params_low is not None
    assert spanned.params_low < here.params < spanned.params_high  # type: ignore[operator]
    both = pd.concat([swept(partition="iid"), swept(partition="iid", clients=4)])
    measured = fit(both.reset_index(drop=True), bootstrap=0)
    assert measured.rho is not None
    note = planned(measured, clients=16, warned="may not hold for clients=16;").notes[0]
    assert note.startswith("the law was fitted to runs with scaffold on partition hospitals.json")
    assert planned(measured, clients=4).clients == 4
    # A table that does not say its clients is taken as before: for those of one client, and rho from 0 to 1.
    assert plan(BUDGET, 4, law=fit(made().drop(columns="clients"), bootstrap=0).law).rho_low == 0


@pytest.mark.parametrize(
    ("asked", "warned"),
    [
        ({"local_steps": 20}, "may not hold for local_steps=20;"),
        ({"batch_size": 64}, "may not hold for batch_size=64;"),
        ({"method": "fed_avg"}, "may not hold for method='fed_avg';"),
        ({"partition": OTHER}, f"may not hold for partition='{OTHER.fingerprint[:8]}';"),
        ({"partition": "iid", "method": "fed_avg"}, "may not hold for method='fed_avg' and partition='iid';"),
    ],
)
def test_what_the_runs_did_not_do_is_said(found: Fit, asked: dict[str, Any], warned: str) -> None:
    here = planned(found, **asked, warned=warned)
    assert here.notes[0].startswith(f"the law was fitted to runs with {found.made_for}, and may not hold for ")
    assert str(found.made_for).startswith("scaffold on partition hospitals.json")
    assert here.notes[0].endswith("; fit another one with fedscale sweep")
    assert here.local_steps == asked.get("local_steps", 5)
    assert here.batch_per_client == asked.get("batch_size", 32)
    assert here.batch_limit == ("as asked" if "batch_size" in asked else "as in the law's runs")
    assert here.method == asked.get("method", "scaffold")


def test_what_the_runs_do_not_say_is_said() -> None:
    silent = fit(made(), bootstrap=0)
    here = planned(
        silent, method="fed_avg", partition="iid", warned="do not record their method or partition, so whether"
    )
    assert (here.batch_per_client, here.rounds, here.argument, here.size) == (None, None, None, None)
    assert planned(silent, batch_size=16, local_steps=3).rounds == pytest.approx(here.tokens_per_client / 48)
    with pytest.raises(ValueError, match=r"batch_size=16: .*Chinchilla counts tokens"):
        plan(1e20, batch_size=16)


def test_a_files_partition_has_clients(found: Fit, tmp_path: Path) -> None:
    EIGHT.save(tmp_path / "mine.json")
    assert planned(found, partition=tmp_path / "mine.json").clients == 8
    Partition.from_lists([[0], [1], [2]]).save(tmp_path / "three.json")
    with pytest.raises(ValueError, match=r"clients=3: .* clients=8, or rho="):
        plan(BUDGET, law=found.law, partition=str(tmp_path / "three.json"))
    with pytest.raises(ValueError, match=r"clients=8: .*partition.* 3 clients"):
        plan(BUDGET, 8, law=found.law, partition=str(tmp_path / "three.json"))


@pytest.mark.parametrize(
    "change", [{"local_steps": 0}, {"batch_size": 0}, {"batch_size": True}, {"partition": "no.json"}]
)
def test_wrong_arguments_are_named(found: Fit, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}="):
        plan(BUDGET, law=found.law, **change)


def test_the_size_is_that_of_the_modules_argument(found: Fit) -> None:
    here = planned(found)
    assert here.argument == "width"
    low, high = here.size_between  # type: ignore[misc]
    sizes = dict(found.made_for.sizes)
    assert sizes[low] < here.params < sizes[high]
    assert low < here.size < high  # type: ignore[operator]
    assert high == 2 * low
    slope = math.log(sizes[high] / sizes[low]) / math.log(2)
    assert here.size == round(low * (here.params / sizes[low]) ** (1 / slope))
    assert here.size_low is not None
    assert here.size_low <= here.size <= here.size_high  # type: ignore[operator]
    assert here.as_dict()["size_between"] == [low, high]


def test_passes_beyond_the_runs_are_said() -> None:
    few = fit(swept(samples=10**10), bootstrap=0)
    assert few.made_for.passes is not None
    most = few.made_for.passes[1]
    here, far = planned(few), plan(1e6 * BUDGET, law=few.law)
    assert here.passes == pytest.approx(here.tokens_per_client * 8 / 1e10)
    assert not any("at most" in each for each in here.notes)
    assert far.passes is not None
    assert far.passes > most
    assert (
        f"{far.passes:.3g} passes over 10,000,000,000 samples, and the law's runs had at most {most:.3g}"
        in far.notes[0]
    )
    assert planned(fit(swept(), bootstrap=0)).notes == ()


def test_a_law_of_repeated_data_plans_with_the_data_that_there_are() -> None:
    law = RepeatedData(made_for=MadeFor(samples=10**6, tokens_per_sample=100.0, passes=(1.0, 60.0), clients=(1,)))
    here = plan(1e18, law=law)
    assert here.params == pytest.approx(plan(1e18, law=RepeatedData(), tokens=1e8).params)
    assert here.passes == pytest.approx(here.tokens_per_client / 1e8)
    assert here.notes == ()
    (note,) = plan(1e20, law=law).notes
    assert "get more data" in note
    assert "RepeatedData" not in note


def test_a_measured_run_that_the_law_does_not_have_is_said(found: Fit) -> None:
    law = found.law
    best = law.made_for.best[-1]
    wrong = law.made_for.__class__(clients=(8,), best=(best._replace(loss=best.loss * 1.14),))
    (note,) = plan(best.flops, law=law.replace(made_for=wrong)).notes
    assert f"measured {best.loss * 1.14:.4g}, with {best.params:,.0f} parameters" in note
    assert plan(best.flops * 3, law=law.replace(made_for=wrong)).notes == ()
    assert plan(best.flops, law=law).notes == ()


def test_positions_count_the_clients_of_the_runs(found: Fit) -> None:
    best = TRUTH.optimal(BUDGET / 8).params
    at: dict[str, Any] = {"params": best, "tokens": BUDGET / 6 / best, "flops": BUDGET}
    here = position_of(found.law, **at, clients=8)
    assert here.verdict == "right"
    assert here.optimal_params == pytest.approx(best, rel=0.01)
    assert not any("clients" in each for each in here.outside)
    assert "rho" not in here.advice()
    other = position_of(found.law, **at, clients=2)
    assert "clients=2 lies outside of 8 to 8" in other.outside
    assert other.known_rho is not None
    # With rho 0, two clients' tokens are worth a quarter of eight clients'; with rho 1 as much as any client's.
    assert [each.optimal_params for each in other.readings] == pytest.approx(
        [TRUTH.optimal(BUDGET / 8).params, TRUTH.optimal(BUDGET / 2).params], rel=0.01
    )


# ---- as people type it


def test_the_command_keeps_to_the_law(found: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    found.save("fedscale_law.json")  # tests run in an empty folder
    EIGHT.save("mine.json")
    OTHER.save("other.json")
    line = ["plan", f"--flops={BUDGET}", "--partition=mine.json", "--method=scaffold"]
    assert cli.main(line) == 0
    printed = capsys.readouterr()
    here = planned(found)
    assert (
        f"The law was fitted to runs with scaffold on partition hospitals.json ({EIGHT.fingerprint[:8]}), 8 clients"
        in printed.out
    )
    assert "as width" in printed.out
    assert here.size is not None
    assert here.size_between is not None
    assert "{:g} (between {:g} and {:g})".format(here.size, *here.size_between) in printed.out
    assert "Note:" not in printed.out
    assert printed.err == ""
    assert cli.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"8": planned(found).as_dict()}
    assert cli.main(["plan", f"--flops={BUDGET}", "--partition=other.json", "--local_steps=9"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("Note: ") == 1
    assert "may not hold for local_steps=9 and partition='other.json'" in printed.out
    assert printed.err == ""
    assert cli.main(["plan", f"--flops={BUDGET}", "--clients=[8,9]"]) == 1
    assert "clients=9: all runs of this law had 8" in capsys.readouterr().err


def test_fit_takes_a_table_apart(capsys: pytest.CaptureFixture[str]) -> None:
    both = pd.concat([swept(), swept(method="fed_avg", loss=swept()["loss"] * 1.3)])
    both.to_csv("runs.csv", index=False)
    EIGHT.save("mine.json")
    assert cli.main(["fit", "runs.csv", "--bootstrap=0"]) == 0
    assert (
        "Note: the runs have two methods: scaffold and fed_avg; fit each separately (method=)"
        in capsys.readouterr().out
    )
    line = ["fit", "runs.csv", "--bootstrap=0", "--method=fed_avg", "--partition=mine.json", "--local_steps=5"]
    assert cli.main([*line, "--batch_size=32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["made_for"]["method"], said["runs"]) == ("fed_avg", 35)
    assert said["constants"]["E"] == pytest.approx(1.3 * TRUTH.E, rel=0.01)
    assert cli.main(["fit", "runs.csv", "--method=fed_prox"]) == 1
    assert (
        "method='fed_prox': no run matches. Pass one of those in the table: scaffold, fed_avg"
        in capsys.readouterr().err
    )
