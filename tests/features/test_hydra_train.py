"""``fedscale train``: a Hydra application over the digits, or any module and its data."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_fedscale import FederatedStrategy, cli
from lightning_fedscale.cli.digits import Classifier, Digits
from lightning_fedscale.cli.train import Refused, _optimized
from lightning_fedscale.core.options.trainer_checks import is_user_error
from lightning_fedscale.scaling import read_runs
from tests import pythons

ROOT = Path(__file__).parents[2]
QUIET = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
# By name: bits are compared, and "auto" goes by the clock.
SHORT = [*QUIET, "trainer.max_epochs=2", "strategy.executor=sequential"]

MINE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Module(pl.LightningModule):
    def __init__(self, layers=(4,), wrong=False):
        super().__init__()
        assert type(layers) in (list, tuple)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, layers[0]), torch.nn.Linear(layers[0], 2))
        self.wrong = wrong

    def training_step(self, batch, batch_idx):
        if self.wrong:
            raise ValueError("my own mistake")
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.LightningDataModule):
    def __init__(self, samples=40):
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        points = torch.randn(self.samples, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(points, (points.sum(1) > 0).long()), 5)

    val_dataloader = train_dataloader
"""


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Hydra gives the root logger handlers of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    sys.modules.pop("mine", None)


def train(*arguments: str) -> int:
    return cli.main(["train", *arguments])


def runs(kind: str = "outputs") -> list[Path]:
    return sorted((path.parent for path in Path(kind).rglob("position.json")), key=lambda path: (len(str(path)), path))


def ledger(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "position.json").read_text())
    return found


def weights(checkpoint: Path) -> torch.Tensor:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for value in state.values()])


def checkpoint(run: Path) -> Path:
    (found,) = (run / "checkpoints").glob("*.ckpt")
    return found


