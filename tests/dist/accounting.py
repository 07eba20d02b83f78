"""A run that is killed and goes on: ``python accounting.py FOLDER RANKS DIE_AFTER STRATEGY`` trains one stretch.

``DIE_AFTER`` is the batch, counted from the stretch's beginning, after which all ranks end by SIGKILL; 0 for never. At
the end each rank saves its ledger. ``STRATEGY`` is "plain", "federated", or "besides" for clients that compute more
than their training.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.local_rules import scaffold
from tests.dist.phases import Module
from tests.laws import reference
from tests.strategies import sequential

RANK = int(os.environ.get("LOCAL_RANK", 0))
BATCH, EPOCHS, SAMPLES, HELD_OUT = 16, 4, 160, 48


class Dies(pl.Callback):
    def __init__(self, after: int) -> None:
        self._left = after

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Evaluated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


def train(folder: Path, ranks: int, die_after: int, kind: str) -> ComputeAccounting:
    strategy: Any = "ddp" if ranks > 1 else "auto"
    if kind != "plain":
        more: dict[str, Any] = {"local_rule": scaffold("I"), "compressor": "qsgd"} if kind == "besides" else {}
        strategy = sequential(num_clients=5, local_epochs=1, **more)
    accounting = ComputeAccounting(law="Chinchilla")
    # At the end of epochs: within them, Lightning itself trains on the batch before a checkpoint once more.
    checkpoint = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = reference.quiet_trainer(
        strategy=strategy, devices=ranks, max_epochs=EPOCHS, accumulate_grad_batches=2,
        callbacks=[Dies(die_after), accounting, checkpoint], enable_checkpointing=True,
        use_distributed_sampler=False, log_every_n_steps=3, num_sanity_val_steps=0,
    )  # fmt: skip
    training, held_out = reference.dataset(SAMPLES, torch.float64), reference.dataset(HELD_OUT, torch.float64)
    shares: list[DistributedSampler[tuple[Tensor, ...]]] = [
        DistributedSampler(data, ranks, RANK, shuffle=False) for data in (training, held_out)
    ]
    train_loader = (
        DataLoader(training, BATCH // ranks, sampler=shares[0]) if kind == "plain" else DataLoader(training, BATCH)
    )
    val_loader = DataLoader(held_out, BATCH // ranks, sampler=shares[1])
    last = folder / "last.ckpt"
    ckpt_path = str(last) if last.exists() else None
    trainer.fit(Evaluated(), train_loader, val_loader, ckpt_path=ckpt_path, weights_only=True)
    return accounting


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    found = train(home, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    torch.save({**found.ledger.state_dict(), "seconds": 0.0, "energy": 0.0, "meters": 0.0}, home / f"{RANK}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
