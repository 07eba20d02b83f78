"""What a run costs, and where its model stands: ten clients read digits, under a law that is known.

python examples/06_compute_accounting.py          some seconds; TensorBoard files in lightning_logs/
python examples/06_compute_accounting.py --fast   a few rounds, to see that everything works
"""

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.scaling import Rosenfeld


class Classifier(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds")
    rounds = 3 if parser.parse_args().fast else 60
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target))

    # A law made up for this example. `fedscale fit` finds one for your own task; until then leave `law` out, and what
    # was spent is counted all the same.
    law = Rosenfeld(E=0.05, A=30.0, B=200.0, alpha=0.6, beta=0.7)
    accounting = ComputeAccounting(law=law)
    logger = TensorBoardLogger("lightning_logs", name="compute")
    trainer = pl.Trainer(
        max_epochs=rounds, callbacks=[accounting], logger=logger, accelerator="cpu",
        strategy=FederatedStrategy(num_clients=10), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(width=128), DataLoader(data, batch_size=16, shuffle=True))

    per_client = accounting.ledger.training_flops / 10
    print(f"\nEach client spent {per_client / 1e6:,.1f} MFLOPs on average; the figure and the curves:")
    print(f"  tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
