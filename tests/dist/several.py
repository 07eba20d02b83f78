"""Several Trainers of one script with one strategy object, on any number of processes, started in any way.

``python several.py FOLDER START_METHOD DEVICES REPETITIONS``
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from torch import Tensor, nn

from lightning_fedscale import callbacks
from tests.laws import reference
from tests.strategies import sequential


class Module(reference.Classifier):
    """Draws its head within the fit, where several processes may be at different places of the global generators."""

    def configure_model(self) -> None:
        if len(self.net) == 4:
            self.net.append(nn.Linear(4, 4))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])


class Clock(pl.Callback):
    """Every rank's goes at a pace of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.validated: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for loop in (evaluation_loop, fit_loop, training_epoch_loop):
            loop.time = SimpleNamespace(monotonic=lambda: self.now)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.now += 1.0 / (1 + 3 * trainer.global_rank)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)


def given() -> list[pl.Callback]:
    """One of each, for other processes to get by pickling."""
    return [
        callbacks.CriticalPhase(),
        callbacks.ComputeAccounting(),
        callbacks.MaxBatchProbe(budget="1GiB", apply=False),
        callbacks.ServerEMA(0.5),
        callbacks.ClientMetrics(dataloaders=loader(24)),
    ]


def loader(samples: int) -> Any:
    return reference.loader(reference.dataset(samples), batch_size=4, shuffle=False)


def main(folder: Path, start_method: str, devices: int, repetitions: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(7, verbose=False)
    strategy = sequential(num_clients=5, client_optimizer="keep", start_method=start_method)
    found: dict[str, Any] = {}
    watched = given()
    for repetition in range(repetitions):
        module, clock = Module(), Clock()
        if start_method != "popen":  # what other processes add to the model does not come back
            module.configure_model()
        trainer = reference.quiet_trainer(
            strategy=strategy,
            devices=devices,
            max_epochs=7,
            val_check_interval={"seconds": 2},
            callbacks=[*watched, clock],
        )
        trainer.fit(module, loader(40), loader(8))
        found[f"fit {repetition}"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found[f"validated {repetition}"] = clock.validated
        found[f"logged {repetition}"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if start_method == "spawn":  # whose processes take long to start
            break
        again = reference.quiet_trainer(strategy=strategy, devices=devices)
        outputs = again.validate(module, loader(8), verbose=False)
        found[f"loss {repetition}"] = outputs[0]["val_loss"]
    found["drawn"] = torch.rand(3)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(found, folder / f"several-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
