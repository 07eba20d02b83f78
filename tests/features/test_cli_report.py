"""``fedscale report``: the page says what the run's own objects say, and nothing that the run did not leave."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_fedscale import FederatedStrategy, cli
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.cli.run_page import facts, read_run, write_page
from lightning_fedscale.scaling import Rosenfeld
from lightning_fedscale.scaling.form import Range, Refit
from tests.features.test_cli_sweep import Data, Net

pytestmark = pytest.mark.filterwarnings("ignore")

LAW = Rosenfeld(E=0.3, A=1.0, B=0.5, alpha=0.4, beta=0.35)


class Records(pl.Callback):
    """What every round and validation said of itself."""

    def __init__(self) -> None:
        self.upload: list[int] = []
        self.losses: list[float] = []

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: Any) -> None:
        self.upload.append(record.upload_bytes)
        self.losses.append(record.loss)


def train(logger: Any, *callbacks: pl.Callback, rounds: int = 6, strategy: Any = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=rounds, callbacks=list(callbacks), logger=logger, log_every_n_steps=1, accelerator="cpu",
        strategy=strategy or FederatedStrategy(num_clients=4, executor="sequential"), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(8), datamodule=Data())
    return trainer


@pytest.fixture(scope="module", params=[CSVLogger, TensorBoardLogger])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)  # a run whose loss is far from the law's has no position
    records, phase, accounting = Records(), CriticalPhase(action="observe"), ComputeAccounting(law=LAW)
    probe = MaxBatchProbe(budget="1GiB", apply=False)
    watch = ClientMetrics()
    trainer = train(request.param(folder, name="run"), records, phase, accounting, probe, watch)
    said = {
        "trainer": trainer, "records": records, "phase": phase, "accounting": accounting, "probe": probe,
        "clients": watch,
    }  # fmt: skip
    return folder, said


def test_numbers_are_those_of_the_run(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = ran
    assert cli.main(["report", str(folder), f"--output={tmp_path / 'out' / 'page.html'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ledger, position = said["accounting"].ledger, said["accounting"].position
    assert found["rounds"] == 6
    assert found["run"] == str(folder / "run" / "version_0")
    assert found["metrics"]["val_loss"]["last"] == pytest.approx(
        float(said["trainer"].callback_metrics["val_loss"]), rel=1e-5
    )
    assert found["curves"]["round/loss"]["values"] == pytest.approx(said["records"].losses, rel=1e-5)
    assert found["metrics"]["round/loss"]["lowest"] == pytest.approx(min(said["records"].losses), rel=1e-5)
    assert found["costs"]["upload_bytes"] == sum(said["records"].upload)
    assert found["costs"]["flops"] == ledger.training_flops
    assert found["costs"]["flops_evaluation"] == ledger.flops["evaluation"] > 0
    assert "epsilon" not in found["costs"]
    assert "simulated_seconds" not in found["costs"]
    assert found["position"]["advice"] == position.advice()
    assert found["position"]["optimal_params"] == position.optimal_params
    assert [tuple(span) for span in found["phases"]["spans"]] == [tuple(span) for span in said["phase"].record.spans]
    assert found["probe"]["max_batch"] == said["probe"].result.max_batch
    assert found["page"] == str(tmp_path / "out" / "page.html")
    assert found["clients"]["clients/val_loss"] == pytest.approx(
        said["clients"].last.spread("val_loss")._asdict(), rel=1e-5
    )
    assert set(found["metrics"]) == {"val_loss", "round/loss"}
    # Lists of a page that a machine reads hold numbers, or nothing.
    assert "NaN" not in json.dumps(found)


def test_the_page_holds_everything(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, said = ran
    page = write_page(read_run(folder), tmp_path / "page.html").read_text("utf-8")
    titles = ("Metrics", "Critical phases", "Is the model of the right size?", "What it cost", "How large a batch fits",
              "Clients")  # fmt: skip
    for title in titles:
        assert f"<h2>{title}</h2>" in page
    assert said["accounting"].position.advice()[1:] in page
    assert f"{said['accounting'].ledger.training_flops:,.0f}" in page
    pictures = re.findall(r'src="data:image/(\S+?);base64,([^"]+)"', page)
    assert len(pictures) > 4
    for kind, data in pictures:
        start = base64.b64decode(data)[:5]
        assert start == (b"<?xml" if kind == "svg+xml" else b"\x89PNG\r"), kind
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    drawn = "".join(base64.b64decode(data).decode() for kind, data in pictures if kind == "svg+xml")
    assert "training FLOPs" in drawn
    assert "worst tenth" in drawn
    assert "<th>worst tenth</th>" in page


def test_the_interval_of_the_best_size_is_shown(tmp_path: Path) -> None:
    others = tuple(Refit({**LAW.constants, "A": A}) for A in (0.8, 0.95, 1.05, 1.2))
    law = LAW.replace(refits=others, fitted_on=Range("digits", params=(1e4, 1e6), flops=(1e4, 1e12)))
    train(CSVLogger(tmp_path, name="run"), ComputeAccounting(law=law, rho=1.0), rounds=2)
    run = read_run(tmp_path)
    low, high = facts(run)["position"]["optimal_params_95"]
    assert low < facts(run)["position"]["optimal_params"] < high
    page = write_page(run, tmp_path / "page.html").read_text("utf-8")
    outside = facts(run)["position"]["outside"]
    assert "params=" in outside[0]
    assert f"This is an extrapolation of Rosenfeld: {' and '.join(outside)}, where it was fitted." in page
    assert f"<td>{low:.0f} to {high:.0f}</td>" in page


def test_markdown_has_its_pictures_beside_it(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    page = write_page(read_run(ran[0]), tmp_path / "page.md").read_text("utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert len(pictures) > 4
    assert len(set(pictures)) == len(pictures)
    assert all((tmp_path / picture).stat().st_size > 500 for picture in pictures)
    assert "| Training FLOPs |" in page


def test_the_same_run_makes_the_same_page(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pages = [write_page(read_run(ran[0]), tmp_path / f"{name}.html").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_what_a_run_lacks_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(CSVLogger(tmp_path, name="plain"), strategy="auto", rounds=2)
    assert cli.main(["report", str(tmp_path / "plain" / "version_0")]) == 0
    assert "val_loss" in capsys.readouterr().out
    page = (tmp_path / "plain" / "version_0" / "report.html").read_text("utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Metrics"]
    assert "clients" not in page
    found = facts(read_run(tmp_path))
    assert found.keys() == {"run", "steps", "metrics", "curves"}
    assert found["curves"]["val_loss"]["steps"] == [24, 49]


def test_costs_of_rounds_alone(tmp_path: Path) -> None:
    names = ("clients", "loss", "upload_bytes", "seconds", "simulated_total", "epsilon", "rejected", "dropped")
    rows = [(4, 2.0, 1000, 0.5, 30.0, 0.5, 0, 0), (3, 1.0, 900, 0.25, 70.0, 0.75, 1, 0)]
    lines = [",".join(["step", *(f"round/{name}" for name in names)])]
    lines += [",".join(map(str, (step, *row))) for step, row in enumerate(rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    assert facts(read_run(tmp_path))["costs"] == {
        "upload_bytes": 1900, "seconds": 0.75, "simulated_seconds": 70.0, "epsilon": 0.75, "rejected_updates": 1,
    }  # fmt: skip
    page = write_page(read_run(tmp_path), tmp_path / "page.html").read_text("utf-8")
    assert "<td>Privacy spent, epsilon</td><td>0.75</td>" in page
    drawn = [base64.b64decode(data).decode() for data in re.findall(r'svg\+xml;base64,([^"]+)"', page)]
    assert any("simulated seconds" in picture for picture in drawn)


def test_settings_are_read_whatever_they_are(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,val_loss\n0,3,0.5\n1,7,inf\n")
    (tmp_path / "hparams.yaml").write_text(
        "lr: 0.1\nnet:\n  width: 64\nloss: !!python/name:torch.nn.functional.mse_loss ''\nempty: {}\nname: <b>\n"
        "thing: !!python/object:some.Thing\n  inner: 1\n"
    )
    found = facts(read_run(tmp_path))
    assert found["settings"]["net/width"] == 64
    assert found["settings"]["thing"] == "some.Thing"
    assert found["metrics"]["val_loss"] == {"last": None, "lowest": 0.5, "highest": None}
    page = write_page(read_run(tmp_path), tmp_path / "page.html").read_text("utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run='nowhere': there is no such directory"),
        (["two/a/metrics.csv"], "run='two/a/metrics.csv': this is a file"),
        (["."], "neither TensorBoard's events nor a metrics.csv"),
        (["two"], "run='two': it holds 2 runs, and a report is about one. Pass one of: two/a, two/b"),
        (["two/a", "--output=page.pdf"], "output='page.pdf': name a file that ends in .html or .md"),
        (["two/a", "--output=two/a/metrics.csv/page.md"], "cannot be written"),
        (["two/b"], "it has no column step"),
        (["broken"], "position.json: not readable as JSON"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments != ["."]:
        for name, table in (("two/a", "step,loss\n0,1\n"), ("two/b", "loss\n1\n"), ("broken", "step,loss\n0,1\n")):
            Path(name).mkdir(parents=True)
            Path(name, "metrics.csv").write_text(table)
        Path("broken", "position.json").write_text("{")
    assert cli.main(["report", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_run_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["report"])
    assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
