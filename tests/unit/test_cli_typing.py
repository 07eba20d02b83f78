"""`FederatedStrategy` from LightningCLI: arguments, YAML, printed and saved configurations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, partitioners
from lightning_fedscale.samplers import uniform
from tests.ids import stable

NAME = "lightning_fedscale.FederatedStrategy"

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Labelled(BoringDataModule):
    """The boring data with two classes."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(RandomDataset(32, 64).data, torch.arange(64) % 2), batch_size=4)


class Model(BoringModel):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)["loss"]  # type: ignore[index]


def cli(arguments: Sequence[str], **options: Any) -> LightningCLI:
    return LightningCLI(Model, Labelled, seed_everything_default=1, args=list(arguments), **options)


def trainer_arguments() -> list[str]:
    return [f"--trainer.{name}={str(value).lower()}" for name, value in TRAINER.items()]


def strategy_of(ran: LightningCLI) -> FederatedStrategy:
    assert isinstance(ran.trainer.strategy, FederatedStrategy)
    return ran.trainer.strategy


def yaml_file(path: Path, **init_args: Any) -> str:
    # By name: bits are compared, and "auto" goes by the clock.
    strategy = {"class_path": NAME, "init_args": {"executor": "sequential", **init_args}}
    path.write_text(yaml.safe_dump({"trainer": {**TRAINER, "strategy": strategy}}))
    return str(path)


def weights(ran: LightningCLI) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ran.model.parameters()])


def test_command_line_arguments_run() -> None:
    ran = cli(
        [
            "fit",
            *trainer_arguments(),
            f"--trainer.strategy={NAME}",
            "--trainer.strategy.num_clients=6",
            "--trainer.strategy.local_steps=5",
            "--trainer.strategy.clients_per_round=0.5",
            "--trainer.strategy.aggregator=uniform",
            "--trainer.strategy.client_optimizer=keep",
        ]
    )
    options, record = strategy_of(ran)._options, strategy_of(ran).last_round
    assert (options.num_clients, options.local_epochs, options.local_steps) == (6, None, 5)
    assert options.keep_optimizers
    assert record is not None
    assert record.local_steps.tolist() == [5, 5, 5]
    assert ran.trainer.global_step == 2


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("0.25", 0.25), ("null", None), ("1", 1), ("1.0", 1.0)])
def test_clients_per_round_keeps_its_kind(text: str, expected: float | None) -> None:
    ran = cli([f"--trainer.strategy={NAME}", f"--trainer.strategy.clients_per_round={text}"], run=False)
    options = strategy_of(ran)._options
    assert options.clients_per_round == expected
    assert type(options.clients_per_round) is type(expected)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_clients=0", "num_clients=0: pass an integer of at least 1"),
        ("clients_per_round=1.5", "clients_per_round=1.5: pass a fraction"),
        ("partitioner=dirichlt", "Did you mean 'dirichlet'"),
    ],
)
def test_wrong_values_reach_the_user(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        cli([f"--trainer.strategy={NAME}", f"--trainer.strategy.{argument}"], run=False)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_yaml_with_a_nested_partitioner_runs(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path / "run.yaml",
        local_epochs=2,
        clients_per_round=2,
        sampler="lightning_fedscale.samplers.uniform",
        timeout="0:10:00",
        partitioner={
            "class_path": "lightning_fedscale.partitioners.DirichletPartitioner",
            "init_args": {"num_partitions": 3, "alpha": 0.5, "min_partition_size": 2},
        },
    )
    strategy = strategy_of(cli(["fit", f"--config={file}"]))
    assert isinstance(strategy._options.partitioner, partitioners.DirichletPartitioner)
    assert strategy._options.sampler is uniform
    assert strategy.num_clients == 3
    expected = partitioners.DirichletPartitioner(3, alpha=0.5, min_partition_size=2)
    expected.dataset = torch.arange(64) % 2
    assert strategy.partition == expected.partition


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"local_steps": 3, "num_clients": 6},
    {"local_epochs": 2, "clients_per_round": 0.5, "seed": 3},
    {
        "partitioner": {
            "class_path": "lightning_fedscale.partitioners.SizePartitioner",
            "init_args": {"partition_sizes": [8, 24, 5]},
        }
    },
]


@pytest.mark.parametrize("init_args", CONFIGURATIONS, ids=stable)
def test_printed_configuration_runs_the_same(
    init_args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = yaml_file(tmp_path / "first.yaml", **init_args)
    first = cli(["fit", f"--config={file}"], save_config_callback=None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli(["fit", f"--config={file}", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    shown = yaml.safe_load(printed)["trainer"]["strategy"]["init_args"]
    assert {name: shown[name] for name in init_args if name != "partitioner"} == {
        name: value for name, value in init_args.items() if name != "partitioner"
    }
    second = cli(["fit", f"--config={again}"], save_config_callback=None)
    assert torch.equal(weights(first), weights(second))
    assert strategy_of(first).partition == strategy_of(second).partition


def test_saved_configuration_runs_the_same(tmp_path: Path) -> None:
    file = yaml_file(tmp_path / "first.yaml", local_steps=3, num_clients=6)
    first = cli(["fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}"])
    saved = tmp_path / "config.yaml"
    assert saved.is_file()
    second = cli(["fit", f"--config={saved}"], save_config_kwargs={"overwrite": True})
    assert strategy_of(second)._options.local_steps == 3
    assert torch.equal(weights(first), weights(second))


def test_registered_name() -> None:
    ran = cli(["--trainer.strategy=federated"], run=False)
    assert strategy_of(ran).num_clients == 10


def test_help_lists_every_argument_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["fit", f"--trainer.strategy.help={NAME}"])
    text = " ".join(capsys.readouterr().out.split())
    said = re.search(r"^ +local_steps: (.+)$", str(FederatedStrategy.__doc__), re.MULTILINE)
    assert said is not None
    assert f"--trainer.strategy.local_steps LOCAL_STEPS {said[1]}" in text
    assert "--trainer.strategy.client_optimizer {reset,keep}" in text


def test_populations_and_probes_from_yaml(tmp_path: Path) -> None:
    population = {
        "class_path": "lightning_fedscale.devices.Population",
        "init_args": {"shares": {"phone": 0.5, "jetson": 0.5}, "deadline": 10.0, "batch_size": "loader"},
    }
    probe = {
        "class_path": "lightning_fedscale.callbacks.MaxBatchProbe",
        "init_args": {"budget": "1MiB", "device_classes": ["phone"], "apply": False},
    }
    strategy = {"class_path": NAME, "init_args": {"num_clients": 4, "population": population}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {**TRAINER, "strategy": strategy, "callbacks": [probe]}}))
    cli = LightningCLI(BoringModel, BoringDataModule, args=["fit", "--config", str(config)], save_config_callback=None)
    assert cli.trainer.strategy.population_table()["clients"].to_dict() == {"phone": 2, "jetson": 2}  # type: ignore[attr-defined]
    assert cli.trainer.callbacks[0].result.device_classes == {"phone": 16}  # type: ignore[attr-defined]
