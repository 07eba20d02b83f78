"""blazefl's FedAvg in its single-threaded mode, the one for one core, with the pipeline of its quickstart."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
from blazefl.core import FilteredDataset
from torch.utils.data import DataLoader

from benchmarks import models
from benchmarks.contest import Contest, Task


class Clients:
    """A `PartitionedDataset`: the task's clients."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._inputs = list(torch.from_numpy(task.inputs))
        self._labels = list(torch.from_numpy(task.labels))
        self._datasets: dict[int, FilteredDataset] = {}

    def get_dataset(self, type_: str, cid: int) -> FilteredDataset:
        """A client's samples."""
        if cid not in self._datasets:
            self._datasets[cid] = FilteredDataset(self._task.client(cid).tolist(), self._inputs, self._labels)
        return self._datasets[cid]

    def get_dataloader(self, type_: str, cid: int, batch_size: int, generator: Any = None) -> DataLoader[Any]:
        """As in the quickstart."""
        return DataLoader(self.get_dataset(type_, cid), batch_size=batch_size, shuffle=True, generator=generator)


class TaskModel:
    """A `ModelSelector` with one model."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def select_model(self, model_name: str) -> torch.nn.Module:
        """With the initial weights."""
        return models.load(models.build(self._task.settings), self._task.initial)


class Server(FedAvgBaseServerHandler):
    """With the task's cohorts."""

    cohorts: list[list[int]]

    def sample_clients(self) -> list[int]:
        """The round's clients."""
        return self.cohorts[self.round]


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    task, dataset, model = contest.task, Clients(contest.task), TaskModel(contest.task)
    rounds, cohort_size = task.cohorts.shape
    batch_size = task.settings["batch_size"]
    common: dict[str, Any] = {
        "model_selector": model, "model_name": "task", "dataset": dataset, "device": "cpu", "seed": contest.seed,
        "num_clients": task.num_clients, "batch_size": batch_size,
    }  # fmt: skip
    handler = Server(global_round=rounds, sample_ratio=1.0, **common)
    handler.cohorts = task.cohorts.tolist()
    handler.num_clients_per_round = cohort_size
    trainer = FedAvgBaseClientTrainer(epochs=1, lr=task.settings["lr"], **common)
    while not handler.if_stop():
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        for package in trainer.uplink_package():
            handler.load(package)
        contest.round_over()
    contest.finish(models.weights_of(handler.model), blazefl=version("blazefl"), torch=torch.__version__)


if __name__ == "__main__":
    main()
