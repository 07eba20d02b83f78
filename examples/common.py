"""What the examples share: data, a small model, its training, tables and figures.

Python finds this module in the folder of the example that it runs.
"""

import argparse
import gzip
import logging
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from cycler import cycler
from lightning.pytorch.callbacks import RichProgressBar
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
from lightning_fedscale.callbacks import RoundEvents
from lightning_fedscale.partitioners import plot_label_distributions

# Colours that colour-blind readers can tell apart, by Paul Tol.
COLORS = ["#332288", "#117733", "#CC6677", "#88CCEE", "#999933", "#AA4499", "#44AA99", "#DDCC77", "#882255", "#BBBBBB"]
console = Console(soft_wrap=True, highlight=False)


# ------------------------------------------------------------------------------------------------ Arguments and quiet.


def arguments(doc, output, *more):
    """Parse the command line, seed, and silence the hints of the Trainer, which do not concern models this small.

    Args:
        doc: the example's docstring; its first line is the help text.
        output: default of ``--output``, the folder or file for results.
        more: further arguments, as pairs of a flag and the keywords of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path(output), help="where the results go")
    for flag, keywords in more:
        parser.add_argument(flag, **keywords)
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for hint in ("does not have many workers", "have no `val_dataloader`", "LeafSpec", "this is an extrapolation"):
        warnings.filterwarnings("ignore", message=f".*{hint}")
    torch.set_num_threads(1)  # In models this small, threads only get in each other's way.
    pl.seed_everything(0, verbose=False)
    return args


# ----------------------------------------------------------------------------------------------------------- The data.


def digits():
    """Return scikit-learn's 1,797 handwritten digits: images of 8 x 8 pixels as vectors, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def digit_loaders(batch_size, test_size=0.2):
    """Return loaders of training and test digits, with equal shares of every label."""
    images, labels = digits()
    train, test = train_test_split(range(len(labels)), test_size=test_size, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), len(test))


def shuffled_digits():
    """Return the digits in a fixed random order, and the number of those at the end that are for validation."""
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order], 397


