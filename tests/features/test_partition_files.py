"""The file of a partition is taken wherever data is divided: by the strategy, by Hydra, and by every command."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy, Partition, cli
from lightning_fedscale.callbacks import ClientMetrics
from lightning_fedscale.cli.arguments import function_of
from lightning_fedscale.partitioners import FilePartitioner, by_name
from lightning_fedscale.scaling.project import LEVELS
from lightning_fedscale.study import sweep
from tests.laws import reference

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = 60
CLIENTS = [range(0, 10), range(10, 35), range(35, 60)]
HERE = f"{__name__}."


class Net(pl.LightningModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, size), nn.ReLU(), nn.Linear(size, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(reference.dataset(self.samples), 5)

    val_dataloader = train_dataloader


class Fewer(Data):
    def __init__(self) -> None:
        super().__init__(40)


class More(Data):
    def __init__(self) -> None:
        super().__init__(100)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    line, path = sys.argv[:], sys.path[:]
    Partition.from_lists(CLIENTS).save("hospitals.json")
    yield "hospitals.json"
    sys.argv, sys.path = line, path


def fit(samples: int = SAMPLES, **options: Any) -> tuple[dict[str, Tensor], FederatedStrategy]:
    strategy, module = FederatedStrategy(executor="sequential", **options), Net()
    reference.quiet_trainer(max_epochs=2, strategy=strategy).fit(module, datamodule=Data(samples))
    return module.state_dict(), strategy


def test_a_file_trains_as_the_partition_in_it(file: str) -> None:
    expected, strategy = fit(partitioner=Partition.load(file))
    given: list[dict[str, Any]] = [
        {"partitioner": file},
        {"partitioner": Path(file)},
        {"partitioner": str(Path(file).resolve()), "num_clients": 3},
        {"partitioner": FilePartitioner(file), "clients_per_round": 3},
        {"partitioner": pickle.loads(pickle.dumps(FilePartitioner(file)))},
    ]
    for options in given:
        found, same = fit(**options)
        assert reference.difference(found, expected) == 0.0
        assert same.partition == strategy.partition
        assert same.num_clients == 3


LOST = (
    r"partitioner='lost.json': the file cannot be read: No such file or directory. Pass a file that Partition.save or"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitioner": "lost.json"}, LOST),
        ({"partitioner": Path("lost.json")}, LOST),
        ({"partitioner": "broken.json"}, r"partitioner='broken.json': .*not a saved partition"),
        ({"partitioner": "changed.json"}, r"partitioner='changed.json': .*was changed after it was saved"),
        (
            {"partitioner": "hospitals.json", "num_clients": 8},
            "num_clients=8 but .* 3 clients",
        ),
        ({"partitioner": "hospitals.json", "clients_per_round": 4}, "clients_per_round=4 is more than num_clients=3"),
        (
            {"partitioner": "hospitals.json", "samples": 40},
            r"it divides 60 samples, and the dataset has 40, .*other data",
        ),
        (
            {"partitioner": "hospitals.json", "samples": 100},
            r"'hospitals.json'\): it divides 60 samples, and the dataset has 100, .*or pass Partition.load\('hospitals",
        ),
        (
            {"partitioner": "some.json", "samples": 40},
            r"'some.json'\): sample 50 is not in the dataset: .* 0 to 39",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(options: dict[str, Any], message: str, file: str) -> None:
    Path("broken.json").write_text("[1, 2]")
    Path("changed.json").write_text(Path(file).read_text().replace("[0, 10, 35", "[0, 11, 35"))
    Partition.from_lists([[0, 50], [3]]).save("some.json")
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_samples_may_be_left_out_on_purpose(file: str) -> None:
    Partition.from_lists([[0, 50], [3]]).save("some.json")
    assert fit(partitioner="some.json")[1].partition == Partition.from_lists([[0, 50], [3]])
    assert fit(samples=100, partitioner=Partition.load(file))[1].num_clients == 3


def test_names_and_files_are_resolved_in_one_place(file: str) -> None:
    made = by_name(file, partition_by="label")
    assert (made.num_partitions, made.partition_by) == (3, "label")
    assert repr(by_name(file, 3)) == "FilePartitioner(path='hospitals.json')"
    with pytest.raises(ValueError, match=r"num_partitions=4: .*3 clients"):
        by_name(file, 4)
    with pytest.raises(ValueError, match="FilePartitioner has no argument 'alpha'"):
        by_name(file, alpha=0.3)
    assert by_name("iid").num_partitions == 10


def test_validation_data_are_divided_by_a_file_too(file: str) -> None:
    def fit_with(partitioner: str) -> dict[str, Any]:
        strategy = FederatedStrategy(partitioner=file, executor="sequential")
        callback = ClientMetrics(partitioner=partitioner)
        trainer = reference.quiet_trainer(max_epochs=1, strategy=strategy, callbacks=[callback], limit_val_batches=1.0)
        trainer.fit(Net(), datamodule=Data())
        return trainer.callback_metrics

    assert any(name.startswith("clients/") for name in fit_with(file))
    with pytest.raises(ValueError, match=LOST):
        fit_with("lost.json")


# ---- Hydra


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.partitioner=hospitals.json", "strategy.num_clients=null"],
        ["strategy.partitioner=hospitals.json", "strategy.num_clients=3"],
        ["strategy/partitioner=file", "strategy.partitioner.path=hospitals.json", "strategy.num_clients=null"],
    ],
)
def test_hydra_makes_the_strategy(overrides: list[str], file: str) -> None:
    with initialize_config_module("lightning_fedscale.conf", version_base="1.3"):
        made = instantiate(compose("train", overrides=overrides).strategy)
    assert made.num_clients == 3
    assert made._options.partition(reference.dataset(SAMPLES)) == Partition.load(file)


# ---- commands

OF_ONES_OWN = [f"--module={HERE}Net", f"--data={HERE}Data"]
SHORT = [
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "logger=[]",
    "callbacks=[]",
]
COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "partition": lambda file, data: [f"--data={HERE}{data}", f"--partitioner={file}", "--json"],
    "bench": lambda file, data: [
        f"--module={HERE}Net", f"--data={HERE}{data}", f"--partition={file}", "--local_steps=2", "--seconds=0.01",
        "--accelerator=cpu", "--json",
    ],
    "sweep": lambda file, data: [
        f"--module={HERE}Net", f"--data={HERE}{data}", f"--partition={file}", "--flops=1e4", "--sizes=[2,4,8,16]",
        "--rates=[1.0]", "--bootstrap=0", "--accelerator=cpu", "--json",
    ],
    "size": lambda file, data: [
        f"--module={HERE}Net", f"--data={HERE}{data}", f"--partition={file}", "--flops=1e4", "--sizes=[2,4]",
        "--methods=[fed_avg]", "--local_steps=[1]", "--rates=[1.0]", "--seeds=2", "--study_minutes=0.01",
        "--accelerator=cpu", "--json",
    ],
    "train": lambda file, data: [
        f"model._target_={HERE}Net", f"data._target_={HERE}{data}", f"--partition={file}", "--json", *SHORT,
    ],
}  # fmt: skip


def test_no_command_that_divides_data_is_forgotten() -> None:
    takes = {
        name
        for name in cli.COMMANDS
        if {"partition", "partitioner"} & set(parameters := inspect.signature(function_of(name)).parameters)
        and "data" in parameters  # others compare a partition with that of a law
    }
    assert takes == set(COMMANDS) - {"train"}
    divides = {name for name in cli.COMMANDS if "clients" in inspect.signature(function_of(name)).parameters}
    assert divides - takes <= {"plan"}  # which has no data


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_files(name: str, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = cli.main([name, *COMMANDS[name](file, "Data")])
    said = capfd.readouterr()
    if name == "sweep":  # whose runs are too few to tell a law from
        table = pd.read_csv("fedscale_sweep/runs.csv")
        assert set(table.clients) == {3}
        assert set(table.partition) == {Partition.load(file).fingerprint}
        return
    assert code == 0, said.err
    found = json.loads(said.out.splitlines()[-1])
    if name == "partition":
        assert found["sizes"] == [10, 25, 25]
    elif name == "size":
        assert found["clients"] == 3
        assert f"partitioner={file!r}" in found["strategy"]
    elif name == "bench":
        assert (found["clients"], found["batches_per_round"]) == (3, 6)
    else:
        assert found["metrics"]["round/clients"] == 3
        assert found["metrics"]["round/samples"] == SAMPLES


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("given", "data", "message"),
    [
        ("lost.json", "Data", "partitioner='lost.json': the file cannot be read: No such file or directory"),
        ("hospitals.json", "More", "it divides 60 samples, and the dataset has 100, so it was made for other data"),
        ("hospitals.json", "Fewer", "it divides 60 samples, and the dataset has 40, so it was made for other data"),
    ],
)
def test_commands_refuse_files_in_one_line(
    name: str, given: str, data: str, message: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, *COMMANDS[name](given, data)]) == 1
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("partition", "--clients=4"),
        ("bench", "--clients=4"),
        ("sweep", "--clients=[4]"),
        ("size", "--clients=4"),
        ("train", "strategy.num_clients=4"),
    ],
)
def test_commands_refuse_another_number_of_clients(
    name: str, more: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, *COMMANDS[name](file, "Data"), more]) == 1
    said = capfd.readouterr().err
    assert "4" in said
    assert "3 clients" in said
    assert "Traceback" not in said


# ---- sweeps


def test_a_sweep_trains_on_the_partition_it_is_given(file: str, tmp_path: Path) -> None:
    def losses(folder: str, **options: Any) -> list[float]:
        table = sweep(Net, Data, [2, 4, 8, 16], 1e5, folder=tmp_path / folder, rates=[1.0],
                      trainer={"accelerator": "cpu"}, **options)  # fmt: skip
        assert len(table) == 4 * len(LEVELS) * len(options.get("clients", [3]))
        found: list[float] = table.loss.tolist()
        return found

    by_file = losses("file", partition=file)
    assert by_file == losses("object", partition=Partition.load(file))
    assert by_file == losses("partitioner", partition=FilePartitioner(file))
    assert by_file != losses("iid", clients=[3])
    assert losses("skewed", clients=[3], partition="dirichlet") != losses("even", clients=[3], partition="iid")
    with pytest.raises(ValueError, match=r"folder=.*sweep with other values of partition"):
        sweep(Net, Data, [2, 4, 8, 16], 1e5, [3], folder=tmp_path / "file")
    with pytest.raises(ValueError, match=r"strategy: partitioner=.* cannot be set here"):
        losses("both", partition=file, strategy={"partitioner": file})
    with pytest.raises(TypeError, match=r"strategy=.*: pass arguments of FederatedStrategy by name"):
        losses("made", strategy=lambda clients: FederatedStrategy())
    with pytest.raises(TypeError, match=r"partition=7: pass a name such as 'dirichlet', a file"):
        losses("neither", partition=7)
