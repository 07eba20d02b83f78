"""Data modules that divide their batch size by the number of ranks, as for DDP, are noticed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.lightning.train_data import division_by_ranks


class Divides(pl.LightningDataModule):
    """As in lightning-hydra-template."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size_per_device = batch_size

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.batch_size_per_device = self.hparams["batch_size"] // self.trainer.world_size

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(RandomDataset(32, 256), self.batch_size_per_device)


def noticed(owner: Any, batch_size: int, *, world_size: int = 2, devices: int = 2, accumulated: int = 1) -> str | None:
    trainer: Any = SimpleNamespace(
        world_size=world_size,
        num_devices=devices,
        accumulate_grad_batches=accumulated,
        datamodule=owner,
        lightning_module=BoringModel(),
    )
    return division_by_ranks(trainer, batch_size)


def with_hparams(**hparams: Any) -> Any:
    return SimpleNamespace(hparams=hparams)


@pytest.mark.parametrize(
    ("owner", "name", "batch_size", "ranks"),
    [
        (Divides(64), "hparams.batch_size=64", 32, {}),
        (Divides(64), "hparams.batch_size=64", 16, {"world_size": 4}),
        (Divides(65), "hparams.batch_size=65", 32, {}),
        (Divides(65), "hparams.batch_size=65", 33, {}),
        (SimpleNamespace(train_batch_size=96), "train_batch_size=96", 32, {"world_size": 3, "devices": 3}),
        (SimpleNamespace(total_bs=64, val_bs=8), "total_bs=64", 32, {}),
        (with_hparams(data={"batch_size": 64}), "hparams.data.batch_size=64", 32, {}),
        (with_hparams(global_batch_size=64), "hparams.global_batch_size=64", 8, {"accumulated": 4}),
        (with_hparams(batch_size=64), "hparams.batch_size=64", 32, {"world_size": 8}),  # by the devices of a node
        (SimpleNamespace(hparams=OmegaConf.create({"bs": "???", "batch_size": 64})), "batch_size=64", 32, {}),
    ],
)
def test_a_division_is_named_with_both_numbers(owner: Any, name: str, batch_size: int, ranks: dict[str, int]) -> None:
    said = noticed(owner, batch_size, **ranks)
    assert said is not None
    assert said.startswith(type(owner).__name__)
    for part in (name, f"have {batch_size} samples", "do not divide"):
        assert part in said


@pytest.mark.parametrize(
    ("owner", "batch_size", "ranks"),
    [
        (Divides(64), 64, {}),
        (Divides(64), 64, {"world_size": 1, "devices": 1}),
        (Divides(64), 32, {"world_size": 1, "devices": 1, "accumulated": 2}),
        (Divides(1), 1, {}),
        (SimpleNamespace(batch_size=32, val_batch_size=64, eval_bs=64, num_batches=64), 32, {}),
        (with_hparams(batch_size=32, test={"batch_size": 64}, use_bs=True), 32, {}),
        (None, 32, {}),
    ],
)
def test_nothing_is_said_where_nothing_was_divided(owner: Any, batch_size: int, ranks: dict[str, int]) -> None:
    assert noticed(owner, batch_size, **ranks) is None


def test_it_is_said_once_in_a_fit(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    trainer = pl.Trainer(
        strategy=FederatedStrategy(num_clients=4),
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    monkeypatch.setattr(pl.Trainer, "world_size", 2)  # what the project sees
    trainer.fit(BoringModel(), datamodule=Divides(64))
    said = [str(each.message) for each in recwarn if "Divides: hparams.batch_size=64" in str(each.message)]
    assert len(said) == 1
