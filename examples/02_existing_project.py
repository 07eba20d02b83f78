"""A project as it was, and the same project made federated by one argument of its Trainer.

It is longer than the other examples, because it has all that is in a project: schedulers, checkpoints, early stopping.

python examples/02_existing_project.py          about ten seconds
python examples/02_existing_project.py --fast   a few epochs, to see that everything works
"""

import lightning.pytorch as pl
import torch
from common import arguments, digits, show
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_fedscale import FederatedStrategy


class Digits(pl.LightningModule):
    def __init__(self, width=64):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10)),
        )

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, name="val"):
        logits = self.net(batch[0])
        self.log(f"{name}_loss", F.cross_entropy(logits, batch[1]))
        self.log(f"{name}_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.3, patience=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


CPU = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def usual(name, args):
    """Return what this project always passes to its Trainer."""
    return {
        "max_epochs": 3 if args.fast else 60,
        "gradient_clip_val": 1.0,
        "logger": TensorBoardLogger(args.output, name=name, default_hp_metric=False),
        "callbacks": [ModelCheckpoint(monitor="val_loss"), EarlyStopping(monitor="val_loss", patience=12)],
        "log_every_n_steps": 10,
        **CPU,
    }


def run(trainer):
    pl.seed_everything(0, verbose=False)
    train, val, test = random_split(TensorDataset(*digits()), [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))
    module = Digits()
    trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(val, 512))
    (best,) = trainer.test(module, DataLoader(test, 512), ckpt_path="best", verbose=False)
    unit = "rounds" if isinstance(trainer.strategy, FederatedStrategy) else "batches"
    return {
        "Test accuracy of the best checkpoint": f"{best['test_accuracy']:.1%}",
        "Epochs until early stopping or the end": f"{trainer.current_epoch}",
        "Steps of the Trainer": f"{trainer.global_step} {unit}",
        "Learning rate at the end": f"{trainer.optimizers[0].param_groups[0]['lr']:.1g}",
    }


def main():
    args = arguments(__doc__, "demo_output/existing_project")
    before = pl.Trainer(**usual("before", args))
    after = pl.Trainer(**usual("after", args), strategy=FederatedStrategy(num_clients=10))
    results = [run(before), run(after)]
    rows = [(name, *(each[name] for each in results)) for name in results[0]]
    show(["", "before", "after"], rows, title="The same project, before and after adding one argument")


if __name__ == "__main__":
    main()
