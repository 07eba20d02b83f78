"""Private training: what a privacy budget costs in accuracy, and training that ends before the budget is exceeded.

python examples/09_private_training.py          a few minutes; writes demo_output/private_training.png
python examples/09_private_training.py --fast   fewer rounds and a smaller budget, to see that everything works
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
from lightning_fedscale.privacy import dp_fed_avg

CLIENTS, SHARE = 400, 0.1  # Each client takes part in a round with this probability, whatever the others do.
CLIP, DELTA = 0.5, 1e-3  # A client moves the model by no more than CLIP; DELTA is well below 1 / CLIENTS.
COLORS = ["#332288", "#117733", "#CC6677"]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)  # Noise is added to every parameter: few are better.

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Watch(pl.Callback):
    """How accurate the global model was after every round, and what had been spent of the budget."""

    def __init__(self):
        self.epsilon, self.accuracy = [], []

    def on_validation_end(self, trainer, module):
        self.epsilon.append(trainer.strategy.last_round.epsilon)
        self.accuracy.append(trainer.callback_metrics["accuracy"].item())


def data():
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    loader = DataLoader(TensorDataset(images[train].flatten(1), labels[train]), batch_size=4, shuffle=True)
    return loader, DataLoader(TensorDataset(images[test].flatten(1), labels[test]), batch_size=512)


def train(privacy, rounds):
    """At most so many rounds; a privacy with a budget may end them earlier."""
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=FederatedStrategy(
            num_clients=CLIENTS,
            clients_per_round=SHARE,
            sampler="poisson",  # What the accountant assumes.
            local_epochs=2,
            rounds_per_epoch=rounds,
            privacy=privacy,
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


def draw(runs, budget, path):
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, watch), color in zip(runs.items(), COLORS, strict=True):
        rounds = range(1, len(watch.accuracy) + 1)
        left.plot(rounds, [100 * value for value in watch.accuracy], color=color, lw=1.4, label=label)
        if watch.epsilon[-1] is not None:
            right.plot(rounds, watch.epsilon, color=color, lw=1.4, label=label)
    right.axhline(budget, color="#444444", lw=1, ls="--")
    right.text(1, budget, "budget", va="bottom")
    left.set(xlabel="Round", ylabel="Test accuracy (%)", title="What privacy costs", ylim=(0, 101))
    right.set(xlabel="Round", ylabel=f"Epsilon, at delta = {DELTA:g}", title="What is spent", xlim=left.get_xlim())
    right.set_ylim(0, 1.15 * budget)
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer rounds, a smaller budget")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the figure")
    args = parser.parse_args()
    rounds, budget = (12, 2.0) if args.fast else (120, 2.5)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{CLIENTS} clients; at most {rounds} rounds, and epsilon at most {budget:g}")

    found = {"no privacy": train(None, rounds)}
    for noise in (0.8, 1.5):
        privacy = dp_fed_avg(clip_norm=CLIP, noise_multiplier=noise, delta=DELTA, max_epsilon=budget)
        found[f"noise {noise:g}"] = train(privacy, rounds)

    table = Table("", "rounds", "epsilon", "accuracy")
    for label, watch in found.items():
        spent = watch.epsilon[-1]
        epsilon = "none" if spent is None else f"{spent:.3f}"
        table.add_row(label, str(len(watch.accuracy)), epsilon, f"{watch.accuracy[-1]:.1%}")
    console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, budget, args.output / "private_training.png")
    console.print(f"Figure: {args.output / 'private_training.png'}")


if __name__ == "__main__":
    main()
