"""``fedscale plan`` as people type it, and the function behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_fedscale import cli
from lightning_fedscale.devices import device_class
from lightning_fedscale.scaling import Chinchilla, DiLoCo, Kaplan, RepeatedData, Rosenfeld, fit, plan
from tests.features.test_scaling_fit import made

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
    for cell in ("8.53e+08", "2.62e+08", "8.05e+07", "2.927", "100 clients", "Days", "Chinchilla (text)", "95 %"):
        assert cell in printed
    assert "(!) does not fit into the memory of phone" in printed  # 16 bytes for each of 853 M parameters
    assert picture.stat().st_size > 10_000


def test_one_of_several_devices_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--flops=1e20", "--device=[t4,phone]"]) == 0
    assert "(!) does not fit into the memory of at least one of t4, phone" in capsys.readouterr().out


def test_a_narrow_terminal_loses_no_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["plan", "--flops=1e20", "--clients=[1,10,100]"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    for number in ("8.53e+08", "2.62e+08", "8.05e+07"):
        assert number in printed


def test_a_law_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = fit(made(noise=0.003, clients=(1, 8), rho=0.5), bootstrap=10, task="leaves")
    found.save(tmp_path / "law.json")
    assert cli.main(["plan", "--flops=1e15", "--clients=8", f"--law={tmp_path / 'law.json'}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["8"]
    assert [shown[name] for name in ("params", "params_low", "params_high")] == pytest.approx(found.optimal(1e15, 8))
    assert shown["loss_low"] < shown["loss"] < shown["loss_high"]
    assert shown["task"] == "leaves"
    assert shown["rho"] == pytest.approx(0.5, abs=0.03)
    assert shown["batch_per_client"] is None  # nothing is known of batches for this task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flops=0", "--clients=2"], "flops=0.0: pass a finite number above 0"),
        (["--flops=1e20", "--clients=0"], "clients=0: pass a whole number"),
        (["--flops=1e20", "--clients=[]"], "clients=[]: pass at least one number of clients"),
        (["--flops=1e20", "--plot=/dev/null/x.png"], "plot='/dev/null/x.png': cannot be written"),
        (["--flops=1e20", "--plot=x.xyz"], "plot='x.xyz': cannot be written: Format 'xyz' is not supported"),
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
    assert found.loss is not None
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
    assert poor.loss is not None
    assert rich.loss is not None
    assert poor.loss > rich.loss
    assert plan(1e20, 10, tokens=1e12) == rich


def test_the_projects_own_law_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(1e20).law == "Chinchilla"
    fit(made(), bootstrap=0, task="leaves").save("fedscale_law.json")  # tests run in an empty folder
    assert (plan(1e15).law, plan(1e15).task) == ("Rosenfeld", "leaves")
    assert cli.main(["plan", "--flops=1e15"]) == 0
    assert "Rosenfeld (leaves)" in capsys.readouterr().out


def test_the_batch_is_what_memory_and_law_admit() -> None:
    phone, t4 = device_class("phone"), device_class("t4")
    free = plan(1e19, 10, device_class=phone)
    assert free.batch_limit == "critical batch"
    tight = plan(1e19, 10, device_class=[t4, phone], activation_bytes=1e6)
    assert tight.devices == ("t4", "phone")
    assert tight.batch_limit == "memory"
    assert tight.batch_per_client == pytest.approx((min(phone.memory, t4.memory) - 16 * tight.params) / 1e6)
    assert tight.days == plan(1e19, 10, device_class=phone, activation_bytes=1e6).days  # the slower one
    assert plan(1e22, 1, device_class=phone, activation_bytes=1e6).batch_per_client is None
    assert plan(1e22, 1, device_class=phone).fits is False
    few = plan(1e20, 1000, tokens=1e3)
    assert few.batch_per_client == 1
    replicas = plan(1e20, 4, law="DiLoCo")
    assert replicas.batch_per_client == pytest.approx(DiLoCo(replicas=4).batch(replicas.params) / 4)


def test_repeated_data_may_be_trained_on_again() -> None:
    again = plan(1e20, 1, RepeatedData(), tokens=1e9)
    assert again.tokens_per_client > 1e9
    assert again.loss is not None
    assert again.loss > (plan(1e20, 1, RepeatedData()).loss or 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_class": "phone"}, r"lightning_fedscale.devices.device_class\('phone'\)"),
        ({"law": 3}, "law=3: pass 'auto', a law's name"),
        ({"law": None}, "law=None: pass a law"),
        ({"local_steps": 0}, "local_steps=0"),
        ({"tokens": -1.0}, "tokens=-1.0"),
        ({"activation_bytes": 0.0}, "activation_bytes=0.0"),
        ({"law": "ComputeOnly"}, "constants are not published"),
        ({"law": "RoutedLM"}, "RoutedLM has no best size: .* cannot trade size for data"),
        ({"law": "lost.json"}, "there is no such file"),
    ],
)
def test_wrong_plans_get_one_message(change: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        plan(1e20, 2, **change)  # type: ignore[arg-type]


def test_division_costs_by_rho() -> None:
    losses = [plan(1e20, 10, rho=rho).loss for rho in (0.0, 0.24, 1.0)]
    assert losses == sorted(loss for loss in losses if loss is not None)
    assert losses[0] == Chinchilla().optimal(1e20).loss
    assert plan(1e20, 10, law=DiLoCo()).loss == DiLoCo(replicas=10).optimal(1e20).loss
    law = Rosenfeld(E=0.1, A=10.0, B=20.0, alpha=0.5, beta=0.6)
    assert plan(1e15, 3, law).rounds is None
    with pytest.raises(ValueError, match="utilization=2"):
        plan(1e20, 1, utilization=2)
    spanned = plan(1e15, 3, law)
    best = law.loss_federated(spanned.params, spanned.tokens_per_client, 3, rho=0.0)
    assert (spanned.loss_low, spanned.loss_high) == pytest.approx((best, spanned.loss))
    unknown = plan(1e15, 3, law, rho=1.0)
    assert unknown.loss is not None
    assert math.isfinite(unknown.loss)
    assert unknown.loss_low is None  # nothing is known of these constants' uncertainty
