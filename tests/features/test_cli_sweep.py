"""``fedscale sweep`` and ``fedscale fit``: from a module with an argument ``size`` to a law that runs go by."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy, cli
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.partitioners import Partition, heterogeneity
from lightning_fedscale.scaling import Rosenfeld, fit, law_from_file, project_law, read_runs, sweep_command
from lightning_fedscale.scaling.project import LEVELS, law_of
from lightning_fedscale.scaling.runs import runs_to_fit
from lightning_fedscale.scaling.tuning import NOT_TUNED, tuned
from lightning_fedscale.study import METHODS, sweep
from lightning_fedscale.study.race import Job
from lightning_fedscale.study.trial import Project, at_rate
from tests.features.test_scaling_fit import made
from tests.laws import reference

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = [2, 4, 8, 16]
BUDGET = 3e5


class Net(pl.LightningModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, size), nn.ReLU(), nn.Linear(size, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(reference.dataset(100), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(reference.dataset(100), 50)


class Fixed(Net):
    def __init__(self) -> None:
        super().__init__()


class Silent(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", 0.5)


HERE = f"{__name__}."
CPU = {"accelerator": "cpu"}


def parameters(size: int) -> int:
    return 12 * size + size + 4 * size + 4


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    folder = tmp_path_factory.mktemp("sweep")
    return sweep(Net, Data, SIZES, BUDGET, clients=[1, 3], folder=folder, rates=[1.0], trainer=CPU), folder


def test_a_sweep_spends_what_it_was_given(swept: tuple[pd.DataFrame, Path]) -> None:
    table, folder = swept
    assert len(table) == 2 * len(SIZES) * len(LEVELS)
    assert pd.read_csv(folder / "runs.csv").shape == table.shape
    for row in table.to_dict("records"):
        assert row["params"] == parameters(row["size"])
        per_sample = 4 * 12 * row["size"] + 6 * 4 * row["size"]  # the first layer's input has no gradient
        assert row["flops"] == pytest.approx(per_sample * row["tokens"])
        rounds = 5 * 4 * row["clients"] * per_sample
        assert BUDGET * row["share"] <= row["flops"] * row["clients"] < BUDGET * row["share"] + rounds
        assert 0 < row["loss"] < 3


def test_more_compute_is_better_and_an_interrupted_sweep_goes_on(swept: tuple[pd.DataFrame, Path]) -> None:
    table, folder = swept
    losses = table.pivot_table(index=["clients", "size"], columns="share", values="loss")
    assert (losses[1.0] < losses[LEVELS[0]]).all()
    table.drop(index=[3, 17]).to_csv(folder / "runs.csv", index=False)
    made_again: list[dict[str, Any]] = []
    outside, environment = torch.get_rng_state(), dict(os.environ)
    again = sweep(
        Net, Data, SIZES, BUDGET, clients=[1, 3], folder=folder, rates=[1.0], trainer=CPU, each=made_again.append
    )  # fmt: skip
    assert len(made_again) == 2
    assert torch.equal(torch.get_rng_state(), outside)
    assert dict(os.environ) == environment
    columns = ["size", "clients", "share"]
    pd.testing.assert_frame_equal(
        again.sort_values(columns).reset_index(drop=True), table.sort_values(columns).reset_index(drop=True)
    )
    with pytest.raises(ValueError, match=r"holds a sweep with other values of flops_asked\. Name another folder"):
        sweep(Net, Data, SIZES, 2 * BUDGET, clients=[1, 3], folder=folder, trainer=CPU)


def test_the_command_makes_a_law_that_runs_go_by(
    swept: tuple[pd.DataFrame, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = swept
    line = ["sweep", f"--module={HERE}Net", f"--data={HERE}Data", f"--flops={BUDGET}", "--sizes=[2,4,8,16]"]
    line += [
        "--rates=[1.0]",
        "--clients=[1,3]",
        f"--runs={folder}",
        "--bootstrap=20",
        "--accelerator=cpu",
        "--task=blobs",
        "--json",
    ]
    assert cli.main(line) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == "fedscale_law.json"
    assert said["fitted_on"]["task"] == "blobs"
    assert set(said["intervals"]) == {"E", "A", "B", "alpha", "beta", "exponent"}
    assert len(said["rho"]) == 3
    assert Path("report.md").is_file()
    assert Path("fit.png").is_file()
    # The project has a law now, and "auto" takes it.
    law, rho = law_of("auto", text=False)
    assert law is not None
    assert law.domain.task == "blobs"
    assert rho == pytest.approx(said["rho"][0])
    accounting = ComputeAccounting()
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[accounting], strategy=FederatedStrategy(num_clients=3), accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(8), datamodule=Data())
    assert accounting.law == law


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_run_directories_are_rows(logger: Any, tmp_path: Path) -> None:
    for size, clients in ((4, 2), (8, 5)):
        accounting = ComputeAccounting(law=None)
        trainer = pl.Trainer(
            max_epochs=3, callbacks=[accounting], strategy=FederatedStrategy(num_clients=clients), accelerator="cpu",
            logger=logger(tmp_path, name=f"size{size}"), log_every_n_steps=1, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Net(size), datamodule=Data())
        table = read_runs([tmp_path / f"size{size}"])
        (row,) = table.to_dict("records")
        assert row["params"] == parameters(size)
        assert row["clients"] == clients
        assert row["tokens"] == pytest.approx(300 / clients)
        assert row["flops"] == pytest.approx(accounting.ledger.training_flops / clients, rel=1e-5)
        assert row["loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-5)
    assert len(read_runs([tmp_path])) == 2
    with pytest.raises(ValueError, match=r"loss='val_los': .* did not log val_los.*val_loss"):
        read_runs([tmp_path], "val_los")


def test_fit_reads_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = made(noise=0.002, clients=(1, 4), rho=0.5)
    table.head(35).to_csv(tmp_path / "one.csv", index=False)
    table.tail(35).to_csv(tmp_path / "four.csv", index=False)
    files = [str(tmp_path / "one.csv"), str(tmp_path / "four.csv")]
    assert cli.main(["fit", *files, "--bootstrap=10", f"--output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    held_out = "for the runs of the largest compute, by a fit without them"
    for words in ("Rosenfeld, fitted to 70 runs", "rho", held_out, "report.md"):
        assert words in printed
    law, rho = law_from_file(tmp_path / "out" / "fedscale_law.json")
    expected = fit(table, bootstrap=10)
    assert law == expected.law
    assert expected.rho is not None
    assert rho == expected.rho.value
    assert project_law(tmp_path / "out") == (law, rho)
    assert cli.main(["fit", files[0], "--json", "--law=Henighan", "--bootstrap=0", "--holdout=false"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["law"], shown["runs"], shown["held_out"]) == ("Henighan", 35, None)


def test_fit_says_what_the_runs_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made().query("params < 1e5").to_csv(tmp_path / "few.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "few.csv"), "--bootstrap=0"]) == 0
    assert "These runs do not determine a best size: only 3 sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.csv"], "there is no such file or directory"),
        (["fit", "nowhere*/*"], "runs='nowhere*/*': there is no such file or directory"),
        (["fit", "empty.csv"], "runs='empty.csv': not readable as CSV"),
        (["fit", "bytes.csv"], "runs='bytes.csv': not readable as CSV"),
        (["fit", "header.csv"], "runs='header.csv': this table has no rows"),
        (["fit", "other.csv"], "runs: the columns loss, params are missing; there are a, b."),
        (["fit", "*er.csv"], "runs='header.csv': this table has no rows"),
        (["fit", "other.csv", "--bootstrap=-1"], "bootstrap=-1: pass a number of refits, at least 0"),
        (["fit", "other.csv", "--output=/dev/null/x"], "output='/dev/null/x': this folder cannot be created"),
        (["fit", "."], "runs='.': no run in it logged compute/params. Train with ComputeAccounting"),
        (["sweep", "--module=lost.Module", f"--data={HERE}Data", "--flops=1e6"], "module='lost.Module': cannot be"),
        (["sweep", "--module=Module", f"--data={HERE}Data", "--flops=1e6"], "module='Module': cannot be"),
        (["sweep", "--module=os.path", f"--data={HERE}Data", "--flops=1e6"], "module='os.path': this is not callable"),
        (["sweep", f"--module={HERE}Fixed", f"--data={HERE}Data", "--flops=1e6"], "Fixed has no such argument"),
        (["sweep", f"--module={HERE}Net", f"--data={HERE}Data", "--flops=1e6", "--argument=width"],
         "Net has no such argument. Name the one that sets the model's size; it has size."),
        (["sweep", f"--module={HERE}Net", f"--data={HERE}Data", "--flops=0"], "flops=0.0: pass a finite number"),
        (["sweep", f"--module={HERE}Net", f"--data={HERE}Data", "--flops=1e6", "--sizes=[1,2]"],
         "sizes=[1, 2]: pass at least four different"),
        (["sweep", f"--module={HERE}Net", f"--data={HERE}Data", "--flops=1e6", "--clients=[0]"], "whole numbers"),
        (["sweep", f"--module={HERE}Silent", f"--data={HERE}Data", "--flops=1e4", "--accelerator=cpu"],
         "loss=None: validation_step logs accuracy. Log the loss as val_loss"),
    ],
)  # fmt: skip
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments != ["fit", "."]:
        for name, content in (
            ("empty", b""),
            ("bytes", b"\xff\xfe\x00"),
            ("header", b"a,b\n"),
            ("other", b"a,b\n1,2\n"),
        ):
            Path(f"{name}.csv").write_bytes(content)
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


@pytest.mark.parametrize("runs", [None, 3, [1, 2, 3]])
def test_what_is_no_run_is_told(runs: Any) -> None:
    with pytest.raises(TypeError, match="run directories"):
        fit(runs)
    with pytest.raises(TypeError, match="run director"):
        read_runs(runs)


def test_a_law_is_asked_for_with_the_command_that_finds_one(caplog: pytest.LogCaptureFixture) -> None:
    accounting = ComputeAccounting()
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[accounting], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        trainer.fit(Net(), datamodule=Data())
    assert accounting.position is None
    spent = accounting.ledger.training_flops
    assert sweep_command(f"{HERE}Net", f"{HERE}Data", spent) in caplog.text
    assert math.isfinite(spent)


class Broad(Net):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)


def advice(
    module: pl.LightningModule, caplog: pytest.LogCaptureFixture, data: pl.LightningDataModule | None = None
) -> str:
    trainer = reference.quiet_trainer(max_steps=2, callbacks=[ComputeAccounting()])
    with caplog.at_level("INFO"):
        trainer.fit(module, datamodule=data or Data())
    return caplog.text


def test_the_command_names_the_argument_that_the_module_has(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert f"--module {HERE}Broad" in advice(Broad(), caplog)
    assert "--argument width" in caplog.text
    # And it can be run as it stands.
    command = shlex.split(next(line for line in caplog.text.splitlines() if line.strip().startswith("fedscale sweep")))
    few = [
        "--rates",
        "[1.0]",
        "--flops",
        "2e5",
        "--bootstrap",
        "0",
        "--accelerator",
        "cpu",
        "--output",
        str(tmp_path),
        "--runs",
        str(tmp_path),
    ]
    assert cli.main([*command[1:], *few]) == 0
    assert (tmp_path / "fedscale_law.json").is_file()


def test_a_class_that_cannot_be_imported_gets_no_command_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    class Here(Net):
        def __init__(self, breadth: int = 4) -> None:
            super().__init__(breadth)

    assert "--module my_package.MyModule" in advice(Here(), caplog)
    assert "where NAME is the module's argument that makes it larger" in caplog.text


class Assembled(Net):
    """As libraries make their modules: of many arguments, which their users never see."""

    def __init__(self, inputs: int, layers: list[int]) -> None:
        super().__init__(layers[0])


@pytest.mark.parametrize("where", ["own file", "installed package", "script"])
def test_a_module_that_takes_more_than_a_size_gets_a_function_around_it(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = {"own file": __name__, "installed package": "their_library.models", "script": "__main__"}[where]
    theirs = ModuleType("their_library.models")
    theirs.__file__ = f"{sysconfig.get_path('purelib')}/their_library/models.py"
    monkeypatch.setitem(sys.modules, "their_library.models", theirs)
    module = type("Assembled", (Assembled,), {"__module__": name})(12, [4])
    command = advice(module, caplog)
    made = f"{HERE}make" if where == "own file" else "my_package.make"  # nobody writes into an installed package
    assert f"fedscale sweep --module {made} --data {HERE}Data" in command
    which = "the module" if where == "script" else f"{name}.Assembled"
    assert f"{made} is a function of size that you add, which makes {which} with its inputs, layers:" in command
    assert "--argument" not in command


@pytest.mark.parametrize("where", ["own file", "installed package"])
def test_a_data_module_that_was_given_data_gets_a_function_around_it(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Needs(Data):
        def __init__(self, rows: int) -> None:
            super().__init__()

    class Takes(Data):
        """As libraries make them: of data that are no argument which must be given."""

        def __init__(self, rows: int | None = None) -> None:
            super().__init__()

    theirs = ModuleType("their_library.data")
    theirs.__file__ = f"{sysconfig.get_path('purelib')}/their_library/data.py"
    monkeypatch.setitem(sys.modules, "their_library.data", theirs)
    kind, name = (Needs, __name__) if where == "own file" else (Takes, "their_library.data")
    given = type("Given", (kind,), {"__module__": name})(9)
    made = f"{HERE}make_data" if where == "own file" else "my_package.make_data"
    assert f"--module {HERE}Net --data {made} --sizes" in advice(Net(), caplog, given)
    assert f"where {made} is a function that you add, which makes {name}.Given with its rows:" in caplog.text


def test_a_module_of_one_size_gets_a_function_around_it(caplog: pytest.LogCaptureFixture) -> None:
    assert f"{HERE}make is a function of size that you add, which makes {HERE}Fixed:" in advice(Fixed(), caplog)
    assert f"fedscale sweep --module {HERE}make" in caplog.text


@pytest.mark.parametrize("script", ["__main__", "__mp_main__"])
def test_a_class_of_the_script_that_runs_gets_no_command_of_its_own(
    script: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Processes that are spawned know their script by another name."""
    module = type("Own", (Net,), {"__module__": script})()
    assert "--module my_package.MyModule" in advice(module, caplog)
    assert script not in caplog.text


