"""FedAvg written by hand in plain torch, in three ways: ``options["loop"]`` is "index", "flat" or "loaders".

Run by the referee: ``python -m benchmarks.floors TASK --weights OUT --options '{"loop": "index"}'``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks import models
from benchmarks.contest import Contest


class Setting:
    """What the three loops share: tensors on the device, clients, batches, the model with its initial weights."""

    def __init__(self, contest: Contest) -> None:
        task, device = contest.task, contest.task.settings["device"]
        self.lr: float = task.settings["lr"]
        self.batch_size: int = task.settings["batch_size"]
        self.inputs = torch.from_numpy(task.inputs).to(device)
        self.labels = torch.from_numpy(task.labels).to(device)
        self.device = device
        self.cohorts: list[list[int]] = task.cohorts.tolist()
        self.clients = {
            client: torch.from_numpy(task.client(client)).to(device) for client in {c for r in self.cohorts for c in r}
        }
        self.model = models.load(models.build(task.settings), task.initial).to(device)
        self.order = torch.Generator(device).manual_seed(contest.seed)

    def batches(self, client: int) -> Iterator[Tensor]:
        """A client's samples in a new random order, in batches."""
        samples = self.clients[client]
        order = torch.randperm(len(samples), generator=self.order, device=self.device)
        return iter(samples[order].split(self.batch_size))

    def round_over(self, contest: Contest) -> None:
        """The round is over once the device has done its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        contest.round_over()


def index(contest: Contest, setting: Setting) -> None:
    """The loop that one writes: index tensors, no DataLoader."""
    inputs, labels = setting.inputs, setting.labels
    fed_avg(contest, setting, lambda client: ((inputs[batch], labels[batch]) for batch in setting.batches(client)))


def loaders(contest: Contest, setting: Setting) -> None:
    """The same with a DataLoader for every client, made once."""
    dataset = TensorDataset(setting.inputs, setting.labels)
    clients = {
        client: DataLoader(Subset(dataset, samples.tolist()), setting.batch_size, shuffle=True, generator=setting.order)
        for client, samples in setting.clients.items()
    }
    fed_avg(contest, setting, lambda client: clients[client])


def fed_avg(contest: Contest, setting: Setting, batches_of: Callable[[int], Iterable[Sequence[Tensor]]]) -> None:
    """Every client starts from the global model with a fresh optimizer; the server takes the weighted mean."""
    model = setting.model
    server = {name: value.clone() for name, value in model.state_dict().items()}
    for cohort in setting.cohorts:
        total = {name: torch.zeros_like(value) for name, value in server.items()}
        samples = sum(len(setting.clients[client]) for client in cohort)
        for client in cohort:
            model.load_state_dict(server)
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
            for inputs, labels in batches_of(client):
                loss = models.loss(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            share = len(setting.clients[client]) / samples
            for name, value in model.state_dict().items():
                total[name] += share * value
        server = total
        setting.round_over(contest)
    model.load_state_dict(server)


def flat(contest: Contest, setting: Setting) -> None:
    """Tuned: parameters and gradients are views of two vectors, so that SGD is one addition and averaging another."""
    model, lr = setting.model, setting.lr
    weights, gradients = as_vectors(model)
    server, total = weights.clone(), torch.zeros_like(weights)
    for cohort in setting.cohorts:
        total.zero_()
        samples = sum(len(setting.clients[client]) for client in cohort)
        for client in cohort:
            weights.copy_(server)
            for batch in setting.batches(client):
                gradients.zero_()
                models.loss(model(setting.inputs[batch]), setting.labels[batch]).backward()
                weights.add_(gradients, alpha=-lr)
            total.add_(weights, alpha=len(setting.clients[client]) / samples)
        server.copy_(total)
        setting.round_over(contest)
    weights.copy_(server)


def as_vectors(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Lay a model's parameters and gradients into one vector each; returns both."""
    parameters = list(model.parameters())
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    gradients = torch.zeros_like(weights)
    start = 0
    for parameter in parameters:
        part = slice(start, start := start + parameter.numel())
        parameter.data = weights[part].view_as(parameter)
        parameter.grad = gradients[part].view_as(parameter)
    return weights, gradients


def main() -> None:
    torch.set_num_threads(1)
    contest = Contest()
    setting = Setting(contest)
    {"index": index, "flat": flat, "loaders": loaders}[contest.options["loop"]](contest, setting)
    contest.finish(models.weights_of(setting.model), torch=torch.__version__)


if __name__ == "__main__":
    main()
