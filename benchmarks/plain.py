"""The plain Trainer on as many samples: what Lightning itself costs. Nothing here is federated.

Run by the referee: ``python -m benchmarks.plain TASK --weights OUT``. It trains on the very batches of the rounds, one
after the other, so that its rounds are as long as everybody's; its accuracy is that of central training.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models
from benchmarks.contest import Contest, Task


class Net(pl.LightningModule):
    """A task's model with the plainest training step."""

    def __init__(self, task: Task, log: bool = False) -> None:
        super().__init__()
        self.net = models.load(models.build(task.settings), task.initial)
        self.lr: float = task.settings["lr"]
        self.logs = log

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, logged if asked for."""
        loss = models.loss(self.net(batch[0]), batch[1])
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, as FedAvg has it."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches_of_rounds(task: Task, seed: int) -> list[list[list[int]]]:
    """For every round the sample indices of its batches, all clients of the cohort one after the other."""
    rng = np.random.default_rng(seed)
    size = task.settings["batch_size"]
    orders = [[rng.permutation(task.client(client)).tolist() for client in cohort] for cohort in task.cohorts]
    return [[order[i : i + size] for order in of_round for i in range(0, len(order), size)] for of_round in orders]


class RoundEnds(pl.Callback):
    """Tells the contest when as many batches are over as a round has."""

    def __init__(self, contest: Contest, batches: list[int]) -> None:
        self._contest = contest
        self._ends = set(np.cumsum(batches).tolist())

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """A local batch is over."""
        self._contest.begun()
        if trainer.global_step in self._ends:
            self._contest.round_over()


def trainer(contest: Contest, callback: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer without logger, checkpoints, progress bar: no other contender has them."""
    accelerator = "gpu" if contest.task.settings["device"] == "cuda" else "cpu"
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "max_epochs": -1, "callbacks": [callback]}
    extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(**{**settings, **dict.fromkeys(extras, False), **options})


def dataset(task: Task) -> TensorDataset:
    """The training samples of all clients."""
    return TensorDataset(torch.from_numpy(task.inputs), torch.from_numpy(task.labels))


def versions() -> dict[str, str]:
    """What ran."""
    return {"torch": torch.__version__, "lightning": pl.__version__}


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    net, rounds = Net(contest.task), batches_of_rounds(contest.task, contest.seed)
    batches = [batch for batches in rounds for batch in batches]
    # All rounds are one epoch: the Trainer at its quickest.
    run = trainer(contest, RoundEnds(contest, [len(batches) for batches in rounds]), max_epochs=1)
    run.fit(net, DataLoader(dataset(contest.task), batch_sampler=batches))
    contest.finish(models.weights_of(net.net), **versions())


if __name__ == "__main__":
    main()
