"""FedLab's FedAvg in its `StandalonePipeline`, as in its standalone examples."""

from __future__ import annotations

from importlib.metadata import version

import torch
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks import models
from benchmarks.contest import Contest, Task


class Clients:
    """What FedLab asks of a partitioned dataset."""

    def __init__(self, task: Task) -> None:
        dataset = TensorDataset(torch.from_numpy(task.inputs), torch.from_numpy(task.labels))
        self._clients = {client: Subset(dataset, task.client(client).tolist()) for client in set(task.cohorts.flat)}

    def get_dataloader(self, id: int, batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
        """As in its own datasets, shuffled."""
        return DataLoader(self._clients[id], batch_size=batch_size, shuffle=True)


class Server(SyncServerHandler):
    """With the task's cohorts."""

    cohorts: list[list[int]]

    @property
    def num_clients_per_round(self) -> int:
        """Exactly, and not as a ratio."""
        return len(self.cohorts[0])

    def sample_clients(self) -> list[int]:
        """The round's clients."""
        return self.cohorts[self.round]


class Pipeline(StandalonePipeline):
    """Its evaluation is the end of a round."""

    contest: Contest

    def evaluate(self) -> None:
        """A round is over."""
        self.contest.round_over()


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    task = contest.task
    torch.manual_seed(contest.seed)
    trainer = SGDSerialClientTrainer(models.load(models.build(task.settings), task.initial), task.num_clients)
    trainer.setup_dataset(Clients(task))
    trainer.setup_optim(1, task.settings["batch_size"], task.settings["lr"])
    handler = Server(models.load(models.build(task.settings), task.initial), len(task.cohorts), 1.0)
    handler.cohorts = task.cohorts.tolist()
    pipeline = Pipeline(handler, trainer)
    pipeline.contest = contest
    pipeline.main()
    contest.finish(models.weights_of(handler.model), fedlab=version("fedlab"), torch=torch.__version__)


if __name__ == "__main__":
    main()