def test_a_law_that_determines_no_size_is_not_called_missing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    made().query("params < 1e5").to_csv("runs.csv", index=False)
    assert cli.main(["fit", "runs.csv", "--bootstrap=3"]) == 0
    assert "These runs do not determine a best size: only 3 sizes" in capsys.readouterr().out
    with pytest.warns(
        UserWarning, match=r"do not determine a best size \(only 3 sizes.*\)\. Add sizes, data or compute"
    ):
        assert "no law for this task yet" not in advice(Net(), caplog)


def test_a_law_of_ones_own_is_no_law_of_text() -> None:
    found = fit(made(), Rosenfeld, bootstrap=0)
    assert found.law.domain.task == "this task"
    assert law_of("auto", text=False) == (None, None)


# ---- learning rates


class Found(NamedTuple):
    """Runs that a sweep would make."""

    rates: list[tuple[int, int, float, float]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Found:
    """A sweep whose runs take no time: loss is least at twice the module's rate for one client, at 16 for four."""
    found = Found([])

    def run(self: Project, job: Job, *_: Any, **__: Any) -> dict[str, Any]:
        setting, clients = job.setting, self.partition.num_clients
        found.rates.append((setting.size, clients, self.flops * job.share, setting.rate))
        apart = math.log2(setting.rate / (2 if clients == 1 else 16))
        return {
            "params": parameters(setting.size), "tokens": 100.0 * clients, "samples": 100.0 * clients, "rounds": 5,
            "flops": self.flops * job.share, "loss": math.inf if setting.rate > 40 else 1.0 + 0.01 * apart**2,
            "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(Project, "run", run)
    return found


def test_the_rate_is_tuned_for_every_size_and_number_of_clients(quick: Found, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sizes": SIZES, "flops": BUDGET, "clients": [1, 4], "folder": tmp_path}
    table = sweep(Net, Data, **asked)
    assert len(table) == 2 * len(SIZES) * len(LEVELS)
    assert set(zip(table.clients, table.learning_rate, strict=True)) == {(1, 2.0), (4, 16.0)}
    every = pd.read_csv(tmp_path / "runs.csv")
    for (size, clients, share), rows in every.groupby(["size", "clients", "share"]):
        # The grid went on until the best was inside of it.
        assert sorted(rows.learning_rate) == [0.5, 1, 2, 4] + ([8, 16, 32] if clients == 4 else []), (size, share)
    before = len(quick.rates)
    pd.testing.assert_frame_equal(sweep(Net, Data, **asked)[table.columns], table, check_dtype=False)
    assert len(quick.rates) == before  # nothing is missing, and so nothing is trained


def test_other_seeds_train_at_the_best_rate_and_count(quick: Found, tmp_path: Path) -> None:
    table = sweep(Net, Data, SIZES, BUDGET, folder=tmp_path, seeds=3)
    assert set(table.seed) == {1, 2}
    assert set(zip(table.clients, table.learning_rate, strict=True)) == {(1, 2.0), (4, 16.0)}
    assert len(table) == 2 * 2 * len(SIZES) * len(LEVELS)


def test_one_rate_is_said_to_be_none_that_was_tuned(quick: Found, tmp_path: Path) -> None:
    table = sweep(Net, Data, SIZES, BUDGET, folder=tmp_path, rates=[2.0])
    assert set(table.learning_rate) == {2.0}
    assert tuned(table).said == NOT_TUNED
    for wrong in ([], [0.0], [True], ["1"]):
        with pytest.raises(ValueError, match="rates="):
            sweep(Net, Data, SIZES, BUDGET, folder=tmp_path, rates=wrong)  # type: ignore[arg-type]


def test_a_sweep_says_first_what_it_takes(quick: Found, tmp_path: Path) -> None:
    said: list[str] = []
    asked: dict[str, Any] = {"sizes": SIZES, "flops": BUDGET, "clients": [1, 4], "folder": tmp_path, "say": said.append}
    sweep(Net, Data, **asked, each=lambda _: said.append("run"))
    runs, spent = 2 * len(SIZES) * len(LEVELS) * 3, 2 * len(SIZES) * sum(LEVELS) * 3 * BUDGET
    assert said[0].startswith(f"At least {runs} runs, about ")
    assert f"minutes, {spent:.2g} FLOPs" in said[0]
    assert said[1] == "run"


@pytest.mark.parametrize("method", ["scaffold", {"aggregator": "uniform", "client_optimizer": "keep"}])
def test_a_sweep_is_of_a_method_and_a_batch(
    method: Any, quick: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[Any] = []
    run = Project.run

    def noted(self: Project, job: Job) -> dict[str, Any]:
        settings.append((self, job))
        return run(self, job)

    monkeypatch.setattr(Project, "run", noted)
    asked: dict[str, Any] = {"sizes": SIZES, "flops": BUDGET, "folder": tmp_path, "rates": [1.0], "method": method}
    table = sweep(Net, Data, **asked, batch_size=8, local_steps=3)
    for project, job in settings:
        (options,) = project.methods.values()
        assert options == (METHODS[method] if isinstance(method, str) else method)
        assert job.setting[2:4] == (8, 3)
    assert set(table.batch_size) == {8}
    made_for = fit(table.assign(loss=range(1, len(table) + 1)), bootstrap=0).made_for
    assert (made_for.method, made_for.batch_size, made_for.local_steps) == (table["method"][0], 8, 3)
    with pytest.raises(ValueError, match=r"sweep with other values of method, batch_size\. Name another folder"):
        sweep(Net, Data, SIZES, BUDGET, folder=tmp_path, local_steps=3)
    with pytest.raises(ValueError, match="scafold"):
        sweep(Net, Data, SIZES, BUDGET, folder=tmp_path / "other", method="scafold")


def test_a_sweep_says_what_its_law_is_made_for(quick: Found, tmp_path: Path) -> None:
    held = Partition.from_lists([[*range(60)], [*range(60, 100)]])
    held.save(tmp_path / "two.json")
    asked: dict[str, Any] = {"sizes": SIZES, "flops": BUDGET, "folder": tmp_path, "rates": [1.0]}
    table = sweep(Net, Data, **asked, partition=str(tmp_path / "two.json"))
    labels = reference.dataset(100).tensors[1].tolist()
    facts = {
        "partition_name": "two.json", "fingerprint": held.fingerprint, "samples": 100, "batch": 4, "optimizer": "SGD",
        "rules": json.dumps(FederatedStrategy().method, sort_keys=True),
        "mean_js_distance": round(heterogeneity(held, labels).mean_js_distance, 4),
    }  # fmt: skip
    for name, value in facts.items():
        assert set(table[name]) == {value}, name
    made_for = runs_to_fit(table, Rosenfeld()).made_for
    assert (made_for.partition, made_for.fingerprint, made_for.clients) == ("two.json", held.fingerprint, (2,))
    assert (made_for.batch_size, made_for.tokens_per_sample, made_for.argument) == (4, 1.0, "size")
    assert made_for.sizes == tuple((size, parameters(size)) for size in SIZES)
    assert made_for.unknown == []
    # A table that was begun before these were written gets them.
    every = pd.read_csv(tmp_path / "runs.csv")
    every.drop(columns=list(facts)).to_csv(tmp_path / "runs.csv", index=False)
    again = sweep(Net, Data, **asked, partition=str(tmp_path / "two.json"))
    pd.testing.assert_frame_equal(again[table.columns], table, check_dtype=False)


def test_rates_of_schedulers_move_along() -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    both: list[Any] = [each.configure_optimizers() for each in (Scheduled(), at_rate(Scheduled(), 2.0))]
    for _ in range(9):
        rates = [each["optimizer"].param_groups[0]["lr"] for each in both]
        assert rates[1] == pytest.approx(2 * rates[0])
        for each in both:
            each["optimizer"].step()
            each["lr_scheduler"]["scheduler"].step()
