"""``fedscale plan`` as people type it, and the function behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_fedscale import cli
from lightning_fedscale.devices import device_class
from lightning_fedscale.scaling import Chinchilla, Kaplan, Rosenfeld, fit, plan
from tests.unit.test_scaling_fit import made

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")


def test_json_is_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--flops", "1e20", "--clients", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"10": plan(1e20, 10).as_dict()}
    assert found["10"]["params"] == pytest.approx(2.622e8, rel=1e-3)


def test_several_numbers_of_clients_make_a_table_and_a_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "plan.png"
    code = cli.main(["plan", "--flops=1e20", "--clients=[1,10,100]", "--device=phone", f"--plot={picture}"])
    printed = capsys.readouterr().out
    assert code == 0
    for cell in ("8.53e+08", "2.62e+08", "8.05e+07", "2.927", "100 clients", "Days"):
        assert cell in printed
    assert "(!) more than phone holds" in printed  # 16 bytes for each of 853 M parameters
    assert picture.stat().st_size > 10_000


def test_a_law_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = fit(made(clients=(1, 8), rho=0.5), bootstrap=2)
    found.save(tmp_path / "law.json")
    assert cli.main(["plan", "--flops=1e15", "--clients=8", f"--law={tmp_path / 'law.json'}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["8"]
    assert shown["params"] == pytest.approx(found.optimal(1e15, 8).value)
    assert shown["rho"] == pytest.approx(0.5, abs=0.01)
    assert shown["batch_per_client"] is None  # nothing is known of batches for this task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flops=0", "--clients=2"], "flops=0.0: pass a finite number above 0"),
        (["--flops=1e20", "--clients=0"], "clients=0: pass a whole number"),
        (["--flops=1e20", "--law=chinchila"], "Did you mean 'Chinchilla'"),
        (["--flops=1e20", "--law=Farseer"], "constants are not published"),
        (["--flops=1e20", "--device=phoen"], "Did you mean 'phone'"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_numbers_hang_together() -> None:
    found = plan(1e20, 4, device_class=device_class("t4"), local_steps=50, utilization=0.5)
    assert 6 * found.params * found.tokens_per_client * 4 == pytest.approx(1e20)
    assert found.batch_per_client == pytest.approx(Kaplan().critical_batch(found.loss) / 4)
    assert found.rounds == pytest.approx(found.tokens_per_client / found.batch_per_client / 50)  # type: ignore[operator]
    assert found.bytes_per_client == pytest.approx(8 * found.params * found.rounds)  # type: ignore[operator]
    compute = 1e20 / 4 / (0.5 * 8.1e12)
    exchange = found.bytes_per_client / device_class("t4").up  # type: ignore[operator]
    assert found.days == pytest.approx((compute + exchange) / 86_400)
    assert found.fits


def test_few_tokens_make_a_larger_model() -> None:
    rich, poor = plan(1e20, 10), plan(1e20, 10, tokens=1e9)
    assert poor.tokens_per_client == 1e9
    assert poor.params == pytest.approx(1e20 / (6 * 1e9 * 10))
    assert poor.params > rich.params
    assert poor.loss > rich.loss
    assert plan(1e20, 10, tokens=1e12) == rich


def test_division_costs_by_rho() -> None:
    losses = [plan(1e20, 10, rho=rho).loss for rho in (0.0, 0.24, 1.0)]
    assert losses == sorted(losses)
    assert losses[0] == Chinchilla().optimal(1e20).loss
    law = Rosenfeld(E=0.1, A=10.0, B=20.0, alpha=0.5, beta=0.6)
    assert plan(1e15, 3, law).rounds is None
    with pytest.raises(ValueError, match="utilization=2"):
        plan(1e20, 1, utilization=2)
    assert math.isfinite(plan(1e15, 3, law).loss)
