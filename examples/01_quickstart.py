"""Federated learning in one argument: handwritten digits at 100 clients, each of which has only a few kinds of them.

python examples/01_quickstart.py          less than a minute; charts and logs go to demo_output/
python examples/01_quickstart.py --fast   a few rounds, to see that everything works
"""

import sys

import lightning.pytorch as pl
import torch
from common import LocalAccuracy, RoundBar, Watch, arguments, console, digit_loaders, report
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.partitioners import DirichletPartitioner


class Classifier(pl.LightningModule):  # An ordinary LightningModule, without a word about clients.
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        layers = [nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(32 * 4 * 4, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.15)


def main():
    args = arguments(__doc__, "demo_output")
    console.print("[bold]Handwritten digits at 100 clients, of which 10 train in every round")
    train, test = digit_loaders(batch_size=8)
    watch, local = Watch(), LocalAccuracy(train.dataset)
    clients = DirichletPartitioner(num_partitions=100, alpha=0.3, min_partition_size=5)
    rounds, target = 5 if args.fast else 100, 93  # percent
    # The one argument that makes training federated. For the Trainer, a round is a step, and `rounds` of them an epoch.
    strategy = FederatedStrategy(partitioner=clients, clients_per_round=10, local_epochs=3, rounds_per_epoch=rounds)
    logger = TensorBoardLogger(args.output, name="tensorboard", default_hp_metric=False)
    trainer = pl.Trainer(
        strategy=strategy, max_epochs=1, val_check_interval=1, accelerator="cpu", num_sanity_val_steps=0,
        logger=logger, callbacks=[watch, local, RoundBar(leave=True)], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), train, test)
    report(args.output, watch, local, clients, target)
    if not args.fast and watch.accuracy[-1] < target:
        sys.exit(f"Test accuracy {watch.accuracy[-1]:.1f} % is below the target of {target} %.")


if __name__ == "__main__":
    main()
