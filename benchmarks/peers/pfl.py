"""Apple's pfl: `FederatedAveraging.run` on its `SimulatedBackend`, as in its PyTorch tutorial."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from types import MethodType
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks import models
from benchmarks.contest import Contest, Task


class RoundEnds(TrainingProcessCallback):
    """Tells the contest."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """A round is over; go on."""
        self._contest.round_over()
        return False, Metrics()


def add_loss_and_metrics(model: torch.nn.Module) -> torch.nn.Module:
    """What pfl asks of a torch module."""

    def loss(self: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return models.loss(self(inputs), labels)

    def metrics(self: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"loss": Weighted(float(loss(self, inputs, labels)) * len(labels), len(labels))}

    model.loss, model.metrics = MethodType(loss, model), MethodType(metrics, model)
    return model


def federated_dataset(task: Task, seed: int) -> FederatedDataset:
    """The task's clients in the order of its cohorts, each with its data in a new order."""
    inputs, labels = torch.from_numpy(task.inputs), torch.from_numpy(task.labels)
    users: Iterator[int] = iter(task.cohorts.reshape(-1).tolist())
    rng = np.random.default_rng(seed)

    def make_dataset(user: int) -> Dataset:
        order = rng.permutation(task.client(user))
        return Dataset([inputs[order], labels[order]], user_id=str(user))

    return FederatedDataset(make_dataset, lambda: next(users))


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    task = contest.task
    np.random.seed(contest.seed)
    network = add_loss_and_metrics(models.load(models.build(task.settings), task.initial))
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    rounds, cohort_size = task.cohorts.shape
    dataset = federated_dataset(task, contest.seed)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=cohort_size,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.settings["lr"], local_batch_size=task.settings["batch_size"]
        ),
        callbacks=[RoundEnds(contest)],
        send_metrics_to_platform=False,
    )  # fmt: skip
    contest.finish(models.weights_of(network), pfl=version("pfl"), torch=torch.__version__)


if __name__ == "__main__":
    main()
