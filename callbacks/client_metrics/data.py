"""The validation data of each client, found and checked before training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, TypeAlias

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch.utils.data import DataLoader

from lightning_fedscale.core.executors import ClientLoader
from lightning_fedscale.core.lightning.data_loaders import val_source
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.partitioners import Partition, Partitioner, by_name, check_partition
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import IntArray
from lightning_fedscale.utils import randomness

Loaders: TypeAlias = DataLoader[Any] | Sequence[DataLoader[Any]]
"""One loader whose dataset is partitioned, or one loader for each client."""


class OwnData:
    """Every client's own validation data.

    Args:
        loaders: a single loader over the data of all clients, or one for each client.
        partition: partition of a single loader's samples; None if each client has a loader.
        seed: seed of the random numbers for loading and evaluating a client.

    Attributes:
        sizes: number of samples of each client.
    """

    def __init__(self, loaders: list[ClientLoader], partition: Partition | None, seed: int) -> None:
        self._loaders = loaders
        self._partition = partition
        self._seed = randomness.derive(seed, randomness.EVALUATION)
        sizes = [len(loader.dataset) for loader in loaders]  # type: ignore[arg-type]
        self.sizes: IntArray = np.array(sizes) if partition is None else partition.sizes
        for loader in loaders:
            loader.drop_last = False  # a client's last batch may be its only one

    def of(self, clients: Sequence[int], round: int) -> Iterator[tuple[LocalWork, Iterator[Any]]]:
        """Yield each client's work and its batches, which must be exhausted before the next client.

        Args:
            clients: clients that have data.
            round: index of the round; it varies the random numbers.
        """
        for number, mine in groupby(clients, lambda client: 0 if self._partition is not None else client):
            loader = self._loaders[number]
            works = [self._work(client, loader, round) for client in mine]
            stream = loader.stream(works, randomness.derive(self._seed, randomness.LOADER, round, number))
            for work in works:
                yield work, islice(stream, len(work.batches))
            if self._partition is None:
                loader.close()

    def close(self) -> None:
        """Stop worker processes."""
        for loader in self._loaders:
            loader.close()

    def _work(self, client: int, loader: ClientLoader, round: int) -> LocalWork:
        own = np.arange(self.sizes[client]) if self._partition is None else np.sort(self._partition.client(client))
        return LocalWork(client, len(own), loader.batches(own), (0, 0), (self._seed, round))


def own_data(
    trainer: pl.Trainer, loaders: Loaders | None, partitioner: str | Partitioner | Partition | None, seed: int
) -> OwnData:
    """Find every client's validation data.

    Args:
        trainer: the Trainer in ``on_train_start``, with a `FederatedStrategy`.
        loaders: the user's loaders; None for the Trainer's validation loader.
        partitioner: how a single loader's dataset is divided; None divides it like the training data.
        seed: seed of the partition.

    Raises:
        TypeError, ValueError: if the data cannot be found; the message names the remedy.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, FederatedStrategy)
    assert strategy.num_clients is not None
    name = "val_dataloader" if loaders is None else "dataloaders"
    given = _trainers(trainer) if loaders is None else loaders
    if isinstance(given, list | tuple):
        if len(given) != strategy.num_clients:
            raise ValueError(
                f"ClientMetrics: dataloaders: got {len(given)} loaders for {strategy.num_clients} clients: pass one for"
                " each client, or a single one whose dataset is to be divided."
            )
        each = [_loader(one, f"dataloaders[{i}]") for i, one in enumerate(given)]
        return OwnData(each, None, seed)
    loader = _loader(given, name)
    partition = _divided(strategy, loader.dataset, partitioner, seed)
    empty = int((partition.sizes == 0).sum())
    if empty == partition.num_clients:
        raise ValueError(
            "ClientMetrics: no client has a validation sample, since no label or id of theirs occurs in the validation"
            " data: pass partitioner=, or dataloaders= with one for each client."
        )
    if empty:
        rank_zero_info(
            f"ClientMetrics: {empty} of {partition.num_clients} clients have no validation samples and are left out."
        )
    loader.keep_on(strategy.root_device, "auto", seed=seed, show_progress=False)
    return OwnData([loader], partition, seed)


def _loader(given: Any, name: str) -> ClientLoader:
    # Here each client has a last batch. If that is a single sample, which a module need not support, it is merged.
    return ClientLoader(given, merge_single=True, name=f"ClientMetrics: {name}")


def _trainers(trainer: pl.Trainer) -> Any:
    """Return the Trainer's validation loader, even if the Trainer does not validate."""
    given: Any = trainer.val_dataloaders
    source = val_source(trainer)
    if given is None and source.is_defined():
        with randomness.untouched():
            given = source.dataloader()
    if isinstance(given, CombinedLoader):
        given = given.iterables
    several = list(given.values()) if isinstance(given, Mapping) else given
    if isinstance(several, list | tuple) and len(several) == 1:
        return several[0]
    if not several or isinstance(several, list | tuple):
        found = f"{len(several)} validation loaders" if several else "no validation loader"
        raise ValueError(
            f"ClientMetrics: found {found}, but it divides the data of exactly one among the clients: pass that one as"
            " ClientMetrics(dataloaders=...)."
        )
    return given


def _divided(
    strategy: FederatedStrategy, dataset: Any, partitioner: str | Partitioner | Partition | None, seed: int
) -> Partition:
    count = strategy.num_clients
    assert count is not None
    try:
        if partitioner is None:
            return strategy.divide_alike(dataset, seed)
        if isinstance(partitioner, Partition):
            partition = partitioner
        else:
            # A copy, since it may be the partitioner of the strategy, which holds the training data.
            mine = by_name(partitioner, count) if isinstance(partitioner, str) else copy.copy(partitioner)
            mine.dataset = dataset
            partition = mine.partition
        check_partition(partition, len(dataset))
    except (TypeError, ValueError) as error:
        how = "as the training data are" if partitioner is None else f"by partitioner={partitioner!r}"
        raise ValueError(
            f"ClientMetrics: the validation data cannot be divided {how} ({error}): pass another partitioner=, or"
            " dataloaders= with one for each client."
        ) from error
    if partition.num_clients != count:
        raise ValueError(
            f"ClientMetrics: partitioner={partitioner!r} divides the validation data among {partition.num_clients}"
            f" clients, and there are {count}: pass one for {count} clients, or leave it out to divide it like the"
            " training data."
        )
    return partition
