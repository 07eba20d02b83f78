"""Federated methods written by hand from their papers, and nothing of the strategy's own loops.

Only the definitions of randomness (who is sampled, in which order a client reads) are the package's. Everything is in
float64 and plain SGD, on dictionaries of tensors: ``x`` is the server's model, ``y`` a client's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_fedscale import Partition
from lightning_fedscale.core.plan import pass_order
from lightning_fedscale.samplers import uniform

Model: TypeAlias = dict[str, Tensor]
BATCH = 8
LR = 0.1


class Net(pl.LightningModule):
    """Two layers, of which the second may stay with the clients."""

    def __init__(self, lr: float = LR, momentum: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 4)
        self.double()
        self._options = {"lr": lr, "momentum": momentum}

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(torch.tanh(self.body(inputs))), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self._options)  # type: ignore[arg-type]


class World:
    """The data, who holds what, and what is drawn."""

    def __init__(self, data: TensorDataset, partition: Partition, clients_per_round: int, epochs: int = 1) -> None:
        self._data = data
        self._partition = partition
        self._cohort = clients_per_round
        self._epochs = epochs
        self._net = Net()
        self.start: Model = {name: value.clone() for name, value in self._net.state_dict().items()}
        self.num_clients = len(partition)

    def cohort(self, round: int) -> list[int]:
        found = uniform(seed=0, round=round, num_clients=self.num_clients, clients_per_round=self._cohort)
        return [int(client) for client in found]

    def held(self, client: int) -> int:
        return len(self._partition.client(client))

    def batches(self, client: int, round: int) -> list[list[Tensor]]:
        found = []
        for number in range(round * self._epochs, (round + 1) * self._epochs):
            order = pass_order(self._partition.client(client), shuffle=True, seed=0, client=client, number=number)
            for i in range(0, len(order), BATCH):
                found.append([tensor[order[i : i + BATCH]] for tensor in self._data.tensors])
        return found

    def gradient(self, y: Model, batch: list[Tensor]) -> Model:
        self._net.load_state_dict(y)
        self._net.zero_grad()
        self._net.loss(*batch).backward()
        return {name: parameter.grad.clone() for name, parameter in self._net.named_parameters()}  # type: ignore[union-attr]

    def local_sgd(
        self,
        start: Model,
        client: int,
        round: int,
        extra: Callable[[Model], Model] | None = None,
        momentum: float = 0.0,
        lr: float = LR,
        accumulate: int = 1,
    ) -> tuple[Model, int]:
        """``y <- y - lr (momentum buffer of g(y) + extra(y))``; the model and the number of steps.

        With ``accumulate``, ``g(y)`` is the sum over so many batches, each divided by that number.
        """
        y = {name: value.clone() for name, value in start.items()}
        buffer: Model = {}
        batches = self.batches(client, round)
        windows = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
        for window in windows:
            gradient = times(len(window) / accumulate, mean([self.gradient(y, batch) for batch in window]))
            if extra is not None:
                gradient = plus(gradient, extra(y))
            buffer = plus(times(momentum, buffer), gradient) if buffer and momentum else gradient
            y = minus(y, times(lr, buffer))
        return y, len(windows)


def plus(left: Model, right: Model) -> Model:
    return {name: left[name] + right[name] for name in left}


def minus(left: Model, right: Model) -> Model:
    return {name: left[name] - right[name] for name in left}


def times(factor: float, model: Model) -> Model:
    return {name: factor * value for name, value in model.items()}


def mean(models: list[Model], weights: list[float] | None = None) -> Model:
    weights = [1.0] * len(models) if weights is None else weights
    total = times(weights[0], models[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total = plus(total, times(weight, model))
    return times(1.0 / sum(weights), total)


def zeros(like: Model) -> Model:
    return times(0.0, like)


# ---- the methods


def fed_prox(world: World, rounds: int, mu: float) -> Model:
    """Li et al. 2018 (1812.06127): clients minimise ``f_k(y) + mu/2 |y - x|^2``; weighted mean."""
    x = world.start
    for round in range(rounds):
        cohort = world.cohort(round)
        ys = [world.local_sgd(x, k, round, lambda y, x=x: times(mu, minus(y, x)))[0] for k in cohort]  # type: ignore[misc]
        x = mean(ys, [world.held(k) for k in cohort])
    return x


def scaffold(world: World, rounds: int, option: str, accumulate: int = 1) -> Model:
    """Karimireddy et al. 2019 (1910.06378), algorithm 1, with a global step of 1."""
    x, c = world.start, zeros(world.start)
    controls = {k: zeros(x) for k in range(world.num_clients)}
    for round in range(rounds):
        cohort = world.cohort(round)
        ys, changes = [], []
        for k in cohort:
            y, steps = world.local_sgd(x, k, round, lambda y, k=k, c=c: minus(c, controls[k]), accumulate=accumulate)  # type: ignore[misc]
            if option == "I":
                batches = world.batches(k, round)
                found = [world.gradient(x, batch) for batch in batches]
                new = mean(found, [len(batch[1]) for batch in batches])
            else:
                new = plus(minus(controls[k], c), times(1.0 / (steps * LR), minus(x, y)))
            ys.append(y)
            changes.append(minus(new, controls[k]))
            controls[k] = new
        x = mean(ys)
        c = plus(c, times(len(cohort) / world.num_clients, mean(changes)))
    return x


def fed_dyn(world: World, rounds: int, alpha: float, sent: Callable[[Model], Model] = lambda moved: moved) -> Model:
    """Acar et al. 2021 (2111.04263), algorithm 1; ``sent`` is what the server gets to see of ``y - x``."""
    x, h = world.start, zeros(world.start)
    gradients = {k: zeros(x) for k in range(world.num_clients)}
    for round in range(rounds):
        cohort, ys = world.cohort(round), []
        for k in cohort:

            def extra(y: Model, k: int = k, x: Model = x) -> Model:
                return plus(times(-1.0, gradients[k]), times(alpha, minus(y, x)))

            y, _ = world.local_sgd(x, k, round, extra)
            gradients[k] = minus(gradients[k], times(alpha, minus(y, x)))
            ys.append(plus(x, sent(minus(y, x))))
        moved = [minus(y, x) for y in ys]
        h = minus(h, times(alpha * len(cohort) / world.num_clients, mean(moved)))
        x = minus(mean(ys), times(1.0 / alpha, h))
    return x


def fed_nova(world: World, rounds: int, momentum: float = 0.0, mu: float = 0.0) -> Model:
    """Wang et al. 2020 (2007.07481) with the vector a_k written out, as in its equations 7 to 12."""
    x = world.start
    for round in range(rounds):
        cohort = world.cohort(round)
        held = [world.held(k) for k in cohort]
        shares = [n / sum(held) for n in held]
        normalized, effective = [], 0.0
        for k, p in zip(cohort, shares, strict=True):
            extra = None if not mu else lambda y, x=x: times(mu, minus(y, x))
            y, steps = world.local_sgd(x, k, round, extra, momentum)
            if mu:
                norm = sum((1 - LR * mu) ** (steps - 1 - i) for i in range(steps))
            else:
                norm = sum((1 - momentum ** (steps - i)) / (1 - momentum) for i in range(steps))
            normalized.append(times(1.0 / (LR * norm), minus(x, y)))
            effective += p * (steps if mu else norm)
        x = minus(x, times(effective * LR, mean(normalized, shares)))
    return x


def fed_per(world: World, rounds: int, personal: str) -> tuple[Model, dict[int, Model]]:
    """Arivazhagan et al. 2019 (1912.00818): layers whose name begins so never leave their client."""
    x, own = world.start, dict[int, Model]()
    for round in range(rounds):
        cohort, ys = world.cohort(round), []
        for k in cohort:
            y, _ = world.local_sgd({**x, **own.get(k, {})}, k, round)
            own[k] = {name: value for name, value in y.items() if name.startswith(personal)}
            ys.append(y)
        averaged = mean(ys, [world.held(k) for k in cohort])
        x = {name: x[name] if name.startswith(personal) else averaged[name] for name in x}
    return x, own


def buffered(world: World, flushes: list[tuple[list[int], list[int]]], scale: Callable[[int], float]) -> Model:
    """Nguyen et al. 2021 (2106.06639): from the arrivals of each round and the versions they started from."""
    versions = [world.start]
    for round, (clients, started) in enumerate(flushes):
        x, total = versions[-1], zeros(world.start)
        for k, version in zip(clients, started, strict=True):
            y, _ = world.local_sgd(versions[version], k, round)
            total = plus(total, times(world.held(k) * scale(round - version), minus(versions[version], y)))
        versions.append(minus(x, times(1.0 / sum(world.held(k) for k in clients), total)))
    return versions[-1]


def ditto(world: World, rounds: int, strength: float) -> tuple[Model, dict[int, Model]]:
    """Li et al. 2020 (2012.04221), algorithm 1, with FedAvg for the global model."""
    x, own = world.start, dict[int, Model]()
    for round in range(rounds):
        cohort = world.cohort(round)
        ys = [world.local_sgd(x, k, round)[0] for k in cohort]
        for k in cohort:
            pull = lambda v, x=x: times(strength, minus(v, x))  # noqa: E731
            own[k], _ = world.local_sgd(own.get(k, x), k, round, pull)
        x = mean(ys, [world.held(k) for k in cohort])
    return x, own


def largest(u: Model, k: int) -> Model:
    """The k largest elements; values travel as float32."""
    flat = torch.cat([value.flatten() for value in u.values()])
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(k).indices
    kept[places] = flat[places].float().double()
    parts = zip(u, kept.split([value.numel() for value in u.values()]), strict=True)
    return {name: value.view(u[name].shape) for name, value in parts}


def top_k_with_feedback(world: World, rounds: int, k: int) -> Model:
    """Karimireddy et al. 2019 (1901.09847): the k largest of ``u = delta + e`` are sent, the rest waits."""
    x = world.start
    errors = {client: zeros(x) for client in range(world.num_clients)}
    for round in range(rounds):
        cohort, seen = world.cohort(round), []
        for client in cohort:
            y, _ = world.local_sgd(x, client, round)
            u = plus(minus(x, y), errors[client])
            sent = largest(u, k)
            errors[client] = minus(u, sent)
            seen.append(sent)
        x = minus(x, mean(seen, [world.held(client) for client in cohort]))
    return x


def centered_clipping(world: World, rounds: int, radius: float, iterations: int) -> Model:
    """Karimireddy et al. 2021 (2012.10333), algorithm 2, on the clients' updates: v starts from the previous v."""
    x, v = world.start, zeros(world.start)
    for round in range(rounds):
        deltas = [minus(x, world.local_sgd(x, k, round)[0]) for k in world.cohort(round)]
        for _ in range(iterations):
            away = [minus(delta, v) for delta in deltas]
            norms = [float(torch.cat([value.flatten() for value in each.values()]).norm()) for each in away]
            v = plus(v, mean([times(min(1.0, radius / norm), each) for norm, each in zip(norms, away, strict=True)]))
        x = minus(x, v)
    return x


def dp_fed_avg(
    world: World, cohorts: list[list[int]], clip_norm: float, expected: float, noise: Callable[[int, int], Tensor]
) -> Model:
    """McMahan et al. 2017 (1710.06963): clipped updates, noise on their sum, a fixed denominator."""
    x = world.start
    for round, cohort in enumerate(cohorts):
        flat = torch.zeros(sum(value.numel() for value in x.values()), dtype=torch.float64)
        for client in cohort:
            y, _ = world.local_sgd(x, client, round)
            delta = torch.cat([value.flatten() for value in minus(x, y).values()])
            flat += delta * min(1.0, clip_norm / float(delta.norm()))
        flat = (flat + noise(round, len(flat))) / expected
        step = dict(zip(x, flat.split([value.numel() for value in x.values()]), strict=True))
        x = {name: x[name] - step[name].view(x[name].shape) for name in x}
    return x
