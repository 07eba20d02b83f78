"""Where the Trainer keeps loaders, and what it does with them; see `trainer_state`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import _worker_check
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from lightning.pytorch.utilities.data import _dataloader_init_kwargs_resolve_sampler
from torch.utils.data import DataLoader

from lightning_fedscale.core.lightning.trainer_state import replaced


def train_source(trainer: pl.Trainer) -> Any:
    """Return where training data come from: a loader, or the object whose ``train_dataloader()`` makes one.

    Lightning: `_data_source` of the fit loop. `trainer.train_dataloader` is None until the loop has set it up.
    Upgrade: `_DataLoaderSource` in `trainer/connectors/data_connector.py`.
    """
    return trainer.fit_loop._data_source


def val_source(trainer: pl.Trainer) -> Any:
    """Return where validation data come from, as `train_source` does.

    Lightning: `_data_source` of the validation loop. `trainer.val_dataloaders` is None where the Trainer does not
    validate.
    Upgrade: as for `train_source`.
    """
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def combined_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """Return what Lightning has made of the train loader; None before.

    Lightning: `_combined_loader` of the fit loop. `trainer.train_dataloader` gives what is inside it only.
    Upgrade: `_FitLoop.setup_data` in `loops/fit_loop.py`.
    """
    return trainer.fit_loop._combined_loader


def forget_loader(trainer: pl.Trainer) -> None:
    """Have the Trainer ask for the train loader again.

    Lightning: `_combined_loader` of the fit loop, which keeps it; reloading is otherwise done between epochs only.
    Upgrade: `_FitLoop.setup_data` in `loops/fit_loop.py`.
    """
    trainer.fit_loop._combined_loader = None


def is_asked_by_trainer(trainer: pl.Trainer, iterator: Iterator[Any]) -> bool:
    """Return whether the Trainer uses this iterator over the train loader, and not a callback.

    Lightning: `_iterator` of the `_combined_loader` holds the iterators in use, and nobody says who made one.
    Upgrade: `CombinedLoader.__iter__` in `utilities/combined_loader.py`.
    """
    running = getattr(trainer.fit_loop._combined_loader, "_iterator", None)
    return running is None or any(each is iterator for each in running.iterators)


def warn_of_few_workers(trainer: pl.Trainer, loader: object) -> None:
    """Warn as Lightning does of a train loader with few worker processes.

    Lightning: `_worker_check`, which looks at a `DataLoader` only, and the Trainer's is no such one here.
    Upgrade: `_FitLoop.setup_data` in `loops/fit_loop.py`.
    """
    _worker_check(trainer, loader, "train_dataloader")


def without_distributed_sampler(trainer: pl.Trainer, *, elsewhere: bool) -> Callable[[], None]:
    """Keep Lightning from putting a DistributedSampler into the train loader; return a function that undoes it.

    To put one in, Lightning builds the loader again, which loses whether the user's one shuffles, and fails for loaders
    of the user's own kind that make their sampler themselves.

    Lightning: `_requires_distributed_sampler` of the `_data_connector` decides for every loader.
    `use_distributed_sampler` does so for all loaders together, and before the strategy is asked.
    Upgrade: `_DataConnector._prepare_dataloader` in `trainer/connectors/data_connector.py`.

    Args:
        trainer: the Trainer.
        elsewhere: whether loaders of other stages get one where Lightning would put it in.
    """
    connector = trainer._data_connector
    requires = connector._requires_distributed_sampler
    return replaced(
        connector,
        "_requires_distributed_sampler",
        lambda loader: elsewhere and not trainer.training and requires(loader),
    )


def copied_loader(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Copy a loader with other attributes, without calling its class, whose arguments are unknown.

    Lightning: `_iterator`, which is torch's, holds persistent workers, and the copy must have its own.
    Upgrade: `torch.utils.data.DataLoader.__iter__`.
    """
    mine = copy.copy(loader)
    for name, value in {"_iterator": None, **attributes}.items():
        object.__setattr__(mine, name, value)  # DataLoader's own setter forbids it once it is built
    return mine


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop a loader's worker processes.

    Lightning: `_shutdown_workers_and_reset_iterator`; torch stops persistent workers only when they are collected.
    Upgrade: `utilities/combined_loader.py`.
    """
    _shutdown_workers_and_reset_iterator(loader)


def batches_of(loader: DataLoader[Any], indices: Iterable[int]) -> Iterable[Any]:
    """Return the batches into which a loader's batch sampler, of any kind, cuts these indices.

    Lightning: `_dataloader_init_kwargs_resolve_sampler` builds a batch sampler of the same kind with other indices, as
    for the DistributedSampler.
    Upgrade: `utilities/data.py`.
    """
    batches: Iterable[Any] = _dataloader_init_kwargs_resolve_sampler(loader, indices)["batch_sampler"]
    return batches