def test_bare_it_trains_the_digits_as_a_script_would(capsys: pytest.CaptureFixture[str]) -> None:
    line = sys.argv[:]
    assert train(*SHORT, "test=true") == 0
    assert sys.argv == line
    printed = capsys.readouterr().out
    (run,) = runs()
    assert {each.name.split(".")[0] for each in run.iterdir()} >= {"events", "position", "checkpoints", "hparams"}
    assert f"Run: {run.resolve()}" in printed

    pl.seed_everything(0, workers=True, verbose=False)
    module, data = Classifier(), Digits()
    trainer = pl.Trainer(
        strategy=FederatedStrategy(num_clients=10, executor="sequential"),
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert torch.equal(weights(checkpoint(run)), torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert f"{float(trainer.callback_metrics['val_loss']):.4g}" in printed
    assert f"{trainer.test(module, datamodule=data, verbose=False)[0]['test_accuracy']:.4g}" in printed


def test_the_digits_are_learnt() -> None:
    assert (
        train(*QUIET, "strategy.num_clients=5", "trainer.max_epochs=15", "strategy.executor=sequential", "logger=csv")
        == 0
    )
    (run,) = runs()
    from pandas import read_csv

    assert read_csv(run / "metrics.csv")["val_accuracy"].max() > 0.9


def test_a_sweep_leaves_a_ledger_of_each_run_that_fit_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("-m", *SHORT, "strategy.num_clients=1,4", "model.width=4,16,64,256", "data.batch_size=75") == 0
    found = runs("multirun")
    assert len(found) == 8
    table = read_runs(["multirun"]).sort_values(["clients", "params"]).to_dict("records")
    assert [(row["clients"], row["params"]) for row in table] == [
        (clients, 75 * width + 10) for clients in (1, 4) for width in (4, 16, 64, 256)
    ]
    for row in table:
        assert row["tokens"] == pytest.approx(2 * 1200 / row["clients"])  # every client's data, twice
        width = (row["params"] - 10) / 75
        # Two matrix products forward, three backward, for the first layer's input has no gradient; and biases.
        per_sample = 2 * (2 * 64 * width + 3 * 10 * width)
        assert row["flops"] == pytest.approx(per_sample * row["tokens"], rel=0.02)
    assert sum(ledger(run)["clients"] for run in found) == 4 * (1 + 4)
    capsys.readouterr()
    (sweep,) = {str(run.parent) for run in found}
    assert cli.main(["fit", sweep, "--bootstrap=5", "--task=digits", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["runs"], said["fitted_on"]["task"]) == (8, "digits")
    assert said["held_out"] > 0  # of the largest compute, by a fit without that
    assert Path("fedscale_law.json").is_file()
    assert Path("report.md").is_file()


def test_json_is_all_that_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("-m", *SHORT, "--json", "strategy.num_clients=2,3") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, run in zip(map(json.loads, lines), runs("multirun"), strict=True):
        assert line["run"] == str(run.resolve())
        assert 0 < line["metrics"]["val_loss"] < 10
        assert line["metrics"]["compute/flops_total"] == ledger(run)["flops"]


@pytest.mark.usefixtures("mine")
def test_any_module_and_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["model._target_=mine.Module", "data._target_=mine.Data", "model.layers=[6]", "data.samples=60"]
    assert train(*SHORT, *own, "strategy.num_clients=3", "strategy/partitioner=dirichlet") == 0
    (run,) = runs()
    assert (ledger(run)["samples"], ledger(run)["params"]) == (120, 3 * 6 + 6 + 6 * 2 + 2)
    assert "val/loss" in capsys.readouterr().out


@pytest.mark.usefixtures("mine")
def test_a_module_with_its_own_loader_needs_no_data() -> None:
    Path("mine.py").write_text(f"{MINE}\n\nclass Own(Module):\n    train_dataloader = Data(30).train_dataloader\n")
    assert train(*SHORT, "model._target_=mine.Own", "strategy.num_clients=3") == 0
    (run,) = runs()
    assert ledger(run)["samples"] == 60


@pytest.mark.usefixtures("mine")
def test_a_mistake_of_ones_own_module_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "model._target_=mine.Module", "data._target_=mine.Data", "model.wrong=true") == 1
    said = capsys.readouterr().err
    assert "my own mistake" in said
    assert "in training_step" in said


def test_without_the_strategy_it_is_plain_lightning() -> None:
    assert train(*QUIET, "trainer.max_steps=3", "~strategy") == 0
    (run,) = runs()
    assert (ledger(run)["clients"], ledger(run)["samples"]) == (1, 24)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    assert train(*SHORT, "hydra.run.dir=whole", "trainer.max_epochs=3") == 0
    assert train(*SHORT, "hydra.run.dir=half") == 0
    half = checkpoint(tmp_path / "half")
    Path("half.ckpt").write_bytes(half.read_bytes())
    assert train(*SHORT, "hydra.run.dir=rest", "trainer.max_epochs=3", "ckpt_path=half.ckpt") == 0
    whole, rest = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "rest")
    assert not torch.equal(weights(half), weights(whole))
    assert torch.equal(weights(rest), weights(whole))


def test_own_files_of_experiments() -> None:
    file = Path("conf/experiment/noisy.yaml")
    file.parent.mkdir(parents=True)
    file.write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /strategy/server_optimizer: fed_avgm\n"
        "  - override /callbacks: [compute_accounting, server_ema]\n"
        "strategy: {num_clients: 3, server_optimizer: {momentum: 0.5}}\n"
    )
    assert train("--config-dir=conf", "experiment=noisy", *SHORT) == 0
    (run,) = runs()
    assert ledger(run)["clients"] == 3
    assert "momentum: 0.5" in (run / ".hydra" / "config.yaml").read_text()
    assert "server_ema" in (run / ".hydra" / "config.yaml").read_text()


def test_help_shows_groups_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--help") == 0
    printed = capsys.readouterr().out
    assert "fedscale train model._target_=my_package.MyModule" in printed
    groups = printed.partition("== Groups")[2].partition("== Configuration")[0]
    assert "strategy/partitioner: continuous, dirichlet," in groups
    assert "trainer/strategy" not in printed
    assert "  clients_per_round: null" in printed
    for line in re.findall(r"fedscale train (.*detector@.*|law@.*)", printed):
        assert train("--cfg", "job", *line.split()) == 0
    assert "law@callbacks.compute_accounting.law=Chinchilla" in printed


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategy.num_clients=0"], "strategy.num_clients=0: pass an integer of at least 1"),
        (["strategy.num_clients=abc"], "strategy.num_clients='abc': pass an integer of at least 1"),
        (["seed=abc"], "seed='abc': pass an integer from 0"),
        (["data.batch_size=0"], "data: batch_size=0: pass an integer of at least 1"),
        (["model.lr=abc"], "model: lr='abc': pass a number of at least 0"),
        (["hydra.run.dir=/dev/null/x"], "hydra.run.dir='/dev/null/x': this folder cannot be created"),
        (["model._target_=mine.Module"], "needs its data: pass data._target_=..., or data=digits"),
        (["data._target_=mine.Module"], "data._target_=mine.Module: this is a Module. Pass a LightningDataModule"),
        (["strategy.num_client=3"], "Did you mean num_clients?"),
        (["strategy.clients_per_round=11"], "clients_per_round=11 is more than num_clients=10"),
        (["strategy.num_clients=1300"], "num_clients=1300 is more than the 1200 samples"),
        (
            ["strategy/local_rule=fed_prox"],
            "strategy.local_rule.mu has no default here: pass strategy.local_rule.mu=...",
        ),
        (["strategy.aggregator=medain"], "Did you mean 'median'?"),
        (["strategy.num_cleints=3"], "Key 'num_cleints' is not in struct"),
        (["strategy/partitioner=dirichlt"], "Could not find 'strategy/partitioner/dirichlt'"),
        (["model._target_=lost.Module"], "model: Error loading 'lost.Module'"),
        (["model._target_=mine.Module", "model.depth=3"], "unexpected keyword argument 'depth'"),
        (["model._target_=mine.Data"], "model._target_=mine.Data: this is a Data. Pass a LightningModule"),
        (["trainer.max_epoch=3"], "trainer: Trainer.__init__() got an unexpected keyword argument 'max_epoch'"),
        (["trainer.min_epochs=zwei"], "trainer.min_epochs='zwei': pass int"),
        (["trainer.limit_val_batches=some"], "trainer.limit_val_batches='some': pass float or int"),
        (["trainer.precision=8"], "trainer: "),  # never many devices: they would start as many processes
        (["ckpt_path=nowhere.ckpt"], "ckpt_path='nowhere.ckpt': there is no such file"),
        (["optimized_metric=val_los"], "optimized_metric='val_los' was not logged; there are"),
        (["-m", "trainer.devices=2"], "2 devices with --multirun"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments, *SHORT) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_wrong_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--flag") == 2
    assert "unrecognized arguments: --flag" in capsys.readouterr().err


