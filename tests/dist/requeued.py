"""A task of a SLURM job: ``python requeued.py FOLDER DEVICES NODES [HEARS]``.

Without a checkpoint it trains until SLURM's signal, which the tasks in HEARS get in the middle of round 2, has led to
one, and dies. With one it goes on from there to the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.types import RoundRecord
from tests.dist import scenarios
from tests.laws import reference
from tests.strategies import sequential

ROUNDS = 6


class Preempted(pl.Callback):
    """SLURM's signal comes in the second of the rank's clients; the end, once there is a checkpoint."""

    def __init__(self, hears: list[int], folder: Path) -> None:
        self._hears, self._folder = hears, folder
        self._clients = 0

    def on_round_start(self, *_: Any) -> None:
        self._clients = 0

    def on_client_start(self, *_: Any) -> None:
        self._clients += 1

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if (trainer.global_step, self._clients) == (2, 2) and trainer.global_rank in self._hears:
            self._hears.remove(trainer.global_rank)
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
        print(f"round {record.round} ended", flush=True)

    def on_train_batch_start(self, *_: Any) -> None:
        if (self._folder / "hpc_ckpt_1.ckpt").exists():
            print("killed by SLURM", flush=True)
            os._exit(0)


def main(folder: Path, devices: int, nodes: int, hears: list[int]) -> None:
    torch.set_num_threads(1)
    resumed = (folder / "hpc_ckpt_1.ckpt").exists()
    trainer = reference.quiet_trainer(
        devices=devices,
        num_nodes=nodes,
        max_epochs=ROUNDS,
        default_root_dir=folder,
        callbacks=[ComputeAccounting(law="Chinchilla"), *([] if resumed else [Preempted(hears, folder)])],
        strategy=sequential(
            partitioner=scenarios.partitioner(), clients_per_round=5, local_steps=3, client_optimizer="keep"
        ),
    )
    module = scenarios.Module("adam")
    trainer.fit(module, DataLoader(scenarios.training_data(), scenarios.BATCH, shuffle=True))
    found = {"weights": module.state_dict(), "rounds": trainer.global_step, "resumed": resumed}
    torch.save(found, folder / f"end-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(rank) for rank in sys.argv[4:]])
