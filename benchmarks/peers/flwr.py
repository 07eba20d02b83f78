"""Flower's simulation on Ray: a `ServerApp` with its FedAvg and a `ClientApp`, through `run_simulation`.

`run_simulation` is its Python entry; the command `flwr run`, which its documentation prefers by now, starts the server
where no one can give it turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks import models
from benchmarks.contest import Contest, Task

client_app = ClientApp()


@lru_cache(maxsize=1)
def load(path: str) -> tuple[Task, TensorDataset]:
    """The task, once for every process."""
    torch.set_num_threads(1)
    task = Task.load(path)
    return task, TensorDataset(torch.from_numpy(task.inputs), torch.from_numpy(task.labels))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round, as in the PyTorch quickstart."""
    config = message.content["config"]
    task, dataset = load(str(config["task"]))
    samples = task.client(int(config["client"])).tolist()
    loader = DataLoader(Subset(dataset, samples), batch_size=task.settings["batch_size"], shuffle=True)
    model = models.build(task.settings)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=task.settings["lr"])
    for inputs, labels in loader:
        loss = models.loss(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(samples)})}
    return Message(content=RecordDict(content), reply_to=message)


class TaskFedAvg(FedAvg):
    """FedAvg with the task's cohorts: as many nodes as are needed, each told which client it is."""

    def __init__(self, contest: Contest, path: str) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=contest.task.num_clients)
        self._contest, self._path = contest, path

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client of the round."""
        cohort = self._contest.task.cohorts[server_round - 1].tolist()
        nodes = random.sample(list(grid.get_node_ids()), len(cohort))
        for client, node in zip(cohort, nodes, strict=True):
            told = ConfigRecord({"server-round": server_round, "client": client, "task": self._path})
            content = RecordDict({"arrays": arrays, "config": told})
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """FedAvg's own; then the round is over.

        Raises:
            RuntimeError: if a client has failed, which Flower itself passes over.
        """
        replies = list(replies)
        if failed := [reply for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[0].error.reason}")
        aggregated = super().aggregate_train(server_round, replies)
        self._contest.round_over()
        return aggregated


def wait_for_nodes(grid: Grid, nodes: int) -> None:
    """Until all of them are registered."""
    while len(list(grid.get_node_ids())) < nodes:
        pass


def main() -> None:
    contest = Contest()
    task = contest.task
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        wait_for_nodes(grid, task.num_clients)
        model = models.load(models.build(task.settings), task.initial)
        strategy = TaskFedAvg(contest, contest.path)
        result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=len(task.cohorts))
        weights = {name: value.numpy() for name, value in result.arrays.to_torch_state_dict().items()}
        contest.finish(weights, flwr=version("flwr"), ray=version("ray"), torch=torch.__version__)

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(
        server_app, client_app, task.num_clients,
        backend_config={"init_args": {"num_cpus": 1}, "client_resources": resources},
    )  # fmt: skip


if __name__ == "__main__":
    # By its name, so that the processes of the clients can import what is here.
    from benchmarks.peers import flwr

    flwr.main()
