"""Somebody's script: digits, a small network, Lightning's Trainer."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.functional import accuracy


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", accuracy(self.net(images), labels, task="multiclass", num_classes=10), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main():
    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(data, [0.8, 0.2])
    trainer = pl.Trainer(max_epochs=10, accelerator="cpu", log_every_n_steps=10)
    trainer.fit(Digits(), DataLoader(train, 32, shuffle=True), DataLoader(val, 512))
    print(f"val_acc {trainer.callback_metrics['val_acc']:.3f}")


if __name__ == "__main__":
    main()
