"""A scaling law of one's own: a sweep of sizes and client counts, a fit, and what it says of the next run.

python examples/07_scaling_law.py                 Fashion-MNIST; some minutes; writes to scaling_law/
python examples/07_scaling_law.py --data digits   the same for scikit-learn's digits
python examples/07_scaling_law.py --fast          a small sweep of digits, to see that everything works
"""

import argparse
import functools
import gzip
import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.scaling import LAW_FILE, fit, plan, write_report
from lightning_fedscale.study import sweep

# ------------------------------------------------------- An ordinary Lightning project, whose module has a `size`.


class Images(pl.LightningDataModule):
    """Vectors of pixels and labels, the last of them for validation."""

    def __init__(self, pixels, labels, held_out):
        super().__init__()
        self.train = TensorDataset(pixels[:-held_out], labels[:-held_out])
        self.val = TensorDataset(pixels[-held_out:], labels[-held_out:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=1000)


class Classifier(pl.LightningModule):
    def __init__(self, size, pixels):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(pixels, size), nn.ReLU(), nn.Linear(size, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order]), 397


def fashion_mnist(folder):
    def read(name, header):
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    try:
        parts = [
            (read(f"{part}-images-idx3-ubyte.gz", 16), read(f"{part}-labels-idx1-ubyte.gz", 8))
            for part in ("train", "t10k")
        ]
    except FileNotFoundError:
        print(
            f"Fashion-MNIST is not in {folder}: apt install dataset-fashion-mnist, name its folder by --images, or take"
            " --data digits",
            file=sys.stderr,
        )
        sys.exit(2)
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    pixels = torch.tensor(images.reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
    return F.avg_pool2d(pixels, 2).flatten(1), torch.tensor(labels, dtype=torch.int64), 10_000


# ----------------------------------------------------------------------------------------- From a sweep to advice.


def show(found, console):
    table = Table("", "Value", "95 % interval", title=f"{found.law.name}, fitted to {found.runs} runs")
    for name, each in {**found.intervals, "rho": found.rho}.items():
        table.add_row(name, f"{each.value:.3g}", f"{each.low:.3g} to {each.high:.3g}")
    console.print(table)
    console.print(f"rho: {found.learning_rate}")
    console.print(
        f"Error of the loss: {found.error:.0%}; of the largest runs, by a fit without them: {found.held_out:.0%}"
    )
    for note in found.notes:
        console.print(f"Note: {note}")
    if found.isoflop is not None:
        console.print(f"By parabolas: N* ~ C^{found.isoflop.p}, rho {found.isoflop.rho}")


def advise(law, flops, console):
    for clients in (1, 4, 16):
        best = plan(flops=flops, clients=clients, law=law)
        console.print(
            f"{flops:.1e} FLOPs, clients {clients}: best size {best.params:,.0f} parameters"
            f" ({best.params_low:,.0f} to {best.params_high:,.0f}), loss {best.loss:.3f}"
        )


def train(module, data, law, flops, console):
    """The law beside a run of four clients."""
    accounting = ComputeAccounting(law=law, max_flops=flops)
    trainer = pl.Trainer(
        strategy=FederatedStrategy(num_clients=4, local_epochs=None, local_steps=5, executor="sequential"),
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[accounting],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    position = accounting.position
    said = accounting.no_position if position is None else position.advice()
    console.print(f"Size 64 on four clients: {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a small sweep of digits")
    parser.add_argument("--data", choices=["fashion-mnist", "digits"], default="fashion-mnist")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="their folder")
    parser.add_argument("--output", type=Path, default=Path("scaling_law"), help="folder of runs, law and report")
    args = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*this is an extrapolation")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    console = Console(soft_wrap=True, highlight=False)
    use_digits = args.fast or args.data == "digits"
    pixels, labels, held_out = digits() if use_digits else fashion_mnist(args.images)
    data, task = functools.partial(Images, pixels, labels, held_out), "digits" if use_digits else "Fashion-MNIST"
    module = functools.partial(Classifier, pixels=pixels.shape[1])
    flops = 3e7 if args.fast else 3e8 if use_digits else 1e9

    console.print(f"[bold]{task}: five sizes, three amounts of compute, one client and four")

    def tell(row):
        run = f"  size {row['size']:>2}, clients {row['clients']}, {row['share']:4.0%} of the compute"
        console.print(f"{run}: loss {row['loss']:.3f} at {row['learning_rate']:g} times the learning rate")

    sizes, clients = [4, 8, 16, 32, 64], [1, 4]
    # The learning rate is tuned for every size and number of clients: at one rate, rho comes out as anything.
    rates = [1.0] if args.fast else [0.5, 1.0, 2.0]
    sweep(
        module, data, sizes, flops, clients, rates=rates, folder=args.output, trainer={"accelerator": "cpu"}, each=tell
    )
    found = fit(args.output, task=task)
    law = args.output / LAW_FILE
    found.save(law)
    page = write_report(found, args.output)
    show(found, console)
    if found.problems:
        console.print(f"No best size from these runs: {'; '.join(found.problems)}")
    else:
        advise(law, flops, console)
        train(module(size=64), data(), law, flops, console)
    console.print(f"Law: {law}; report: {page}")


if __name__ == "__main__":
    main()
