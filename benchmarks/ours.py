"""FederatedStrategy, with the constructor's ``executor`` and other arguments from ``options``.

Run by the referee: ``python -m benchmarks.ours TASK --weights OUT --options '{"executor": "vectorized"}'``. Options:
``executor``; ``devices`` (1); ``log``, whether the training step logs its loss (False); ``rounds_per_epoch``
(10, as one has it who validates every ten rounds); all others go to the strategy.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import models, plain
from benchmarks.contest import Contest, Task
from lightning_fedscale import FederatedStrategy, Partition


class RoundEnds(pl.Callback):
    """Tells the contest: a step of the Trainer is a round."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """A round is over."""
        self._contest.round_over()


class TaskSampler:
    """The task's cohorts."""

    def __init__(self, task: Task) -> None:
        self._cohorts = task.cohorts

    def __call__(self, *, seed: int, round: int, num_clients: int, clients_per_round: int) -> np.ndarray:
        return self._cohorts[round]


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    task, options = contest.task, dict(contest.options)
    net = plain.Net(task, log=options.pop("log", False))
    devices = options.pop("devices", 1)
    strategy = FederatedStrategy(
        clients_per_round=task.cohorts.shape[1],
        partitioner=Partition(task.indices, task.offsets),
        sampler=TaskSampler(task),
        seed=contest.seed,
        **{"rounds_per_epoch": 10, **options},
    )
    run = plain.trainer(contest, RoundEnds(contest), max_steps=len(task.cohorts), strategy=strategy, devices=devices)
    loader = DataLoader(plain.dataset(task), batch_size=task.settings["batch_size"], shuffle=True)
    run.fit(net, loader)
    contest.finish(models.weights_of(net.net), **plain.versions())


if __name__ == "__main__":
    main()
