"""FedAvg and plain training written by hand, from the paper's pseudo-code and nothing of the strategy's loops.

Only the definitions of randomness (who is sampled, in which order a client reads, what it draws) are the package's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedscale import Partition
from lightning_fedscale.core.plan import client_seed, pass_order
from lightning_fedscale.samplers import uniform


def dataset(samples: int = 203, dtype: torch.dtype = torch.float32) -> TensorDataset:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    labels = rng.integers(0, 4, samples)
    inputs = centres[labels] + rng.normal(size=(samples, 12))
    return TensorDataset(torch.tensor(inputs, dtype=dtype), torch.tensor(labels))


def unequal_clients(samples: int = 203, clients: int = 7) -> Partition:
    """Clients of very different sizes: 1, 2, 4, ... parts."""
    cuts = np.cumsum(np.array([2.0**k for k in range(clients)]))
    bounds = np.concatenate([[0], (cuts / cuts[-1] * samples).astype(int)])
    order = np.random.default_rng(1).permutation(samples)
    return Partition.from_lists([order[a:b] for a, b in itertools.pairwise(bounds)])


def equal_clients(clients: int, samples: int) -> Partition:
    """So many clients of so many samples each."""
    return Partition.from_lists([range(i * samples, (i + 1) * samples) for i in range(clients)])


class Classifier(pl.LightningModule):
    def __init__(self, dropout: float = 0.3, batch_norm: bool = False, clip: float | None = None) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(16)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(12, 16), *norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def make_module(dtype: torch.dtype = torch.float32, **options: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**options).to(dtype)  # type: ignore[arg-type]


def fed_avg(
    module: Classifier,
    data: TensorDataset,
    partition: Partition,
    *,
    rounds: int,
    clients_per_round: int,
    local_epochs: int = 1,
    batch_size: int = 8,
    shuffle: bool = True,
    clip: float | None = None,
    accumulate: int = 1,
    seed: int = 0,
    weigh: Callable[[int], float] = float,
) -> dict[str, Tensor]:
    """``x <- x - sum_k n_k (x - y_k) / sum_k n_k`` with local SGD, momentum fresh in every round."""
    server = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.train()
    for round in range(rounds):
        cohort = uniform(
            seed=seed, round=round, num_clients=len(partition), clients_per_round=clients_per_round
        ).tolist()
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in server.items()}
        weight = 0.0
        for client in cohort:
            module.load_state_dict(server)
            torch.manual_seed(client_seed(seed, round, client))
            optimizer = module.configure_optimizers()
            for number in range(round * local_epochs, (round + 1) * local_epochs):
                order = pass_order(partition.client(client), shuffle=shuffle, seed=seed, client=client, number=number)
                batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
                for index, positions in enumerate(batches):
                    inputs, labels = (tensor[positions] for tensor in data.tensors)
                    loss = nn.functional.cross_entropy(module.net(inputs), labels) / accumulate
                    if index % accumulate == 0:
                        optimizer.zero_grad()
                    loss.backward()
                    if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                        if clip is not None:
                            nn.utils.clip_grad_norm_(module.parameters(), clip)
                        optimizer.step()
            share = weigh(len(partition.client(client)))
            weight += share
            for name, value in module.state_dict().items():
                total[name] += share * (server[name].double() - value.double())
        server = {
            name: (server[name].double() - total[name] / weight).to(server[name].dtype)
            if server[name].is_floating_point()
            else (server[name].double() - total[name] / weight).round().to(server[name].dtype)
            for name in server
        }
    return server


def loader(data: Dataset[Any], batch_size: int = 8, shuffle: bool = True) -> DataLoader[list[Tensor]]:
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def quiet_trainer(**options: object) -> pl.Trainer:
    settings: dict[str, object] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})  # type: ignore[arg-type]


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
