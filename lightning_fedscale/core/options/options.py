"""The arguments of `FederatedStrategy`, checked once and listed once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

from lightning_fedscale.aggregators import Aggregator, weighted_sum
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.options import argument_checks as checks
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.options.argument_checks import Check, LocalSteps, choice, optional
from lightning_fedscale.devices import Population
from lightning_fedscale.local_rules import Ditto, LocalRule
from lightning_fedscale.partitioners import FinishedPartitioner, Partition, Partitioner, check_partition
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.samplers import Sampler
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.types import IntArray
from lightning_fedscale.utils.buffers import Policy
from lightning_fedscale.utils.checks import flag, integer
from lightning_fedscale.utils.memory import parse_bytes

_OPTIMIZER = choice(
    "reset", "keep",
    remedy="choose 'reset', a fresh optimizer in every round, or 'keep', the optimizer's state stays with the client.",
)  # fmt: skip
_EXECUTOR = choice("auto", "sequential", "vectorized", remedy="choose 'auto', 'sequential' or 'vectorized'.")
_CACHE = choice("auto", True, False, remedy="choose 'auto', True or False.")


@dataclass(frozen=True)
class Options:
    """The arguments of `FederatedStrategy` by their names, each as it is used; see there for their meaning.

    Beside the type is the check, which takes the argument's name and the user's value and returns the value to be used.

    What users may give in several ways is here in one: rules by name are objects, and

    - ``num_clients`` is that of the partitioner, None if it is inferred from the data, as with natural ids;
    - one of ``local_epochs`` and ``local_steps`` is None;
    - ``aggregator`` is the sum that privacy needs, if there is privacy;
    - ``client_state_memory`` is in bytes, None for "auto".
    """

    num_clients: Annotated[int | None, optional(integer)]
    clients_per_round: Annotated[int | float | None, checks.clients_per_round]
    partitioner: Annotated[Partitioner | Partition, checks.partitioner]
    local_epochs: Annotated[int | None, optional(integer)]
    local_steps: Annotated[int | LocalSteps | None, checks.local_steps]
    rounds_per_epoch: Annotated[int, integer]
    sampler: Annotated[Sampler, checks.sampler]
    local_rule: Annotated[LocalRule | None, checks.local_rule]
    aggregator: Annotated[Aggregator, checks.aggregator]
    server_optimizer: Annotated[ServerOptimizer, checks.server_optimizer]
    compressor: Annotated[Compressor | None, checks.compressor]
    downlink_compressor: Annotated[Compressor | None, checks.compressor]
    privacy: Annotated[Privacy | None, checks.privacy]
    personal: Annotated[tuple[str, ...] | Ditto, checks.personal]
    buffers: Annotated[tuple[tuple[str, Policy], ...], checks.buffers]
    mode: Annotated[Literal["sync"] | FedBuff, checks.mode]
    client_optimizer: Annotated[Literal["reset", "keep"], _OPTIMIZER]
    executor: Annotated[Literal["auto", "sequential", "vectorized"], _EXECUTOR]
    clients_per_wave: Annotated[int | None, optional(integer)]
    verify_executor: Annotated[bool, flag]
    cache_dataset: Annotated[bool | Literal["auto"], _CACHE]
    client_log_every_n: Annotated[int | None, optional(integer)]
    client_state_memory: Annotated[int | None, parse_bytes]
    population: Annotated[Population | None, checks.population]
    seed: Annotated[int, partial(integer, minimum=0)]

    @property
    def algorithm(self) -> AlgorithmOptions:
        """The options that differ from FedAvg between a client's training and the server's step."""
        personal, ditto = ((), self.personal) if isinstance(self.personal, Ditto) else (self.personal, None)
        return AlgorithmOptions(
            self.local_rule, self.compressor, self.privacy, self.aggregator, personal, ditto, self.buffers
        )

    @property
    def asynchrony(self) -> FedBuff | None:
        """The buffer of asynchronous training; None if rounds wait for all clients."""
        return self.mode if isinstance(self.mode, FedBuff) else None

    @property
    def keep_optimizers(self) -> bool:
        """Whether clients keep the state of their optimizers between rounds."""
        return self.client_optimizer == "keep"

    def cohort_size(self, num_clients: int) -> int:
        """Return the number of clients per round, given the number of clients.

        Raises:
            ValueError: if more clients are requested than exist.
        """
        wanted = self.clients_per_round
        if wanted is None:
            return num_clients
        if isinstance(wanted, float):
            return max(1, round(wanted * num_clients))
        if wanted > num_clients:
            raise ValueError(
                f"clients_per_round={wanted} is more than num_clients={num_clients}: lower it, or leave it out to take"
                " all."
            )
        return wanted

    def steps_in(self, round: int) -> int | None:
        """Return a client's number of local batches in a round; None if local work is given in epochs.

        Raises:
            TypeError, ValueError: if the user's function returns no valid number.
        """
        if self.local_steps is None or isinstance(self.local_steps, int):
            return self.local_steps
        return integer(f"local_steps({round})", self.local_steps(round))

    def partition(self, dataset: Any) -> Partition:
        """Partition a dataset among the clients.

        Raises:
            ValueError: if the dataset cannot be partitioned as requested; names the argument and the remedy.
        """
        samples = len(dataset)
        if isinstance(self.partitioner, Partition):
            partition = self.partitioner
        else:
            if self.num_clients is not None and self.num_clients > samples:
                raise ValueError(
                    f"num_clients={self.num_clients} is more than the {samples} samples of the training dataset: use at"
                    f" most {samples} clients."
                )
            try:
                partition = self._partitioner_of(dataset).partition
            except ValueError as error:
                raise ValueError(f"partitioner={self.partitioner!r}: {error}") from error
        try:
            check_partition(partition, samples)
        except ValueError as error:
            raise ValueError(f"partitioner={self.partitioner!r}: {error}") from None
        empty = (partition.sizes == 0).nonzero()[0]
        if len(empty):
            raise ValueError(
                f"partitioner={self.partitioner!r}: {len(empty)} of {partition.num_clients} clients have no samples"
                f" ({name_clients(empty)}): use fewer clients, a larger min_partition_size, or leave these clients out"
                " of the partition."
            )
        return partition

    def divide_alike(self, training: Any, dataset: Any, seed: int) -> Partition:
        """Partition further data in the same way as the training data.

        Raises:
            TypeError, ValueError: if the labels or ids of the partition are missing.
        """
        return self._partitioner_of(training).divide_alike(dataset, seed)

    def _partitioner_of(self, dataset: Any) -> Partitioner:
        # A copy, since the user's partitioner may be in several strategies and must not keep their data.
        given = self.partitioner
        mine = FinishedPartitioner(given) if isinstance(given, Partition) else copy.copy(given)
        mine.dataset = dataset
        return mine


_CHECKS: dict[str, Check] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}


def checked(given: Mapping[str, Any]) -> Options:
    """Check all arguments that do not depend on the data.

    Args:
        given: the user's arguments by name; others than those of `Options` are ignored.

    Raises:
        TypeError: for a value of an invalid type.
        ValueError: for an invalid value; both name the argument, the value and the remedy.
    """
    values = {**given, **_clients(given), **_local_work(given), **_aggregator(given)}
    options = Options(**{name: check(name, values[name]) for name, check in _CHECKS.items()})
    if options.num_clients is not None:
        options.cohort_size(options.num_clients)
    return options


def _clients(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of clients and the partitioner, of which either may decide the other."""
    num_clients: int | None = optional(integer)("num_clients", given["num_clients"])
    partitioner = checks.partitioner("partitioner", given["partitioner"], num_clients)
    declared = partitioner.num_clients if isinstance(partitioner, Partition) else partitioner._num_partitions
    if num_clients is not None and declared not in (None, num_clients):
        raise ValueError(
            f"num_clients={num_clients} but the partitioner has {declared} clients: pass the same number to both, or"
            " leave num_clients out (None)."
        )
    return {"num_clients": declared, "partitioner": partitioner}


