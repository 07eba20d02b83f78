"""Clients' own models on their own data: ``python own_data.py FOLDER DEVICES ROUNDS FROM TO [FAILS]``.

The aggregator has a state.
Goes on from ``FROM.ckpt`` in the folder, or begins if that is ``-``, and leaves ``TO.ckpt`` and what the last
evaluations found in ``TO.pt``. With ``FAILS``, validation raises on rank 1 in the second round; ``TO-RANK.txt`` says
what that led to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fedscale.aggregators import centered_clipping
from lightning_fedscale.callbacks import ClientMetrics
from lightning_fedscale.local_rules import Ditto
from tests.dist import scenarios
from tests.laws import reference
from tests.strategies import sequential


class Module(scenarios.Module):
    fails = False

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.fails and self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            raise KeyError("lost")


def main(folder: Path, devices: int, rounds: int, before: str, after: str, fails: bool) -> None:
    torch.set_num_threads(1)
    watches = [ClientMetrics(personal=True), ClientMetrics(every_n_rounds=3, clients=4)]
    strategy = sequential(
        partitioner=scenarios.partitioner(),
        clients_per_round=4,
        personal=Ditto(0.5),
        aggregator=centered_clipping(0.3, iterations=2),
    )
    trainer = reference.quiet_trainer(
        max_epochs=rounds, devices=devices, limit_val_batches=0, strategy=strategy, callbacks=watches
    )
    module = Module()
    module.fails = fails
    data = DataLoader(scenarios.training_data(), scenarios.BATCH, shuffle=True), DataLoader(scenarios.held_out(), 8)
    try:
        trainer.fit(module, *data, ckpt_path=None if before == "-" else folder / f"{before}.ckpt")
    except (KeyError, RuntimeError) as error:
        (folder / f"{after}-{trainer.global_rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)  # at once, so that no rank waits for the other's end
    trainer.save_checkpoint(folder / f"{after}.ckpt")
    if trainer.global_rank == 0:
        found = [watch.last.state_dict() for watch in watches if watch.last is not None]
        torch.save([*found, module.state_dict()], folder / f"{after}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], fails=len(sys.argv) > 6)
