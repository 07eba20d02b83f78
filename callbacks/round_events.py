"""The events of a federated round that callbacks can listen to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning_fedscale.types import ClientUpdate, IntArray, Params, RoundRecord


class RoundEvents(Callback):
    """A callback with the hooks that `FederatedStrategy` adds to Lightning's own; here they do nothing.

    Any callback may define any of them and is told. This base only gives their names and types, for reading and for
    completion in editors. ``on_client_start`` and ``on_client_end`` run only on the rank that trains the client, the
    others on every rank:

        on_round_start
            on_client_start     the module holds the global weights
            on_client_end       the module holds this client's weights
            ...                 once for each client of the cohort that this rank trains
        on_before_server_step   all updates are aggregated
        on_server_step          the server optimizer has made its step of that
        on_round_end            the module holds the new global weights, the Trainer has counted the round

    A callback that defines ``on_probe(trainer, batch=None, flops=0.0)`` is told when another one runs a training step
    on the side, with such a batch or of so many FLOPs; one that defines ``on_client_evaluation(trainer, batch)``, when
    another one is about to run ``validation_step`` on a batch of a client's own data. It may return a context manager,
    which is then active meanwhile.

    ``pl_module.log`` works in ``on_round_end``; in the others Lightning refuses it.

    Example:
        >>> class Diary(RoundEvents):
        ...     def on_client_end(self, trainer, pl_module, update):
        ...         print(f"client {update.client}: {update.steps} batches, mean loss {update.loss:.3f}")
    """

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Round ``round``, counted from 0, begins with this cohort, ascending; the same on every rank."""

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """Client ``client`` begins its local training on this rank."""

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """A client has trained on this rank; ``update.delta`` is a scratch buffer, copy it to keep it."""

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """The server is about to step along the aggregated ``delta``, which may be changed in place.

        What is done to it must be the same on every rank. The record is that of the round, with the delta's norm as it
        comes in. Not called in rounds in which nothing may learn.
        """

    def on_server_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Params) -> None:
        """The global model is about to move by minus ``step``, which may be changed in place, equally on every rank."""

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """The server has moved the global model; the record is the same on every rank.

        Runs just before ``on_train_batch_end``: a checkpoint saved here resumes with the next round.
        """
