"""A run in which one client on one rank raises in its third round: ``python failing.py RANK``."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy
from tests.dist import scenarios
from tests.laws import reference


class Failing(pl.Callback):
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, client: int) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self._rank:
            raise ArithmeticError(f"client {client} has lost its data")

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        print(f"rank {trainer.global_rank} ends in round {trainer.global_step}: {type(exception).__name__}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    reference.quiet_trainer(
        devices=2,
        max_epochs=5,
        callbacks=[Failing(int(sys.argv[1]))],
        strategy=FederatedStrategy(partitioner=scenarios.partitioner(), clients_per_round=4),
    ).fit(scenarios.Module(), DataLoader(scenarios.training_data(), scenarios.BATCH, shuffle=True))
    print("unharmed", flush=True)