def _local_work(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of local epochs, which "auto" leaves to the number of local steps."""
    epochs, steps = given["local_epochs"], given["local_steps"]
    if epochs == "auto":
        epochs = 1 if steps is None else None
    if (epochs is None) == (steps is None):
        raise ValueError(
            f"local_epochs={epochs} and local_steps={steps}: give exactly one of them, the passes over its data or the"
            " number of batches that a client trains for in a round; set the other to None."
        )
    return {"local_epochs": epochs}


def _aggregator(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the aggregator that privacy needs; nothing without privacy."""
    if (privacy := checks.privacy("privacy", given["privacy"])) is None:
        return {}
    if (aggregator := given["aggregator"]) != "mean":
        raise ValueError(
            f"aggregator={getattr(aggregator, 'call', '') or repr(aggregator)} with privacy: the noise is calibrated"
            " for a sum of clipped updates. Leave aggregator out; privacy has its own weights."
        )
    return {"aggregator": weighted_sum(privacy.weigh)}


def name_clients(clients: IntArray) -> str:
    """List the first few clients, for a message.

    Example:
        >>> import numpy as np
        >>> name_clients(np.arange(7))
        'clients 0, 1, 2, 3, 4, ...'
    """
    shown = ", ".join(map(str, clients[:5].tolist()))
    return f"client{'s' * (len(clients) > 1)} {shown}{', ...' if len(clients) > 5 else ''}"
