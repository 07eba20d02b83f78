"""What every local rule, aggregator and server optimizer takes in memory is what docs/performance.md says."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.aggregators import coordinates, mean
from lightning_fedscale.utils import flat_view
from tests.laws import reference
from tests.laws.test_memory import AllocatedBytes
from tests.unit.test_contracts import METHODS, example

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text("utf8")
ARGUMENTS = {"local_rules": "local_rule", "aggregators": "aggregator", "server": "server_optimizer"}
MEASURED = [("", "FedAvg"), *(method for method in METHODS if method[0] in ARGUMENTS)]
WIDTH, LAYERS = 32, 48
PARAMETERS = WIDTH * WIDTH * LAYERS
FEW, MANY = 5, 7  # of five clients, Krum tolerates one attacker
PART = 768  # so that parts cross the borders of layers


class Memory(NamedTuple):
    """Bytes for each trainable parameter."""

    server: float
    client: float
    round: float
    round_of_client: float


class Layers(pl.LightningModule):
    """Many small layers, so that what is held of one of them hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(x))
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def peak(clients: int, strategy: Any) -> int:
    trainer = reference.quiet_trainer(max_epochs=2, strategy=strategy)
    with AllocatedBytes() as counted:
        trainer.fit(Layers(), DataLoader(TensorDataset(torch.ones(clients, WIDTH)), batch_size=1))
    return counted.peak


@cache
def plain() -> int:
    return peak(2, "auto")


def size_of(state: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def memory_of(room: str, name: str) -> Memory:
    options = {ARGUMENTS[room]: example(room, name)} if room else {}
    peaks = []
    for clients in (FEW, MANY):
        strategy = FederatedStrategy(clients, executor="sequential", **options)
        peaks.append(peak(clients, strategy) - plain())
    fit = strategy._federation.fit  # type: ignore[union-attr]
    kept = fit.clients.store.state_dict()
    of_client = (peaks[1] - peaks[0]) / (MANY - FEW)
    numbers = (size_of(fit.server.states), size_of(kept) / MANY, peaks[0] - FEW * of_client, of_client)
    return Memory(*(np.array(numbers) / PARAMETERS).tolist())


def row(room: str, name: str) -> Memory:
    """The numbers of its row in the table."""
    what = rf"`{room}\.{name}\b[^|]*" if room else name
    found = re.search(rf"^\| {what} *\| (\d+) \| (\d+) \| (\d+)(?: \+ (\d+) a client)? \|$", PAGE, re.M)
    assert found is not None, f"docs/performance.md: add a row for {room}.{name} to the table of memory"
    return Memory(*(float(number or 0) for number in found.groups()))


@pytest.mark.parametrize(("room", "name"), MEASURED)
def test_each_takes_what_its_row_says(room: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a part is as long as this small model.
    monkeypatch.setattr(flat_view, "elements_at_once", lambda device: PART)
    monkeypatch.setattr(flat_view, "ONE_PART", 0)
    monkeypatch.setattr(sys.modules[mean.__module__], "elements_at_once", lambda device: PART)
    monkeypatch.setattr(coordinates, "_PART", PART)
    measured = memory_of(room, name)
    assert measured == pytest.approx(row(room, name), abs=0.5)