def fashion_mnist(folder):
    """Return Fashion-MNIST at half its resolution, and the number of those at the end that are for validation."""

    def read(name, header):
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    try:
        images = [read(f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k")]
        labels = [read(f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")]
    except FileNotFoundError:
        remedy = "apt install dataset-fashion-mnist, name its folder by --images, or take --data digits"
        print(f"Fashion-MNIST is not in {folder}: {remedy}", file=sys.stderr)
        sys.exit(2)
    pixels = torch.tensor(np.concatenate(images).reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
    return F.avg_pool2d(pixels, 2).flatten(1), torch.tensor(np.concatenate(labels), dtype=torch.int64), 10_000


class Images(pl.LightningDataModule):
    """Images and labels, of which the last ``held_out`` are for validation."""

    def __init__(self, images, labels, held_out, batch_size=8):
        super().__init__()
        self.batch_size = batch_size
        self.train = TensorDataset(images[:-held_out], labels[:-held_out])
        self.val = TensorDataset(images[-held_out:], labels[-held_out:])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 1000)


# ------------------------------------------------------------------------------------------- The model, its training.


class Classifier(pl.LightningModule):
    """The given layers, trained by SGD or another kind of optimizer."""

    def __init__(self, *layers, lr, optimizer=torch.optim.SGD):
        super().__init__()
        self.net, self.lr, self.optimizer = nn.Sequential(*layers), lr, optimizer

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.net(images)
        accuracy = (scores.argmax(1) == labels).float().mean()
        self.log_dict({"val_loss": F.cross_entropy(scores, labels), "accuracy": accuracy}, sync_dist=True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)


def perceptron(hidden, lr, optimizer=torch.optim.SGD):
    """Return a classifier of digits with one hidden layer."""
    return Classifier(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10), lr=lr, optimizer=optimizer)


class Watch(RoundEvents):
    """Keep the record of every round; at every validation, the Trainer's step and what was logged."""

    def __init__(self):
        self.records, self.steps, self.logged = [], [], []

    def on_round_end(self, trainer, pl_module, record):  # An event that the strategy adds to Lightning's.
        self.records.append(record)

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def values(self, name):
        return np.array([values[name] for values in self.logged])

    @property
    def accuracy(self):
        """Of the global model on test images, in percent."""
        return 100 * self.values("accuracy")

    @property
    def megabytes(self):
        """What the clients had sent by the end of every round."""
        return np.cumsum([record.upload_bytes for record in self.records]) / 1e6


class LocalAccuracy(pl.Callback):
    """Keep the accuracy, in percent, of the global model on each client's training images, after every round."""

    def __init__(self, dataset):
        self.dataset, self.rounds = dataset, []

    @torch.no_grad()
    def on_validation_end(self, trainer, pl_module):
        images, labels = self.dataset.tensors
        hits = 100.0 * (pl_module.net(images).argmax(1) == labels).numpy()
        partition = trainer.strategy.partition
        self.rounds.append(sorted(hits[partition.client(client)].mean() for client in range(len(partition))))

    @property
    def spread(self):
        """Of every round: the mean of the worst tenth of the clients, of all, and of the best tenth."""
        rounds = np.array(self.rounds)
        tenth = rounds.shape[1] // 10
        return rounds[:, :tenth].mean(1), rounds.mean(1), rounds[:, -tenth:].mean(1)


# The Trainer writes no files and prints nothing.
QUIET = {
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def train(module, loaders, *callbacks, rounds, **options):
    """Train ``module()`` for so many rounds, with a validation after each.

    Args:
        module: a function that makes the module, whose weights are the same in every call.
        loaders: for training and for validation.
        callbacks: of the Trainer, besides the `Watch`.
        rounds: how many.
        options: of `FederatedStrategy`.

    Returns:
        A `Watch`, with the records and the results of all rounds.
    """
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    strategy = FederatedStrategy(rounds_per_epoch=rounds, **options)
    trainer = pl.Trainer(strategy=strategy, max_epochs=1, val_check_interval=1, callbacks=[*callbacks, watch], **QUIET)
    trainer.fit(module(), *loaders)
    watch.strategy = strategy
    return watch


class RoundBar(RichProgressBar):
    """A progress bar that counts rounds, in place of "Epoch 0/0"."""

    def configure_columns(self, trainer):
        return [TextColumn("Round"), *super().configure_columns(trainer)[1:]]

    def get_metrics(self, trainer, pl_module):
        return {"accuracy": super().get_metrics(trainer, pl_module).get("accuracy", 0.0)}


# -------------------------------------------------------------------------------------------------- Tables and figures.


def show(headings, rows, title=None):
    """Print a table, whose first column has names and whose others have numbers."""
    table = Table(*headings, title=title, title_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def tensorboard(folder):
    """Print the command that shows the curves; the full path helps those who did not activate the environment."""
    command = shutil.which("tensorboard") or Path(sys.executable).with_name("tensorboard")
    console.print(f"Curves: {command} --logdir {folder}")


@contextmanager
def figure(path, columns=1, **options):
    """Give the axes of a figure to draw on; then put a legend on the first, save the figure and print its path."""
    style = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.prop_cycle": cycler(color=COLORS)}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3, "legend.frameon": False}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(5.6 if columns == 1 else 9, 3.6), layout="constrained")
        axes = canvas.subplots(1, columns, **options)
        yield axes
        np.atleast_1d(axes)[0].legend(loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=200)
    console.print(f"Figure: {path}")


def shade(axes, spans):
    """Shade the rounds of these spans, given by their first and last."""
    for first, last in spans:
        axes.axvspan(first - 0.5, last + 0.5, color=COLORS[2], alpha=0.2, lw=0)


# ------------------------------------------------------------------------------------------ The end of the quick start.


def report(folder, watch, local, partitioner, target):
    """Print the results of the quick start, draw its charts and print the command that shows the curves."""
    worst, mean, best = (values[-1] for values in local.spread)
    rows = {
        "Accuracy on test images": f"{watch.accuracy[-1]:.1f}%",
        "Accuracy on clients' own training images, mean": f"{mean:.1f}%",
        "    worst 10 % of clients": f"{worst:.1f}%",
        "    best 10 % of clients": f"{best:.1f}%",
        "Sent by clients": f"{sum(record.upload_bytes for record in watch.records) / 1e6:.1f} MB",
        "Sent to clients": f"{sum(record.download_bytes for record in watch.records) / 1e6:.1f} MB",
        "Rounds": f"{len(watch.records)}",
        "Seconds of training": f"{sum(record.seconds for record in watch.records):.1f}",
    }
    show(["", "Result"], rows.items(), title="The global model after its last round")
    draw_labels(folder / "partition.png", partitioner, local.dataset)
    draw_accuracy(folder / "accuracy.png", watch, local, target)
    tensorboard(folder / "tensorboard")


def draw_labels(path, partitioner, dataset):
    """Draw how many images of every digit each client has."""
    partitioner.dataset = dataset
    canvas, axes, _ = plot_label_distributions(
        partitioner, figsize=(9, 3.2), cmap=ListedColormap(COLORS), legend=True, legend_title="Digit"
    )
    axes.set(xlabel="Client", ylabel="Images", title="The partition: images by client and digit")
    canvas.savefig(path, dpi=200)
    console.print(f"Figure: {path}")


def draw_accuracy(path, watch, local, target):
    """Draw the accuracy over rounds, on test images and on the clients' own."""
    worst, mean, best = local.spread
    rounds = range(1, len(mean) + 1)
    with figure(path) as axes:
        axes.fill_between(rounds, worst, best, color=COLORS[3], alpha=0.35, lw=0, label="Clients, worst to best 10 %")
        axes.plot(rounds, mean, color=COLORS[6], label="Clients' own images, mean")
        axes.plot(rounds, watch.accuracy, color=COLORS[0], label="Test images")
        axes.axhline(target, color="0.35", lw=0.8, ls=(0, (5, 4)), label=f"Target, {target:.0f} %")
        axes.set(xlabel="Round", ylabel="Accuracy (%)", title="The global model over rounds")
        axes.set(xlim=(0, len(mean)), ylim=(0, 101))
