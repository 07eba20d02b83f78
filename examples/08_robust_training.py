"""Training under attack: a fifth of the clients send their updates turned around, and five rules face them.

python examples/08_robust_training.py          a few minutes; writes demo_output/robust_training.png
python examples/08_robust_training.py --fast   a few rounds, to see that everything works

Rules that bear attackers leave out, or hold in, what is unusual. Honest clients with unusual data are unusual too, so
the tenth of the clients that the model serves worst is shown besides: Krum, which follows a single client, costs them
most.
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
from lightning_fedscale.aggregators import geometric_median, krum, mean, median, multi_krum, trimmed_mean
from lightning_fedscale.attacks import attacked, sign_flip
from lightning_fedscale.callbacks import ClientMetrics
from lightning_fedscale.partitioners import DirichletPartitioner

CLIENTS, ATTACKERS = 20, [1, 6, 11, 16]
HOSTILE = len(ATTACKERS)
RULES = {
    "mean": mean("uniform"),
    "median": median(),
    "trimmed mean": trimmed_mean(HOSTILE),
    "Multi-Krum": multi_krum(HOSTILE, keep=CLIENTS - HOSTILE),
    "Krum": krum(HOSTILE),
    "geometric median": geometric_median(),
}
COLORS = ["#CC6677", "#332288", "#88CCEE", "#117733", "#999933", "#AA4499"]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Watch(pl.Callback):
    """How accurate the global model was after every round."""

    def __init__(self):
        self.accuracy = []

    def on_validation_end(self, trainer, module):
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=16, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=1024)


def train(aggregator, rounds):
    """Accuracy by round, and what the clients' own test digits say in the end."""
    pl.seed_everything(0, verbose=False)
    watch, clients = Watch(), ClientMetrics(every_n_rounds=rounds)
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            partitioner=DirichletPartitioner(CLIENTS, alpha=5.0),
            local_epochs=2,
            rounds_per_epoch=rounds,
            aggregator=aggregator,
            executor="sequential",  # A dozen short runs: to try out both ways in each would take longer.
        ),
        max_epochs=1,
        val_check_interval=1,
        accelerator="cpu",
        callbacks=[watch, clients],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), *data())
    return watch.accuracy, clients.last.spread("accuracy")


def draw(found, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, title, number in zip(axes, ("Nobody attacks", "A fifth of the clients attack"), (0, 1), strict=True):
        for (label, runs), color in zip(found.items(), COLORS, strict=True):
            accuracy = [100 * value for value in runs[number][0]]
            panel.plot(range(1, len(accuracy) + 1), accuracy, color=color, lw=1.2, label=label)
        panel.set(xlabel="Round", title=title, ylim=(0, 101))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Test accuracy (%)")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    args = parser.parse_args()
    rounds = 12 if args.fast else 40

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients, of which {HOSTILE} send five times their update with the opposite sign")

    attack = sign_flip(scale=5.0)
    found = {
        label: (train(rule, rounds), train(attacked(rule, attack, ATTACKERS), rounds)) for label, rule in RULES.items()
    }
    table = Table("", "accuracy", "under attack", "worst tenth of clients", "under attack")
    for label, ((before, calm), (after, hit)) in found.items():
        table.add_row(label, f"{before[-1]:.1%}", f"{after[-1]:.1%}", f"{calm.worst10:.1%}", f"{hit.worst10:.1%}")
    console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, args.output / "robust_training.png")
    console.print(f"Figure: {args.output / 'robust_training.png'}")


if __name__ == "__main__":
    main()
