"""Which size, batch, local steps and method do eight unlike hospitals call for? Measured, in two minutes.

python examples/13_size.py          two minutes of studies; writes to size_study/
python examples/13_size.py --fast   a few seconds, to see that everything works
"""

import argparse
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

from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.study import sentences, size, write
from lightning_fedscale.study.answer_page import rows_of

# ------------------------------------------------------- An ordinary Lightning project, whose module has a `width`.


class Digits(pl.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        pixels, labels = torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
        self.train = TensorDataset(pixels[:1400], labels[:1400])
        self.val = TensorDataset(pixels[1400:], labels[1400:])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 397)


class Classifier(pl.LightningModule):
    def __init__(self, width=256, lr=0.1):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


# ---------------------------------------------------------------------------------------------- The question.


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a small study, to see that everything works")
    parser.add_argument("--folder", default="size_study", help="where runs and the page go")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    hospitals = DirichletPartitioner(num_partitions=8, alpha=0.3, seed=1)
    small = {"sizes": [64, 256], "methods": ["fed_avg", "scaffold"], "rates": [1.0], "local_steps": [5]}
    answer = size(
        Classifier,
        Digits,
        flops=2e8 if args.fast else 2e9,
        argument="width",
        partition=hospitals,
        study_minutes=0.05 if args.fast else 2.0,
        seeds=2 if args.fast else 3,
        folder=Path(args.folder, "fast" if args.fast else "runs"),
        trainer={"accelerator": "cpu"},
        say=print,
        **small if args.fast else {},
    )
    page = write(answer, args.folder)

    console = Console(soft_wrap=True, highlight=False)
    rows = rows_of(answer)
    table = Table(*rows[0], title=f"{answer.flops:.3g} FLOPs, {answer.clients} hospitals")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for line in sentences(answer):
        console.print(line)
    console.print(f"Page: {page}")


if __name__ == "__main__":
    main()
