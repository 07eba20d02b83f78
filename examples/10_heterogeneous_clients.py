"""Clients who hold very different data: SCAFFOLD and top-k compression, by accuracy and by bytes.

python examples/10_heterogeneous_clients.py          a few minutes; writes demo_output/heterogeneous_clients.png
python examples/10_heterogeneous_clients.py --fast   a few rounds, to see that everything works

A compressor acts on updates. SCAFFOLD's clients send the change of their control variate besides, whole: that is the
price of the last method, and what keeps its bytes above half of SCAFFOLD's.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
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
from lightning_fedscale.compressors import error_feedback, top_k
from lightning_fedscale.partitioners import DirichletPartitioner

CLIENTS, PER_ROUND = 20, 10
SENT = 0.05  # part of an update that top-k sends
COLORS = ["#332288", "#88CCEE", "#117733", "#CC6677"]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(pl.Callback):
    """What clients had sent by the time the global model was so accurate."""

    def __init__(self):
        self.megabytes, self.accuracy = [], []

    def on_validation_end(self, trainer, module):
        before = self.megabytes[-1] if self.megabytes else 0.0
        self.megabytes.append(before + trainer.strategy.last_round.upload_bytes / 1e6)
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=16, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=512)


def train(method, rounds):
    """One run; ``method`` holds further arguments of the strategy."""
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            partitioner=DirichletPartitioner(CLIENTS, alpha=0.1, min_partition_size=5),
            clients_per_round=PER_ROUND,
            local_steps=20,
            rounds_per_epoch=rounds,
            aggregator="uniform",
            **method,
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
    trainer.fit(Classifier(), *data())
    return watch


def draw(runs, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (label, watch), color in zip(runs.items(), COLORS, strict=True):
        accuracy = [100 * value for value in watch.accuracy]
        left.plot(range(1, len(accuracy) + 1), accuracy, color=color, lw=1.2, label=label)
        right.plot(watch.megabytes, accuracy, color=color, lw=1.2)
    left.set(xlabel="Round", ylabel="Test accuracy (%)", title="By rounds", ylim=(0, 101))
    right.set(xlabel="Sent up by clients (MB)", title="By bytes", xscale="log")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    args = parser.parse_args()
    rounds = 10 if args.fast else 100

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients with one or two kinds of digits each, {PER_ROUND} of them in every round")

    methods = {
        "FedAvg": {},
        "SCAFFOLD": {"local_rule": "scaffold"},
        "FedAvg, top-k": {"compressor": error_feedback(top_k(SENT))},
        "SCAFFOLD, top-k": {"local_rule": "scaffold", "compressor": error_feedback(top_k(SENT))},
    }
    found = {label: train(method, rounds) for label, method in methods.items()}
    last = max(1, rounds // 10)
    table = Table("", "sent up", "accuracy", f"mean of the last {last}")
    for label, watch in found.items():
        mean = sum(watch.accuracy[-last:]) / last  # From round to round it goes up and down.
        table.add_row(label, f"{watch.megabytes[-1]:.3f} MB", f"{watch.accuracy[-1]:.1%}", f"{mean:.1%}")
    console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, args.output / "heterogeneous_clients.png")
    console.print(f"Figure: {args.output / 'heterogeneous_clients.png'}")


if __name__ == "__main__":
    main()
