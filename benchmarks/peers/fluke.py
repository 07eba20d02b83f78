"""fluke's `FedAVG.run`, as in its tutorial for use as a Python API, with its evaluations off."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver

from benchmarks import models
from benchmarks.contest import Contest, Task


class TaskServer(Server):
    """With the task's cohorts."""

    cohorts: Any

    def get_eligible_clients(self, eligible_perc: float) -> Any:
        """The round's clients."""
        return [self.clients[client] for client in next(self.cohorts)]


class TaskFedAVG(FedAVG):
    """FedAVG with that server."""

    def get_server_class(self) -> type[Server]:
        """The server that knows the cohorts."""
        return TaskServer


class RoundEnds(FederationObserver):
    """Tells the contest."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def end_round(self, round: int) -> None:
        """A round is over."""
        self._contest.round_over()


def clients_of(task: Task) -> list[FastDataLoader]:
    """Its own loader for every client."""
    inputs, labels = torch.from_numpy(task.inputs), torch.from_numpy(task.labels)
    return [
        FastDataLoader(
            inputs[task.client(client)], labels[task.client(client)], num_labels=10, shuffle=True,
            batch_size=task.settings["batch_size"], skip_singleton=False,
        )
        for client in range(task.num_clients)
    ]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    task = contest.task
    environment = FlukeENV()
    environment.set_seed(contest.seed)
    environment.set_device("cpu")
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    loaders = clients_of(task)
    data = DummyDataContainer(loaders, [None] * len(loaders), None, num_classes=10)
    model = models.load(models.build(task.settings), task.initial)
    hyper_parameters = DDict(
        client=DDict(
            batch_size=task.settings["batch_size"], local_epochs=1, loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=task.settings["lr"]), scheduler=DDict(name="StepLR", step_size=1, gamma=1),
        ),
        server=DDict(weighted=True),
        model=model,
    )  # fmt: skip
    algorithm = TaskFedAVG(task.num_clients, DataSplitter(data), hyper_parameters)
    algorithm.server.cohorts = iter(task.cohorts.tolist())
    algorithm.set_callbacks([RoundEnds(contest)])
    rounds, cohort_size = task.cohorts.shape
    algorithm.run(rounds, cohort_size / task.num_clients)
    contest.finish(models.weights_of(algorithm.server.model), fluke=version("fluke-fl"), torch=torch.__version__)


if __name__ == "__main__":
    main()
