"""A project's own training data, before there is a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_fedscale.utils.foreign import is_raised_in


def train_loader(module: pl.LightningModule | None, data: pl.LightningDataModule | None) -> DataLoader[Any]:
    """The project's train loader, without a Trainer.

    Args:
        module: has it, if there is no data module.
        data: is set up for training.

    Raises:
        ValueError: if it cannot be had without a Trainer, or a DataLoader refuses its arguments.
        TypeError: if it is no DataLoader.
    """
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    owner: Any = module if data is None else data
    try:
        loader = owner.train_dataloader()
    except Exception as error:
        if is_raised_in(error, "torch.utils.data"):  # a batch of 0, say: a wrong argument of the data's
            raise ValueError(f"{type(owner).__name__}.train_dataloader: {error}") from error
        if not is_raised_in(error, "lightning"):
            raise  # a mistake of the project's own
        raise ValueError(
            f"{type(owner).__name__}.train_dataloader: {error}. Pass --data, a LightningDataModule, or give the module"
            " a train_dataloader that needs no Trainer."
        ) from error
    if not isinstance(loader, DataLoader):
        raise TypeError(f"train_dataloader returns {type(loader).__name__}: this command needs a DataLoader.")
    return loader
