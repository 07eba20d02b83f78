"""Clients on unequal hardware: three kinds of devices, three batch sizes, with and without a deadline.

python examples/04_mixed_population.py          half a minute; writes mixed_population.png
python examples/04_mixed_population.py --fast   a few rounds, to see that everything works
"""

import argparse
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.devices import Population, device_class
from lightning_fedscale.partitioners import DirichletPartitioner

CLIENTS = 60

# Real figures of speed, but only so much memory and network as a background task gets: training must not be noticed.
PHONE = replace(device_class("phone"), memory=4_000_000, flops=2e9, up=2e6, down=4e6)
OLD_PHONE = replace(device_class("old-phone"), memory=500_000, flops=5e8, up=2e5, down=1e6)
SENSOR = replace(device_class("raspberry-pi-5"), name="sensor", memory=300_000, flops=1e8, up=5e4, down=1e5)
SHARES = {PHONE: 0.5, OLD_PHONE: 0.3, SENSOR: 0.2}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.net = nn.Sequential(
            first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(pl.Callback):
    """Accuracy of the global model, and the simulated time at which the server had it."""

    def __init__(self):
        self.records, self.accuracy = [], []

    def on_round_end(self, trainer, module, record):
        self.records.append(record)

    def on_validation_end(self, trainer, module):
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())

    @property
    def seconds(self):
        return [record.simulated.total for record in self.records]

    @property
    def dropped(self):
        return np.mean([len(record.simulated.dropped) for record in self.records])


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=8, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=512)


def train(deadline, rounds):
    pl.seed_everything(0, verbose=False)
    watch, (loader, test) = Watch(), data()
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            partitioner=DirichletPartitioner(CLIENTS, alpha=0.5, min_partition_size=10),
            clients_per_round=15,
            local_epochs=2,
            rounds_per_epoch=rounds,
            population=Population(SHARES, batch_size="largest", headroom=0.0, deadline=deadline),
        ),
        max_epochs=1,
        val_check_interval=1,
        accelerator="cpu",
        callbacks=[watch],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader, test)
    return watch, trainer.strategy.population_table()


def show(console, table):
    shown = Table("Device", "Clients", "Batch", "Peak memory", "Samples/s", "Model there and back", title_style="bold")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, row in table.iterrows():
        shown.add_row(
            str(name), f"{row['clients']:.0f}", f"{row['batch_size']:.0f}", f"{row['peak_bytes'] / 1e6:.2f} MB",
            f"{row['samples_per_second']:,.0f}", f"{row['message_seconds']:.2f} s",
        )  # fmt: skip
    console.print(shown)


def draw(runs, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for (label, watch), color in zip(runs.items(), ["#332288", "#CC6677"], strict=True):
        axis.plot(watch.seconds, 100 * np.array(watch.accuracy), color=color, lw=1.6, label=label)
        axis.plot(watch.seconds[-1], 100 * watch.accuracy[-1], "o", color=color)
    axis.set(xlabel="Simulated time (s)", ylabel="Test accuracy (%)", title="The same rounds, on the clients' hardware")
    axis.set(xlim=(0, None), ylim=(0, 101))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("mixed_population.png"), help="where the figure goes")
    args = parser.parse_args()
    rounds = 4 if args.fast else 80

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients on three kinds of devices, 15 of them in every round")

    waiting, table = train(None, rounds)
    show(console, table)
    # As long as a typical round of the faster two kinds: the slowest devices will rarely make it.
    fast = [
        second
        for record in waiting.records
        for second, size in zip(record.simulated.client_seconds, record.simulated.batch_sizes, strict=True)
        if size > table["batch_size"].min()
    ]
    deadline = float(np.quantile(fast, 0.95))
    hurried, _ = train(deadline, rounds)

    runs = {"waits for all": waiting, f"deadline of {deadline:.1f} s": hurried}
    for label, watch in runs.items():
        console.print(
            f"{label:<20} accuracy {watch.accuracy[-1]:.1%} after {watch.seconds[-1]:.0f} simulated seconds,"
            f" {watch.dropped:.1f} of 15 clients dropped per round"
        )
    draw(runs, args.output)
    console.print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
