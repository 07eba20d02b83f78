"""DiLoCo on two processes: AdamW that lives on between rounds inside, Nesterov momentum outside, and few exchanges.

python examples/11_diloco.py          a few minutes; writes demo_output/diloco.png
python examples/11_diloco.py --fast   a few rounds, to see that everything works

As with every strategy of Lightning on several devices, the Trainer starts this script once more for the other process.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, server

PROCESSES = 2
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
        scores = self.net(images)
        self.log("loss", F.cross_entropy(scores, labels), sync_dist=True)
        self.log("accuracy", (scores.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """The loss on test images after so many exchanges, and who trained."""

    def __init__(self):
        self.exchanges, self.losses, self.accuracy, self.ranks = [], [], 0.0, []

    def on_validation_end(self, trainer, module):
        self.exchanges.append(trainer.global_step)  # A step of data parallelism, or a round.
        self.losses.append(trainer.callback_metrics["loss"].item())
        self.accuracy = trainer.callback_metrics["accuracy"].item()
        if isinstance(trainer.strategy, FederatedStrategy):
            self.ranks = trainer.strategy.last_round.ranks.tolist()
        else:
            self.ranks = list(range(trainer.world_size))


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=16, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test], labels[test]), batch_size=180)


def train(strategy, exchanges, every):
    """So many exchanges, and a look at the test images after every so many of them."""
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=strategy,
        devices=PROCESSES,
        max_steps=exchanges,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        callbacks=[watch],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), *data())
    return watch, trainer.is_global_zero


def diloco(steps):
    return FederatedStrategy(
        num_clients=PROCESSES,
        local_steps=steps,
        client_optimizer="keep",
        server_optimizer=server.nesterov(lr=0.7, momentum=0.9),
        process_group_backend="gloo",
    )


def draw(runs, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, watch), color in zip(runs.items(), COLORS, strict=True):
        axes.plot(watch.exchanges, watch.losses, color=color, lw=1.4, marker=".", label=label)
    axes.set(xlabel="Exchanges between the processes", ylabel="Test loss", xscale="log", yscale="log")
    axes.set_title("The same number of local steps, fewer exchanges")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    args = parser.parse_args()
    total, few, many = (40, 5, 20) if args.fast else (1000, 10, 50)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.

    found = {}
    found["data parallel"], first = train(DDPStrategy(process_group_backend="gloo"), total, every=few)
    for steps in (few, many):
        found[f"DiLoCo, {steps} local steps"], first = train(diloco(steps), total // steps, every=1)
    if not first:
        return  # Both processes come here; one of them reports.

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{PROCESSES} processes, {total} local steps each, AdamW")
    table = Table("", "exchanges", "ranks", "loss", "accuracy")
    for label, watch in found.items():
        ranks = " and ".join(map(str, watch.ranks))
        table.add_row(label, str(watch.exchanges[-1]), ranks, f"{watch.losses[-1]:.3f}", f"{watch.accuracy:.1%}")
    console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, args.output / "diloco.png")
    console.print(f"Figure: {args.output / 'diloco.png'}")


if __name__ == "__main__":
    main()
