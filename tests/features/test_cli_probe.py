"""``fedscale probe`` as people type it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import cli
from lightning_fedscale.devices import device_class, estimate_memory
from tests.networks import Classifier, mlp

MODULE = "tests.features.test_cli_probe.Project"


class Project(Classifier):
    """A project with its own loader."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(torch.nn.Linear(width, 10))
        self.width = width

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(50, self.width), torch.zeros(50, dtype=torch.long)), 4)


class Bare(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp())


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.samples = TensorDataset(torch.zeros(50, 64), torch.zeros(50, dtype=torch.long))

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, self.batch_size)


def test_json_is_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["probe", "--module", MODULE, "--budget", "[2MiB, phone]", "--headroom=0.2", "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    model = estimate_memory(Project(), (torch.zeros(2, 64), torch.zeros(2, dtype=torch.long)))
    assert found["2MiB"]["max_batch"] == model.max_batch(2**21, headroom=0.2)
    assert found["phone"]["max_batch"] == model.max_batch(device_class("phone").memory, headroom=0.2)
    assert found["2MiB"]["predicted_bytes"] == sum(found["2MiB"]["parts"].values())


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    module = ["--module", "tests.features.test_cli_probe.Bare", "--data", "tests.features.test_cli_probe.Data"]
    assert cli.main(["probe", *module, "--data.batch_size=8", "--budget", "[1MiB]", "--max_samples", "7"]) == 0
    printed = capsys.readouterr().out
    assert "1MiB" in printed
    assert "samples" in printed
    assert "optimizer state" in printed


def test_arguments_of_the_module_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "probe.yaml"
    config.write_text(
        f"module:\n  class_path: {MODULE}\n  init_args:\n    width: 100\n"
        "budget: [1MiB]\nprecision: bf16-mixed\njson: true\n"
    )
    assert cli.main(["probe", "--config", str(config)]) == 0
    found = json.loads(capsys.readouterr().out)["1MiB"]
    model = estimate_memory(
        Project(100), (torch.zeros(2, 100), torch.zeros(2, dtype=torch.long)), precision="bf16-mixed"
    )
    assert found["max_batch"] == model.max_batch(2**20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "[1KiB]"], "budget=1.00 KiB: a step with one sample takes"),
        (["--budget", "[toaster]"], "budget='toaster': pass bytes"),
        (["--budget", "lots"], "budget='lots': pass bytes"),
        (["--budget", "10"], "budget=10 B: a step with one sample takes"),
        (["--max_samples", "0"], "max_samples=0: pass an integer of at least 1"),
        (["--precision", "3"], "precision='3'"),
    ],
)
def test_what_is_not_possible_exits_with_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["probe", "--module", MODULE, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(("budget", "names"), [("8MiB", ["8MiB"]), ("[2000000, phone]", ["2000000", "phone"])])
def test_one_budget_or_several(budget: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--module", MODULE, "--budget", budget, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == names


def test_the_end_of_the_search_is_no_limit_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--module", MODULE, "--budget", "1000000GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["1000000GiB"]
    assert (found["max_batch"], found["limited_by"]) == (2**24, "search")


class Mistaken(Project):
    def train_dataloader(self) -> Any:
        raise ValueError("my own mistake")


def test_a_mistake_of_ones_own_module_keeps_its_line() -> None:
    with pytest.raises(ValueError, match=r"^my own mistake$"):
        cli.main(["probe", "--module", "tests.features.test_cli_probe.Mistaken"])


def test_what_is_missing_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for command, missing in (("probe", "--module"), ("plan", "--flops"), ("fit", "runs")):
        with pytest.raises(SystemExit):
            cli.main([command])
        said = capsys.readouterr().err
        assert said.endswith(f"required: {missing}\n")
        assert f"run: fedscale {command} --help" in said
        assert "[--json]" in said


def test_ctrl_c_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(flops: float) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    monkeypatch.setattr("lightning_fedscale.cli.sweep.sweep", interrupted)
    assert cli.main(["sweep", "--flops=1"]) == 130
    assert "fedscale sweep: interrupted. Finished runs are kept" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{Path(sys.executable).with_name('fedscale')} plan --flops=1e20 --json"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_no_data_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--module", "tests.features.test_cli_probe.Bare"]) == 1
    assert "Pass data= (--data)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["probe"], ["probe", "--module", "no.such.Module"], ["toast"], []])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(arguments)
    assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_says_what_each_argument_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["probe", "--help"])
    assert exited.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "share of each budget to leave free" in printed


def test_the_installed_command_finds_modules_where_it_is_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from lightning.pytorch.demos.boring_classes import BoringModel as Mine\n")
    command = [str(Path(sys.executable).with_name("fedscale")), "probe", "--module", "mine.Mine", "--json=true"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["auto"]["max_batch"] > 10


@pytest.mark.parametrize("budget", ["auto", "2MiB"])
def test_the_free_memory_of_a_gpu_is_for_the_kernels_of_the_gpu(
    budget: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = importlib.import_module("lightning_fedscale.cli.probe")  # the package has a function of that name
    monkeypatch.setattr(module, "free_memory", lambda device: 2**21)
    monkeypatch.setattr(Project, "cuda", lambda self: moved.append("cuda"))
    assert cli.main(["probe", "--module", MODULE, "--budget", budget, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[budget]["budget"] == 2**21
    assert moved == ["cuda"] * (budget == "auto")
