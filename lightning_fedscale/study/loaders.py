"""A project's own training data, without a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_fedscale.utils.foreign import is_raised_in


def train_loader(module: pl.LightningModule | None, data: pl.LightningDataModule | None) -> DataLoader[Any]:
    """Return the project's train loader, without a Trainer.

    Args:
        module: module with the loader, if there is no data module.
        data: data module, which is set up for training.

    Raises:
        ValueError: if the loader needs a Trainer, or a DataLoader rejects its arguments.
        TypeError: if it is not a DataLoader.
    """
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    owner: Any = module if data is None else data
    try:
        loader = owner.train_dataloader()
    except Exception as error:
        if is_raised_in(error, "torch.utils.data"):  # an invalid argument of the data, such as a batch size of 0
            raise ValueError(f"{type(owner).__name__}.train_dataloader: {error}") from error
        if not is_raised_in(error, "lightning"):
            raise  # an error in the project's code
        raise ValueError(
            f"{type(owner).__name__}.train_dataloader: {error}. Pass data= (--data), a LightningDataModule, or"
            " give the module a train_dataloader that needs no Trainer."
        ) from error
    if not isinstance(loader, DataLoader):
        raise TypeError(f"train_dataloader returns {type(loader).__name__}: return a torch DataLoader.")
    return loader
