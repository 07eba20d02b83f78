"""What a run costs, and how its model's size compares with the best one: ten clients read digits, under a known law.

python examples/06_compute_accounting.py          some seconds; TensorBoard files in lightning_logs/
python examples/06_compute_accounting.py --fast   a few rounds, to see that everything works
"""

import logging

import lightning.pytorch as pl
from common import QUIET, arguments, console, digits, perceptron, tensorboard
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.scaling import Rosenfeld


def main():
    args = arguments(__doc__, "lightning_logs")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    # A law made up for this example. `fedscale fit` finds one for your own task; without `law`, the callback still
    # counts the FLOPs.
    law = Rosenfeld(E=0.05, A=30.0, B=200.0, alpha=0.6, beta=0.7)
    accounting = ComputeAccounting(law=law)
    logger = TensorBoardLogger(args.output, name="compute")
    trainer = pl.Trainer(
        **QUIET | {"logger": logger},
        strategy=FederatedStrategy(num_clients=10),
        max_epochs=3 if args.fast else 60,  # an epoch is a round
        callbacks=[accounting],
    )
    trainer.fit(perceptron(128, lr=0.1), DataLoader(TensorDataset(*digits()), batch_size=16, shuffle=True))

    console.print(f"Each client spent {accounting.ledger.training_flops / 10 / 1e6:,.1f} MFLOPs on average")
    tensorboard(logger.log_dir)


if __name__ == "__main__":
    main()
