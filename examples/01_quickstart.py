"""Federated learning in one argument: handwritten digits, spread over 100 clients who each know only a few of them.

python examples/01_quickstart.py          less than a minute; charts and logs go to demo_output/
python examples/01_quickstart.py --fast   a few rounds, to see that everything works
"""

import argparse
import logging
import shutil
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.partitioners import DirichletPartitioner, plot_label_distributions

TARGET = 0.93
# Colours that remain apart for colour-blind readers, by Paul Tol.
MUTED = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB"]

# ------------------------------------------------------------ An ordinary Lightning project, which knows of no clients.


class Digits(pl.LightningDataModule):
    def setup(self, stage=None):
        pixels, digits = load_digits(return_X_y=True)
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
        train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        self.train = TensorDataset(images[train], labels[train])
        self.test = TensorDataset(images[test], labels[test])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, batch_size=512)  # Nothing is chosen by this score, so it is a test all the same.


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        head = nn.Linear(32 * 4 * 4, 10)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), head)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.15)


# ------------------------------------------------------------------------------------------------- What we want to see.


class Watch(pl.Callback):
    """Keeps every round's record, and how well the global model does on the test images and on each client's own."""

    def __init__(self):
        self.records, self.test, self.clients = [], [], []

    def on_round_end(self, trainer, module, record):  # An event that the strategy adds to Lightning's.
        self.records.append(record)

    @torch.no_grad()
    def on_validation_end(self, trainer, module):
        images, labels = trainer.datamodule.train.tensors
        hits = (module.net(images).argmax(1) == labels).numpy()
        own = sorted(hits[trainer.strategy.partition.client(client)].mean() for client in range(100))
        self.clients.append([np.mean(own[:10]), np.mean(own), np.mean(own[-10:])])
        self.test.append(trainer.callback_metrics["accuracy"].item())


class RoundBar(RichProgressBar):
    def configure_columns(self, trainer):
        return [TextColumn("Round"), *super().configure_columns(trainer)[1:]]  # Instead of "Epoch 0/0".

    def get_metrics(self, trainer, module):
        return {"accuracy": super().get_metrics(trainer, module).get("accuracy", 0.0)}


def summary(watch, seconds):
    worst, mean, best = watch.clients[-1]
    table = Table("", "Result", title="The global model after its last round", title_style="bold", show_header=False)
    table.add_row("Accuracy on test images", f"[bold]{watch.test[-1]:.1%}", end_section=True)
    table.add_row("Accuracy on clients' own training images, mean", f"{mean:.1%}")
    table.add_row("    worst 10 % of clients", f"{worst:.1%}")
    table.add_row("    best 10 % of clients", f"{best:.1%}", end_section=True)
    table.add_row("Sent up by clients", f"{sum(record.upload_bytes for record in watch.records) / 1e6:.1f} MB")
    table.add_row("Sent down to clients", f"{sum(record.download_bytes for record in watch.records) / 1e6:.1f} MB")
    table.add_row("Rounds", f"{len(watch.records)}")
    table.add_row("Seconds", f"{seconds:.1f}")
    table.columns[1].justify = "right"
    return table


def draw(partitioner, watch, folder):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    who, axis, _ = plot_label_distributions(
        partitioner, figsize=(9, 3.2), cmap=ListedColormap(MUTED), legend=True, legend_title="Digit"
    )
    axis.set(xlabel="Client", ylabel="Images", title="Who holds what")

    curve = Figure(figsize=(5.4, 3.4), layout="constrained")
    axis = curve.subplots()
    rounds = np.arange(1, len(watch.test) + 1)
    worst, mean, best = 100 * np.transpose(watch.clients)
    axis.fill_between(rounds, worst, best, color=MUTED[1], alpha=0.35, lw=0, label="Clients, worst 10 % to best 10 %")
    axis.plot(rounds, mean, color=MUTED[2], lw=1.2, label="Clients' own images, mean")
    axis.plot(rounds, 100 * np.array(watch.test), color=MUTED[0], lw=1.6, label="Test images")
    axis.axhline(100 * TARGET, color="0.35", lw=0.8, ls=(0, (5, 4)), label=f"Target, {100 * TARGET:.0f} %")
    axis.set(xlabel="Round", ylabel="Accuracy (%)", title="The global model over rounds")
    axis.set(xlim=(0, rounds[-1]), ylim=(0, 101))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")

    who.savefig(folder / "who_holds_what.png", dpi=200)
    curve.savefig(folder / "accuracy.png", dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only, and no demands on the result")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for charts and logs")
    args = parser.parse_args()
    rounds = 5 if args.fast else 100

    # The Trainer's remarks on GPUs and loader workers do not concern images of eight by eight.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    pl.seed_everything(0, verbose=False)
    console = Console(soft_wrap=True, highlight=False)
    console.print("[bold]Handwritten digits at 100 clients, of whom 10 train in every round")

    watch = Watch()
    partitioner = DirichletPartitioner(num_partitions=100, alpha=0.3, min_partition_size=5)
    trainer = pl.Trainer(
        # The one argument that makes it federated; to the Trainer, a round is a step and `rounds` of them an epoch.
        strategy=FederatedStrategy(
            partitioner=partitioner, clients_per_round=10, local_epochs=3, rounds_per_epoch=rounds
        ),
        max_epochs=1,
        val_check_interval=1,
        accelerator="cpu",
        logger=TensorBoardLogger(args.output, name="tensorboard", default_hp_metric=False),
        callbacks=[watch, RoundBar(leave=True)],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(Classifier(), datamodule=Digits())
    console.print(summary(watch, time.perf_counter() - started))
    partitioner.dataset = trainer.datamodule.train  # The strategy has divided them with a copy of its own.
    draw(partitioner, watch, args.output)

    # The full path helps those who ran this without activating its environment.
    tensorboard = "tensorboard" if shutil.which("tensorboard") else Path(sys.executable).with_name("tensorboard")
    console.print(f"Charts: {args.output}/who_holds_what.png, {args.output}/accuracy.png")
    console.print(f"Curves: {tensorboard} --logdir {args.output}/tensorboard")
    if not args.fast and watch.test[-1] < TARGET:
        sys.exit(f"Test accuracy {watch.test[-1]:.3f} is below the target of {TARGET}.")


if __name__ == "__main__":
    main()
