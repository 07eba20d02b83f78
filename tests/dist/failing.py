"""A run in which something on one rank raises in its third round: ``python failing.py RANK client|data FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_fedscale import RoundRecord
from tests.dist import scenarios
from tests.laws import reference
from tests.strategies import sequential


class Breakable(Dataset[Any]):
    broken = False
    labels = scenarios.training_data().tensors[-1]

    def __init__(self) -> None:
        self._whole = scenarios.training_data()

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if self.broken:
            raise ArithmeticError(f"sample {index} has lost its data")
        return self._whole[index]


class Failing(pl.Callback):
    """Fails in the third round: as a client begins, or as the round's first batch is fetched."""

    def __init__(self, rank: int, what: str, data: Breakable, folder: Path) -> None:
        self._rank, self._what, self._data, self._folder = rank, what, data, folder

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
        if record.round == 1:
            torch.save(module.state_dict(), self._folder / f"good-{trainer.global_rank}.pt")
            self._data.broken = self._what == "data" and trainer.global_rank == self._rank

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, client: int) -> None:
        if self._what == "client" and trainer.global_step == 2 and trainer.global_rank == self._rank:
            raise ArithmeticError(f"client {client} has lost its data")

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        print(f"rank {trainer.global_rank} ends in round {trainer.global_step}: {type(exception).__name__}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, folder = Breakable(), Path(sys.argv[3])
    reference.quiet_trainer(
        devices=2,
        max_epochs=5,
        enable_checkpointing=True,
        callbacks=[Failing(int(sys.argv[1]), sys.argv[2], data, folder), OnExceptionCheckpoint(folder)],
        strategy=sequential(
            partitioner=scenarios.partitioner(), clients_per_round=4, client_optimizer="keep", rounds_per_epoch=5
        ),
    ).fit(scenarios.Module(), DataLoader(data, scenarios.BATCH, shuffle=True))
    print("unharmed", flush=True)
