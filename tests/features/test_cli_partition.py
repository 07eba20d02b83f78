"""``fedscale partition``: what it shows is what a run would train on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, Partition, cli
from lightning_fedscale.cli.digits import Digits
from lightning_fedscale.partitioners import DirichletPartitioner
from tests.laws import reference

DATA = f"--data={__name__}."


class Labelled(pl.LightningDataModule):
    def __init__(self, samples: int = 60) -> None:
        super().__init__()
        self.samples = samples

    def setup(self, stage: str) -> None:
        self.train = TensorDataset(torch.zeros(self.samples, 2), torch.arange(self.samples) % 3)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 4)


class Regression(Labelled):
    def setup(self, stage: str) -> None:
        self.samples = 2000
        self.train = TensorDataset(torch.zeros(2000, 2), torch.arange(2000) / 7)


class Lost(Labelled):
    def train_dataloader(self) -> Any:
        return [1, 2]


def of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["partition", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_numbers_are_those_of_the_partition_that_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "held.json"
    found = of(capsys, f"{DATA}Labelled", "--data.samples=90", "--clients=6", "--alpha=0.3", f"--save={file}")
    strategy = FederatedStrategy(partitioner=DirichletPartitioner(6, alpha=0.3, min_partition_size=1))
    data = Labelled(90)
    data.setup("fit")
    run = reference.quiet_trainer(max_epochs=1, strategy=strategy)

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run.fit(Net(), data.train_dataloader())
    trained = strategy.partition
    assert trained is not None
    assert found["fingerprint"] == trained.fingerprint
    assert Partition.load(file) == trained
    # By hand, from the clients' samples.
    counts = [Counter(index % 3 for index in trained.client(client).tolist()) for client in range(6)]
    assert found["sizes"] == [sum(count.values()) for count in counts]
    assert found["label_counts"] == [[count[label] for label in found["labels"]] for count in counts]
    table = np.array(found["label_counts"], dtype=float)
    distances = [jensenshannon(row, table.sum(0), base=2) for row in table]
    assert found["heterogeneity"]["mean_js_distance"] == pytest.approx(np.mean(distances))
    # The file is a partitioner too.
    again = of(capsys, f"{DATA}Labelled", "--data.samples=90", f"--partitioner={file}")
    assert again["fingerprint"] == found["fingerprint"]
    assert again["label_counts"] == found["label_counts"]


def test_alpha_is_skew_and_the_digits_need_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    skew = [of(capsys, "--clients=20", f"--alpha={alpha}")["heterogeneity"]["mean_js_distance"] for alpha in (0.1, 10)]
    assert skew[0] > 2 * skew[1]
    found = of(capsys, "--partitioner=iid", "--clients=7", "--seed=3")
    assert found["samples"] == len(Digits().train)
    assert max(found["sizes"]) - min(found["sizes"]) <= 1
    assert found["partitioner"] == "IidPartitioner(num_partitions=7, seed=3)"


def test_a_partitioner_with_arguments_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "lightning_fedscale.partitioners.PathologicalPartitioner"
    options = ["--partitioner.num_partitions=5", "--partitioner.num_classes_per_partition=1"]
    found = of(capsys, f"{DATA}Labelled", f"--partitioner={name}", *options)
    assert found["heterogeneity"]["mean_num_labels"] == 1
    config = tmp_path / "partition.yaml"
    config.write_text(
        f"data: {__name__}.Labelled\npartitioner:\n  class_path: {name}\n  init_args:\n    num_partitions: 5\n"
        "    num_classes_per_partition: 1\n"
    )
    assert of(capsys, f"--config={config}") == found


def test_tables_and_a_figure_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "held.png"
    assert cli.main(["partition", "--clients=5", "--alpha=0.1", f"--plot={picture}"]) == 0
    printed = capsys.readouterr().out
    for words in ("DirichletPartitioner(num_partitions=5, alpha=0.1", "Gini", "Jensen-Shannon", "1,200", "Client"):
        assert words in printed
    assert matplotlib.image.imread(picture).std() > 0.1
    assert cli.main(["partition", "--clients=300"]) == 0
    assert "│ Client " not in capsys.readouterr().out  # no row for each of hundreds


def test_data_without_labels_is_divided_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = of(capsys, f"{DATA}Regression", "--partitioner=linear", "--clients=3")
    assert sum(found["sizes"]) == 2000
    assert "heterogeneity" not in found
    assert cli.main(["partition", f"{DATA}Regression", "--partitioner=iid", "--clients=3"]) == 0
    assert "Jensen" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partitioner=dirichlt"], "Did you mean 'dirichlet'"),
        (["--partitioner=iid", "--alpha=1"], "IidPartitioner has no argument 'alpha'"),
        (["--partitioner=pathological"], "num_classes_per_partition=None"),
        (["--partitioner=file"], "partitioner='file' needs path: pass an object, FilePartitioner(path=...)"),
        (["--clients=0"], "clients=0: pass an integer of at least 1"),
        (["--alpha=-1"], "alpha=-1"),
        (["--clients=1300"], "1300"),
        (["--plot=/dev/null/held.png"], "plot='/dev/null/held.png': cannot be written"),
        (["--plot=held.nothing"], "plot='held.nothing': cannot be written"),
        (["--save=/dev/null/held.json"], "save='/dev/null/held.json': cannot be written"),
        ([f"{DATA}Lost"], "train_dataloader returns list"),
        (
            [f"{DATA}Regression", "--partitioner=iid", "--plot=held.png"],
            "no labels that are integers or words, or over 1,000",
        ),
        ([f"{DATA}Labelled", "--partition_by=speaker"], "partition_by='speaker'"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["partition", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_data_that_cannot_be_imported_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["partition", "--data=no.such.Data"])
    assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
