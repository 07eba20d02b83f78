"""Phases of training drive compression: clients send much while training is critical, and little afterwards.

python examples/05_critical_phases.py          half a minute; writes critical_phases.png
python examples/05_critical_phases.py --fast   a few rounds, to see that everything works
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.aggregators import mean
from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.phases import relative_change

CLIENTS = 40
EARLY = 20  # rounds
MUCH, LITTLE = 0.1, 0.002


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TopK:
    """FedAvg's mean of each client's largest changes; what a client keeps back is added to its next update."""

    def __init__(self, share):
        self.share = share  # a function: it is asked in every round
        self.kept, self.values = {}, 0  # of every client what it kept back; all clients train in one process here

    def aggregator(self):
        return mean()._replace(accumulate=self.accumulate)

    def accumulate(self, total, update, weight, cohort):
        delta = update.delta + self.kept.get(update.client, 0)
        largest = delta.abs().topk(max(1, int(self.share() * delta.numel()))).indices
        sent = torch.zeros_like(delta)
        sent[largest] = delta[largest]
        self.kept[update.client] = delta - sent
        self.values += len(largest)
        return mean().accumulate(total, update._replace(delta=sent), weight, cohort)


class Watch(pl.Callback):
    """What had been sent by the time the global model was so accurate."""

    def __init__(self, top_k):
        self.top_k, self.megabytes, self.accuracy = top_k, [], []

    def on_validation_end(self, trainer, module):
        self.megabytes.append(self.top_k.values * 8 / 1e6)  # a number and its place
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=8, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=512)


def train(share, rounds):
    """One run; ``share`` makes of the phase the part of an update that is sent."""
    pl.seed_everything(0, verbose=False)
    phase = CriticalPhase(relative_change(threshold=0.15, window=10), action="observe")
    top_k, (loader, test) = TopK(lambda: share(phase)), data()
    watch = Watch(top_k)
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            partitioner=DirichletPartitioner(CLIENTS, alpha=0.5, min_partition_size=10),
            clients_per_round=10,
            local_epochs=2,
            rounds_per_epoch=rounds,
            aggregator=top_k.aggregator(),
        ),
        max_epochs=1,
        val_check_interval=1,
        accelerator="cpu",
        callbacks=[phase, watch],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader, test)
    return watch, phase


def draw(runs, phase, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, watch), color in zip(runs.items(), ["#332288", "#117733", "#CC6677"], strict=True):
        accuracy = [100 * value for value in watch.accuracy]
        left.plot(accuracy, color=color, lw=1.4, label=f"{label}: {watch.megabytes[-1]:.2f} MB")
    left.set(xlabel="Round", ylabel="Test accuracy (%)", title="Sent: the largest changes", ylim=(0, 101))
    left.legend(frameon=False, loc="lower right")
    rows = phase.record.rows
    right.plot([row[0] for row in rows], [row[1] for row in rows], color="#332288", lw=1.2)
    for first, last in phase.record.spans:
        right.axvspan(first - 0.5, last + 0.5, color="#CC6677", alpha=0.2, lw=0)
    right.set(xlabel="Round", ylabel="Norm of the update", title="Critical rounds, shaded", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("critical_phases.png"), help="where the figure goes")
    args = parser.parse_args()
    rounds = 10 if args.fast else 150

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients, 10 of them in every round, send the largest changes of their update")

    shares = {
        f"always {MUCH:.0%}": lambda phase: MUCH,
        f"{MUCH:.0%} in critical phases, else {LITTLE:.1%}": lambda phase: MUCH if phase.critical else LITTLE,
        f"always {LITTLE:.1%}": lambda phase: LITTLE,
    }
    found = {label: train(share, rounds) for label, share in shares.items()}
    for label, (watch, phase) in found.items():
        console.print(
            f"{label:<36} accuracy {watch.accuracy[min(rounds, EARLY) - 1]:.1%} after {min(rounds, EARLY)} rounds,"
            f" {watch.accuracy[-1]:.1%} in the end with {watch.megabytes[-1]:.2f} MB; {phase.record.summary('round')}"
        )
    driven = list(found.values())[1][1]
    draw({label: watch for label, (watch, _) in found.items()}, driven, args.output)
    console.print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
