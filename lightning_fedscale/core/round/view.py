"""What may be asked of a federation: its data, its method, its clients' models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_fedscale.core.executors.meter import CostMeter
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.options.settings import method_of
from lightning_fedscale.core.round.federation import Federation
from lightning_fedscale.devices import Population
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.partitioners import Partition, Partitioner
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.types import ClientUpdate, IntArray, RoundRecord

if TYPE_CHECKING:
    import pandas as pd


class FederationView:
    """The part of `FederatedStrategy` that users and callbacks read; nothing here belongs to Lightning."""

    _options: Options
    _federation: Federation | None

    @property
    def last_round(self) -> RoundRecord | None:
        """The record of the last finished round, the same on every rank; None before the first."""
        return None if self._federation is None else self._federation.last_round

    @property
    def partition(self) -> Partition | None:
        """The samples of each client; None before ``fit`` has seen the data."""
        return None if self._federation is None else self._federation.partition

    @property
    def num_clients(self) -> int | None:
        """Number of clients; None before ``fit`` has seen the data if the data determine it."""
        return self._options.num_clients if self.partition is None else self.partition.num_clients

    @property
    def partitioner(self) -> Partitioner | Partition:
        """The partitioner, or the finished partition that was given."""
        return self._options.partitioner

    @property
    def cohort_size(self) -> int | None:
        """Number of clients that train in a round; None before ``fit`` has seen the data if the data determine it."""
        return None if self.num_clients is None else self._options.cohort_size(self.num_clients)

    @property
    def local_steps(self) -> int | None:
        """Batches of a client in a round; None if ``local_epochs`` counts instead, or the number varies by round."""
        steps = self._options.local_steps
        return steps if isinstance(steps, int) else None

    @property
    def method(self) -> dict[str, Any]:
        """Training and aggregation rules by argument, in words; runs with equal rules use the same method."""
        return method_of(self._options)

    @property
    def population(self) -> Population | None:
        """The simulated hardware of the clients, as it was given."""
        return self._options.population

    def population_table(self) -> pd.DataFrame:
        """Return the device classes, one row each: clients, batch sizes, peak memory and simulated speed.

        Raises:
            RuntimeError: without a population, or before ``fit`` has seen the data.
        """
        fleet = None if self._federation is None else self._federation.fleet
        if fleet is None:
            raise RuntimeError("population_table is known once fit has begun with FederatedStrategy(population=...).")
        return fleet.table()

    @property
    def local_accumulation(self) -> int:
        """Batches per optimizer step of a client: the Trainer's ``accumulate_grad_batches``."""
        return 1 if self._federation is None else self._federation.fit.scope.accumulation

    def client_sizes(self, dataset: Any) -> IntArray:
        """Return the number of samples of a dataset that each client would get."""
        return self._options.partition(dataset).sizes

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Divide further data, such as a validation set, so that each client gets the kind of data it trains on.

        See `lightning_fedscale.partitioners.Partitioner.divide_alike`; for a `Partition`, the labels of both datasets
        decide if these are classes, else the sizes.

        Raises:
            RuntimeError: before ``fit`` has seen the training data.
            TypeError, ValueError: if the labels or ids that decide cannot be found.
        """
        if self._federation is None or self.partition is None:
            raise RuntimeError(
                "divide_alike: the clients' training data is known only once fit has begun: call it then."
            )
        return self._federation.divide_alike(dataset, seed)

    @property
    def personal(self) -> tuple[str, ...] | Ditto | None:
        """The personal part of each client: patterns of names, a whole model by `Ditto`, or None."""
        return self._options.algorithm.ditto or self._options.algorithm.own or None

    def personal_model(self, client: int) -> dict[str, Any] | None:
        """Return a client's personal model as a state dict of the module; needs ``FederatedStrategy(personal=...)``.

        Personal parameters and buffers are as the client's last round left them; the others, and all of them before
        its first round, are the global model's. With `Ditto` it is the client's whole model. Call it between rounds or
        after ``fit``.

        Args:
            client: its number.

        Returns:
            None if another rank has it; `holder_of` names that rank.

        Raises:
            ValueError: if clients have no personal models.
            RuntimeError: before ``fit`` has seen the data.
            IndexError: if there is no such client.
        """
        if self.personal is None:
            raise ValueError("personal_model: clients have no personal models: pass FederatedStrategy(personal=...).")
        if self._federation is None or self.partition is None:
            raise RuntimeError("personal_model: clients have personal models only once fit has begun: call it then.")
        self.partition.client(client)
        return self._federation.personal_model(client)

    def holder_of(self, client: int) -> int | None:
        """Return the rank that stores a client's state between rounds; None if any rank can be asked."""
        return None if self._federation is None else self._federation.fit.clients.holder(client)

    @property
    def server_optimizer(self) -> ServerOptimizer:
        """The optimizer by which the server moves the global model."""
        return self._options.server_optimizer

    def weight_of(self, update: ClientUpdate) -> float:
        """Return the weight of a client in the aggregate, before normalisation."""
        return self._options.algorithm.weigh(update)

    def meter_clients(self, meter: CostMeter) -> None:
        """Meter every client's training, for ``RoundRecord.flops``; callbacks call this in ``on_fit_start``.

        Args:
            meter: reports the cost of a client's training, on the rank that trained it.
        """
        assert self._federation is not None
        self._federation.fit.meter = meter

    def first_batches(self) -> Iterator[tuple[int, Any]]:
        """Yield each client of this rank with its first batch of the round; callbacks call this in ``on_round_start``.

        The batches are on the device. They are loaded for this call only: the round loads its own, with the same
        random numbers as if this call had not been made.
        """
        return iter(()) if self._federation is None else self._federation.first_batches()
