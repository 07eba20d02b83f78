"""What a local batch costs: a hand-written loop, the plain Trainer, and FederatedStrategy.

    python benchmarks/overhead.py            # about five minutes on two cores
    python benchmarks/overhead.py --fast

Every contender makes the same number of local batches of the same size on the same data with the same model and
optimizer. They take turns, so that a machine that slows down slows all of them down; the table shows medians over the
turns and ratios of contenders within a turn. One thread.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy

CLIENTS = (1, 10, 100)
HAND, PLAIN = "hand-written loop", "Trainer(strategy='auto')"


def federated(clients: int) -> str:
    return f"FederatedStrategy, {clients} clients a round"


class Net(pl.LightningModule):
    """A small network with the plainest training step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, nothing logged."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, as FedAvg has it."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 16, 16)),
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def data(width: int, samples: int) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(samples, width), torch.randint(0, 10, (samples,)))


def trainer(epochs: int, strategy: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class Clock(pl.Callback):
    """Seconds from the first batch to the last, without the Trainer's own start and end."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:  # the first epoch warms up
            self.started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started


def hand_written(net: Callable[[], nn.Module], loader: DataLoader[list[Tensor]], epochs: int) -> float:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(epochs):
        if epoch == 1:
            started = time.perf_counter()
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - started


def lightning(
    net: Callable[[], nn.Module], loader: DataLoader[list[Tensor]], epochs: int, strategy: Callable[[], object]
) -> float:
    run, clock = trainer(epochs, strategy()), Clock()
    run.callbacks.append(clock)
    run.fit(Net(net()), loader)
    return clock.seconds


def turns_of(net: Callable[[], nn.Module], loader: DataLoader[list[Tensor]], turns: int) -> dict[str, list[float]]:
    """Microseconds per local batch of every contender, one value a turn; they take turns within each."""
    epochs = 3
    contenders: dict[str, Callable[[], float]] = {
        HAND: lambda: hand_written(net, loader, epochs),
        PLAIN: lambda: lightning(net, loader, epochs, lambda: "auto"),
        **{
            federated(clients): partial(lightning, net, loader, epochs, partial(FederatedStrategy, clients))
            for clients in CLIENTS
        },
    }
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(turns):
        for contender, run in contenders.items():
            times[contender].append(run() / (len(loader) * (epochs - 1)) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one turn of a few batches, to see that it runs")
    fast = parser.parse_args().fast
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    turns, batches, size = (1, 100, 16) if fast else (5, 1000, 16)
    console = Console(width=100)
    versions = f"torch {torch.__version__}, lightning {pl.__version__}"
    console.print(f"{versions}, {platform.machine()}, 1 thread, medians of {turns} turns")
    for name, net, width in (("MLP 64-64-10", mlp, 64), ("CNN 3x16x16", cnn, 768)):
        times = turns_of(net, DataLoader(data(width, batches * size), batch_size=size, shuffle=True), turns)
        table = Table(title=f"{name}, batch {size}, {batches} local batches a round")
        for column in ("", "us per local batch", "to hand-written", "to plain Trainer"):
            table.add_column(column, justify="right" if column else "left")
        for contender, values in times.items():
            ratios = [
                statistics.median(v / b for v, b in zip(values, times[base], strict=True)) for base in (HAND, PLAIN)
            ]
            table.add_row(contender, f"{statistics.median(values):.0f}", *(f"{ratio:.2f}" for ratio in ratios))
        console.print(table)
        extra = zip(times[federated(CLIENTS[0])], times[federated(CLIENTS[-1])], strict=True)
        switch = statistics.median((b - a) * batches / (CLIENTS[-1] - CLIENTS[0]) / 1000 for a, b in extra)
        console.print(f"one more client in a round, the same batches: {switch:.2f} ms\n")


if __name__ == "__main__":
    main()