def test_without_scikit_learn_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert train(*SHORT) == 1
    assert "pip install 'lightning-fedscale[examples]'" in capsys.readouterr().err


def test_sweepers_are_told_a_metric_by_its_name() -> None:
    assert _optimized({"val_loss": 0.5}, "val_loss") == 0.5
    assert _optimized({"val_loss": 0.5}, None) is None
    with pytest.raises(Refused, match="there are val_loss"):
        _optimized({"val_loss": 0.5}, "loss")


def test_only_refusals_of_this_package_are_told_plainly() -> None:
    def error_of(function: Any) -> Exception:
        try:
            function()
        except Exception as error:
            return error
        raise AssertionError

    assert is_user_error(error_of(lambda: FederatedStrategy(num_clients=0)))
    assert not is_user_error(error_of(lambda: int("one")))


COMMAND = "import sys\nfrom lightning_fedscale.cli import main\nsys.exit(main())\n"
"""As the installed command is: Lightning starts other processes by the same line."""

TWO_SWEEPS = """
import sys
from lightning_fedscale.cli import main

if __name__ == "__main__":
    assert main() == 0
    sys.exit(main([*sys.argv[1:], "strategy.clients_per_round=3"]))
"""
"""In one process, whose workers joblib then keeps."""


def fedscale(*arguments: str, script: str = COMMAND) -> subprocess.CompletedProcess[str]:
    Path("fedscale.py").write_text(script)
    environment = {"PYTHONPATH": ":".join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1", "PATH": "/bin"}
    return pythons.run("fedscale.py", "train", *arguments, environment=environment)


@pytest.mark.slow
def test_joblib_trains_the_runs_of_a_sweep_side_by_side() -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install hydra-joblib-launcher")
    sweep = ["-m", *SHORT, "strategy.num_clients=2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    refused = fedscale(*sweep, script=TWO_SWEEPS)
    found = runs("multirun")[:2]  # and the run of three clients that the second sweep made
    assert [ledger(run)["clients"] for run in found] == [2, 3]
    assert train(*SHORT, "strategy.num_clients=3") == 0
    (alone,) = runs()
    assert torch.equal(weights(checkpoint(alone)), weights(checkpoint(found[1])))
    assert "AssertionError" not in refused.stderr
    assert refused.returncode == 1
    assert "clients_per_round=3 is more than num_clients=2" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_several_processes_one_run_and_a_sweep() -> None:
    several = [*SHORT, "trainer.devices=2", "strategy.num_clients=3"]
    done = fedscale(*several)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run: ") == 1
    forked = fedscale("-m", *several, "strategy.start_method=fork", "seed=0,1")
    assert forked.returncode == 0, forked.stderr
    assert train(*SHORT, "strategy.num_clients=3", "hydra.run.dir=alone") == 0
    alone = weights(checkpoint(Path("alone")))
    assert torch.equal(weights(checkpoint(runs()[0])), alone)
    first, second = runs("multirun")
    assert torch.equal(weights(checkpoint(first)), alone)
    assert not torch.equal(weights(checkpoint(second)), alone)
