"""A project as it was, and the same project made federated by one argument of its Trainer.

python examples/02_existing_project.py          about ten seconds
python examples/02_existing_project.py --fast   a few epochs, to see that everything works
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy

from lightning_fedscale import FederatedStrategy

# ------------------------------------------------------------------------------------------- Somebody's project, as is.


class DigitsData(pl.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        digits = load_digits()
        everything = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
        self.train, self.val, self.test = random_split(everything, [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 512)

    def test_dataloader(self):
        return DataLoader(self.test, 512)


class DigitsModule(pl.LightningModule):
    def __init__(self, width=64, dropout=0.2, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, 10),
        )
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            Accuracy(task="multiclass", num_classes=10) for _ in range(3)
        )

    def training_step(self, batch, batch_idx):
        loss, logits = self._loss(batch)
        self.train_accuracy(logits, batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, logits = self._loss(batch)
        self.val_accuracy(logits, batch[1])
        self.log("val_loss", loss)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch, batch_idx):
        loss, logits = self._loss(batch)
        self.test_accuracy(logits, batch[1])
        self.log_dict({"test_loss": loss, "test_accuracy": self.test_accuracy})

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.3, patience=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    def _loss(self, batch):
        inputs, labels = batch
        logits = self.net(inputs)
        return F.cross_entropy(logits, labels), logits


def usual(name, args):
    """What this project always passes to its Trainer."""
    return {
        "max_epochs": 3 if args.fast else 60,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "logger": TensorBoardLogger(args.output, name=name, default_hp_metric=False),
        "callbacks": [
            ModelCheckpoint(monitor="val_loss"),
            EarlyStopping(monitor="val_loss", patience=12),
            LearningRateMonitor(),
        ],
        "log_every_n_steps": 10,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


# ---------------------------------------------------------------------------------------------------- Before and after.


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few epochs only")
    parser.add_argument("--output", type=Path, default=Path("demo_output/existing_project"), help="folder for logs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.

    before = pl.Trainer(**usual("before", args))
    after = pl.Trainer(**usual("after", args), strategy=FederatedStrategy(num_clients=10))

    console = Console()
    results = {}
    for name, trainer in {"before": before, "after": after}.items():
        with console.status(f"Training the project as it is {name} the change"):
            results[name] = run(trainer)
    table = Table("", "before", "after", title="The same project, before and after adding one argument")
    for row in results["before"]:
        table.add_row(row, results["before"][row], results["after"][row])
    console.print(table)


def run(trainer):
    pl.seed_everything(0, verbose=False)
    module, data = DigitsModule(), DigitsData()
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
    best = trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)[0]
    federated = isinstance(trainer.strategy, FederatedStrategy)
    return {
        "Test accuracy of the best checkpoint": f"{best['test_accuracy']:.1%}",
        "Test loss of the best checkpoint": f"{best['test_loss']:.3f}",
        "Epochs until early stopping or the end": f"{trainer.current_epoch}",
        "Steps of the Trainer": f"{trainer.global_step} {'rounds' if federated else 'batches'}",
        "Learning rate at the end": f"{learning_rate:.1g}",
        "Seconds": f"{seconds:.1f}",
    }


if __name__ == "__main__":
    main()
