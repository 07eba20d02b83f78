"""The events of a federated round that callbacks can listen to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning_fedscale.types import ClientUpdate, IntArray, Params, RoundRecord


class RoundEvents(Callback):
    """A callback with the hooks that `FederatedStrategy` adds to Lightning's own; here they do nothing.

    Any callback may define any of these hooks, and they are called. This base class only gives their names and types,
    for readers and for completion in editors. ``on_client_start`` and ``on_client_end`` run only on the rank that
    trains the client, the others on every rank:

        on_round_start
            on_client_start     the module holds the global weights
            on_client_end       the module holds this client's weights
            ...                 once for each client of the cohort that this rank trains
        on_before_server_step   all updates are aggregated
        on_server_step          the server optimizer has computed its step from them
        on_round_end            the module holds the new global weights, the Trainer has counted the round

    If a callback defines ``on_probe(trainer, batch=None, flops=0.0)``, it is called when another callback runs an extra
    training step, with such a batch or of so many FLOPs. ``on_client_evaluation(trainer, batch)`` is called before
    another callback runs ``validation_step`` on a batch of a client's own data; it may return a context manager, which
    is active during that step.

    ``pl_module.log`` works in ``on_round_end``; Lightning refuses it in the others.

    Example:
        >>> class Diary(RoundEvents):
        ...     def on_client_end(self, trainer, pl_module, update):
        ...         print(f"client {update.client}: {update.steps} batches, mean loss {update.loss:.3f}")
    """

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Run when round ``round`` (from 0) begins with this cohort, ascending; both are the same on every rank."""

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """Run when client ``client`` begins its local training on this rank."""

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """Run when a client has trained on this rank; ``update.delta`` is a scratch buffer: copy it to keep it."""

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """Run before the server steps along the aggregated ``delta``, which may be changed in place.

        Any change must be the same on every rank. The record is that of the round, with the norm of the unchanged
        delta. This hook is not called in rounds in which nothing may learn.
        """

    def on_server_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Params) -> None:
        """Run before the global model moves by ``-step``, which may be changed in place, equally on every rank."""

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Run when the server has moved the global model; the record is the same on every rank.

        This is just before ``on_train_batch_end``: a checkpoint saved here resumes with the next round.
        """
