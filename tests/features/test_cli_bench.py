"""``fedscale bench``: the contenders do the same work, and the numbers hang together. Times are not tested."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from itertools import islice
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, cli
from lightning_fedscale.partitioners import IidPartitioner
from tests.features.test_cli_probe import Project
from tests.laws import reference

HERE = f"{__name__}."
bench: Any = import_module("lightning_fedscale.cli.bench")  # the package has the function under this name
QUICK = ["--accelerator=cpu", "--seconds=0.01", "--local_steps=5"]


@pytest.fixture(autouse=True)
def one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_TURNS", 1)
    monkeypatch.setattr(bench, "_WARM_UP", 5)


class Sizes(Project):
    """Notes the batches that it trains on."""

    seen: ClassVar[Counter[int]] = Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[len(batch[0])] += 1
        return super().training_step(batch, batch_idx)


class Stubborn(Project):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if float(loss.detach()) > -1 else 2 * loss


class Data(pl.LightningDataModule):
    """Whose batches only its own hook makes fit for the module."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(50, 32), torch.zeros(50, dtype=torch.long)), 4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [torch.cat([batch[0], batch[0]], 1), batch[1]]


class Whole(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(50, 4, 64), torch.zeros(50, 4, dtype=torch.long)), batch_size=None)


def test_numbers_hang_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *QUICK, "--clients=6", "--clients_per_round=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clients"], found["clients_per_round"], found["batches_per_round"]) == (6, 4, 20)
    central = found["central"]["seconds_per_round"]
    for name in ("central", "sequential", "vectorized"):
        of = found[name]
        assert of["rounds"] >= 3
        assert of["rounds_per_second"] == pytest.approx(1 / of["seconds_per_round"])
        assert of["batches_per_second"] == pytest.approx(20 / of["seconds_per_round"])
        assert of["times_central"] == pytest.approx(of["seconds_per_round"] / central)
    both = {name: found[name]["seconds_per_round"] for name in ("sequential", "vectorized")}
    assert found["fastest"] == min(both, key=lambda name: both[name])


def test_central_training_has_the_batches_of_the_clients() -> None:
    """Seven clients of seven or eight samples make batches of four and three or four."""
    module = Sizes()
    loader = module.train_dataloader()
    parts = IidPartitioner(7)
    parts.dataset = loader.dataset
    batches = bench._Batches(loader, module, parts.partition, cohort=7, local_steps=2)
    centrally = Counter(len(batch) for batch in islice(batches, 3 * 14))
    Sizes.seen.clear()
    strategy = FederatedStrategy(partitioner=IidPartitioner(7), local_steps=2, executor="sequential")
    reference.quiet_trainer(max_epochs=3, strategy=strategy).fit(module, loader)
    assert centrally == Sizes.seen
    assert len(centrally) == 2


def test_no_round_is_timed_in_which_steps_are_still_recorded() -> None:
    clock = bench._Clock(every=3, warm_up=2, seconds=0.0)
    run = reference.quiet_trainer(max_epochs=-1, callbacks=[clock])
    run.fit(reference.make_module(), reference.loader(reference.dataset(100)))
    assert len(clock.times()) == bench._FEWEST_ROUNDS
    assert run.global_step == 3 * (2 + 1 + bench._FEWEST_ROUNDS)


def test_what_cannot_be_vectorized_is_told_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", f"--module={HERE}Stubborn", *QUICK, "--clients=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vectorized"].keys() == {"obstacle"}
    assert "test_cli_bench.py" in found["vectorized"]["obstacle"]
    assert found["fastest"] == "sequential"
    assert cli.main(["bench", f"--module={HERE}Stubborn", *QUICK, "--clients=3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("not possible", "cannot be vectorized: ", "Fastest here: executor='sequential'"):
        assert words in printed


def test_a_data_modules_hooks_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    module = "--module=tests.features.test_cli_probe.Bare"
    assert cli.main(["bench", module, f"--data={HERE}Data", *QUICK, "--clients=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["central"]["rounds"] >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients=0"], "clients=0: pass an integer of at least 1"),
        (["--clients=2", "--clients_per_round=3"], "clients_per_round=3 is more than num_clients=2"),
        (["--clients=5000"], "5000"),
        (["--local_steps=0"], "local_steps=0"),
        (["--seconds=0"], "seconds=0"),
        (["--accelerator=toaster"], "accelerator='toaster': "),
        ([f"--data={HERE}Data"], "module: pass --module"),
        ([f"--module={HERE}Sizes", f"--data={HERE}Whole"], "train_dataloader: batch_size=None"),
        (["--module=tests.features.test_cli_probe.Bare"], "Pass data= (--data)"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--accelerator=cpu", *arguments]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


def test_modules_that_cannot_be_imported_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "--module=no.such.Module"])
    assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
