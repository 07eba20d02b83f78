"""Phases of training drive compression and local steps, with the library's own compressors and error feedback.

python examples/12_phase_driven_compression.py          a few minutes; writes demo_output/phase_driven_compression.png
python examples/12_phase_driven_compression.py --fast   a few rounds, to see that everything works

In critical phases clients talk often and much; elsewhere they train for longer between rounds and send little.
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
from lightning_fedscale.callbacks import CriticalPhase, RoundEvents
from lightning_fedscale.compressors import error_feedback, phase_driven, top_k
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.phases import relative_change

CLIENTS = 40
MUCH, LITTLE = top_k(0.2), top_k(0.01)
SHORT, LONG = 5, 10  # local steps
COLORS = ["#332288", "#117733", "#CC6677"]


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


class Watch(RoundEvents):
    """What was decided for every round, what clients sent in it, and how accurate the global model was afterwards."""

    def __init__(self, phase):
        self.phase = phase
        self.critical, self.steps, self.message, self.megabytes, self.accuracy = [], [], [], [], []

    def on_round_start(self, trainer, module, round, cohort):
        self.critical.append(self.phase.critical)

    def on_round_end(self, trainer, module, record):
        self.steps.append(int(record.local_steps.max()))
        self.message.append(record.upload_bytes / len(record.clients))
        self.megabytes.append(sum(self.megabytes[-1:]) + record.upload_bytes / 1e6)

    def on_validation_end(self, trainer, module):
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())

    def mean_message(self, critical):
        sent = [size for size, phase in zip(self.message, self.critical, strict=True) if phase == critical]
        return f"{sum(sent) / len(sent):.0f} B" if sent else "none"


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=8, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=512)


def train(critical, otherwise, rounds):
    """One run; both arguments are a compressor and a number of local steps."""
    pl.seed_everything(0, verbose=False)
    phase = CriticalPhase(relative_change(threshold=0.15, window=10), action="observe")
    watch = Watch(phase)
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            partitioner=DirichletPartitioner(CLIENTS, alpha=0.5, min_partition_size=10),
            clients_per_round=10,
            local_steps=lambda round: critical[1] if phase.critical else otherwise[1],
            rounds_per_epoch=rounds,
            compressor=error_feedback(phase_driven(phase, critical=critical[0], otherwise=otherwise[0])),
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
    trainer.fit(Classifier(), *data())
    return watch


def draw(runs, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (label, watch), color in zip(runs.items(), COLORS, strict=True):
        accuracy = [100 * value for value in watch.accuracy]
        left.plot(watch.megabytes, accuracy, color=color, lw=1.2, label=label)
        right.plot(accuracy, color=color, lw=1.2)
    for number, critical in enumerate(runs["by phase"].critical):
        if critical:
            right.axvspan(number - 0.5, number + 0.5, color="#CC6677", alpha=0.2, lw=0)
    left.set(
        xlabel="Sent up by clients (MB)", ylabel="Test accuracy (%)", title="By bytes", xscale="log", ylim=(0, 101)
    )
    right.set(xlabel="Round", title="By rounds; critical ones of the run by phase are shaded")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    args = parser.parse_args()
    rounds = 30 if args.fast else 120

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients, 10 of them in every round, {rounds} rounds")

    much, little = (MUCH, SHORT), (LITTLE, LONG)
    found = {
        "much": train(much, much, rounds),
        "by phase": train(much, little, rounds),
        "little": train(little, little, rounds),
    }
    table = Table("", "critical", "steps", "each, critical", "each, else", "sent up", "accuracy")
    for label, watch in found.items():
        table.add_row(
            label,
            f"{sum(watch.critical)} of {rounds}",
            str(sum(watch.steps)),
            watch.mean_message(True),
            watch.mean_message(False),
            f"{watch.megabytes[-1]:.3f} MB",
            f"{watch.accuracy[-1]:.1%}",
        )
    console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, args.output / "phase_driven_compression.png")
    console.print(f"Figure: {args.output / 'phase_driven_compression.png'}")


if __name__ == "__main__":
    main()
