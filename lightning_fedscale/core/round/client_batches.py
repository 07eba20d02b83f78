"""Clients' batches on their way to the device: a round's stream of them, and single ones made a second time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedscale.core.executors import ClientLoader, SharedTensors, Transfer
from lightning_fedscale.core.executors.meter import ClientMeter
from lightning_fedscale.core.lightning.half_batch_gradients import mean_gradient
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.flat_view import as_real


class ClientBatches:
    """Makes the batches of a rank's clients.

    Args:
        trainer: the Trainer.
        loader: the user's train loader, cut into batches of clients.
        transfer: brings batches to the device.
        seed: of the federation.
        rank: this process.

    Attributes:
        loader: as given.
    """

    def __init__(self, trainer: pl.Trainer, loader: ClientLoader, transfer: Transfer, *, seed: int, rank: int) -> None:
        self.loader = loader
        self._trainer = trainer
        self._transfer = transfer
        self._device = trainer.strategy.root_device
        self._seed = seed
        self._rank = rank

    @property
    def draw_random_numbers(self) -> bool:
        """Whether making a batch may draw from the global generators; cutting it out of cached data does not."""
        return self.loader.cache is None or self._transfer.has_hooks

    def stream(self, round: int, work: list[LocalWork], order: Iterable[tuple[int, int]] | None) -> Iterator[Any]:
        """Return an iterator over the collated batches of these clients, in the given order or client by client."""
        if not work:
            return iter(())
        seed = randomness.derive(self._seed, randomness.LOADER, round, self._rank)
        batches = self.loader.stream(work, seed, order)
        return self._transfer.ahead(batches) if self.loader.in_workers else batches

    def first_of(self, work: Iterable[LocalWork]) -> Iterator[tuple[int, Any]]:
        """Yield each of these clients and its first batch, made a second time and moved to the device.

        Nothing is drawn from the global generators, and clients whose first batch is None are left out.
        """
        for each in work:
            with randomness.untouched():
                randomness.seed_globals(each.seed, self._device)
                batch = self.loader.fetch(each.batches[0])
                batch = batch if batch is None else self._transfer(batch)
            if batch is not None:
                yield each.client, batch

    def gradient(self, work: LocalWork, shared: SharedTensors, tally: ClientMeter | None) -> Tensor:
        """Return the mean gradient of a client's batches of this round at the model that the module holds."""
        with randomness.untouched():
            randomness.seed_globals(work.seed, self._device)
            batches = [(self.loader.fetch(indices), len(indices)) for indices in work.batches]
            ready = [(self._transfer(batch), size) for batch, size in batches if batch is not None]
        counted = {} if tally is None else {"metered": tally.again}
        found = mean_gradient(self._trainer, self._trainer.lightning_module, ready, **counted)
        return torch.cat([as_real(found[name]).flatten().double() for name in shared.names])
