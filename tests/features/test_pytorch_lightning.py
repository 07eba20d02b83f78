"""A project that imports ``pytorch_lightning`` gets the same federated training, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as twin_pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_fedscale
from lightning_fedscale import cli
from lightning_fedscale import pytorch_lightning as twin
from lightning_fedscale.partitioners import DirichletPartitioner
from tests.dist import processes
from tests.laws import reference

SIDES = {"one": (pl, lightning_fedscale), "other": (twin_pl, twin)}


def module_of(package: Any) -> Any:
    class Net(package.LightningModule):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 4))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    return Net()


def train(side: str, rounds: int = 3, ckpt_path: Any = None, **options: Any) -> Any:
    """Train on one side and return the Trainer; its checkpoint is ``{side}.ckpt``."""
    package, ours = SIDES[side]
    settings = {"executor": "sequential", "client_optimizer": "keep", "partitioner": DirichletPartitioner(5, alpha=0.5)}
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=ours.FederatedStrategy(**{**settings, **options}, clients_per_round=3),
        callbacks=[package.callbacks.EarlyStopping("round/loss", patience=99)],
    )
    data = DataLoader(reference.dataset(), batch_size=8, shuffle=True)
    trainer.fit(module_of(package), data, DataLoader(reference.dataset(40), batch_size=8), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{side}.ckpt")
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.lightning_module.state_dict().items()}


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_both_sides_train_the_same_model(executor: str) -> None:
    one, other = (train(side, executor=executor) for side in SIDES)
    assert isinstance(other.strategy.last_round, lightning_fedscale.RoundRecord)
    assert reference.difference(weights(one), weights(other)) == 0.0
    for name in ("round/loss", "round/delta_norm", "train_loss_epoch", "val_loss"):
        assert one.callback_metrics[name] == other.callback_metrics[name], name


@pytest.mark.parametrize(("first", "then"), [("one", "other"), ("other", "one")])
def test_a_run_goes_on_on_the_other_side(first: str, then: str) -> None:
    whole = weights(train(first, rounds=4))
    train(first, rounds=2)
    assert reference.difference(weights(train(then, rounds=4, ckpt_path=f"{first}.ckpt")), whole) == 0.0


def test_clients_own_data_say_the_same_on_either_side() -> None:
    found = []
    for package, ours in SIDES.values():
        watch = ours.callbacks.ClientMetrics()
        trainer = package.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[watch], num_sanity_val_steps=0,
            strategy=ours.FederatedStrategy(partitioner=DirichletPartitioner(5, alpha=0.5), executor="sequential"),
        )  # fmt: skip
        data = DataLoader(reference.dataset(), batch_size=8)
        trainer.fit(module_of(package), data, data)
        found.append(watch.last.values["val_loss"].tolist())
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_the_callbacks_of_the_other_side() -> None:
    probe = twin.callbacks.MaxBatchProbe(budget="64MiB", verify=False)
    phases, accounting = twin.callbacks.CriticalPhase(), twin.callbacks.ComputeAccounting(law=None)
    trainer = twin_pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=twin.FederatedStrategy(num_clients=3),
        callbacks=[probe, phases, accounting],
    )
    trainer.fit(module_of(twin_pl), DataLoader(reference.dataset(), batch_size=8, shuffle=True))
    assert probe.result.max_batch > 8
    assert phases.record is not None
    # Forward, and again for the gradients of weights and hidden layer.
    assert accounting.ledger.training_flops == pytest.approx(2 * 203 * 2 * (2 * 12 * 16 + 3 * 16 * 4))


SCRIPT = """
import sys
import pytorch_lightning as pl, torch
from lightning_fedscale.pytorch_lightning import FederatedStrategy
from pytorch_lightning.demos.boring_classes import BoringModel

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, devices = sys.argv[1], int(sys.argv[2])
    strategy = FederatedStrategy(num_clients=4, executor="sequential", start_method=method)
    trainer = pl.Trainer(accelerator="cpu", devices=devices, max_epochs=3, strategy=strategy, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = BoringModel()
    trainer.fit(module)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), f"{method}-{devices}.pt")
"""


def test_processes_started_in_any_way_train_the_same_model(tmp_path: Path) -> None:
    Path("train.py").write_text(SCRIPT)
    for method, devices in (("popen", 1), ("popen", 2), ("spawn", 2)):
        processes.run_well([["train.py", method, devices]], [processes.environment()], tmp_path)
    alone = torch.load("popen-1.pt", weights_only=True)
    for other in ("popen-2.pt", "spawn-2.pt"):
        assert reference.difference(torch.load(other, weights_only=True), alone) == 0.0


# ---- from the command line


def data_of(package: Any) -> Any:
    class Data(package.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(reference.dataset(100), batch_size=4, shuffle=True)

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(reference.dataset(40), batch_size=8)

    return Data


OneNet, OtherNet = type(module_of(pl)), type(module_of(twin_pl))
OneData, OtherData = data_of(pl), data_of(twin_pl)


def other_net(width: int) -> Any:
    return OtherNet(width)


def test_a_sweep_takes_modules_of_either_package(tmp_path: Path) -> None:
    """A class or a function: whichever makes them."""
    for module, data in (("OneNet", "OneData"), ("OtherNet", "OtherData"), ("other_net", "OtherData")):
        few = ["--sizes", "[2,4,8,16]", "--clients", "[2]", "--rates", "[1.0]", "--flops", "3e4", "--bootstrap", "0"]
        where = ["--runs", str(tmp_path / module), "--output", str(tmp_path), "--accelerator", "cpu"]
        own = ["--module", f"{__name__}.{module}", "--data", f"{__name__}.{data}", "--argument", "width"]
        assert cli.main(["sweep", *own, *few, *where]) == 0
    one, *others = (Path(tmp_path, made, "runs.csv").read_text() for made in ("OneNet", "OtherNet", "other_net"))
    assert others == [one, one]
