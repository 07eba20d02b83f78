"""What `FederatedStrategy` was asked for, checked once and in one place."""

from __future__ import annotations

import numbers
from typing import Any, Literal, NamedTuple

from lightning_fedscale import aggregators
from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.partitioners import Partition, Partitioner, by_name
from lightning_fedscale.samplers import Sampler
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.types import IntArray

DEFAULT_CLIENTS = 10


class _Unsaid(int):
    """The number 1 as nobody typed it, so that ``local_steps=5`` alone does not contradict ``local_epochs``."""


ONE_EPOCH: int = _Unsaid(1)


class Arguments(NamedTuple):
    """Checked arguments; see `FederatedStrategy` for their meaning."""

    num_clients: int | None
    clients_per_round: int | float | None
    partitioner: Partitioner | Partition
    local_epochs: int | None
    local_steps: int | None
    rounds_per_epoch: int
    sampler: Sampler
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    keep_optimizers: bool
    seed: int

    def cohort_size(self, num_clients: int) -> int:
        """Clients per round once the number of clients is known.

        Raises:
            ValueError: if more are asked for than there are.
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

    def partition(self, dataset: Any) -> Partition:
        """Divide a dataset among the clients.

        Raises:
            ValueError: if the dataset cannot be divided as asked; names the argument and the remedy.
        """
        samples = len(dataset)
        asked = self.num_clients
        if isinstance(self.partitioner, Partition):
            partition = self.partitioner
            if len(partition.indices) and int(partition.indices.max()) >= samples:
                raise ValueError(
                    f"partitioner: the partition refers to sample {int(partition.indices.max())}, but the training"
                    f" dataset has {samples}: use the partition that was made for this dataset."
                )
        else:
            declared = _declared(self.partitioner) or 0
            if declared > samples:
                raise ValueError(
                    f"num_clients={declared} is more than the {samples} samples of the training dataset: use at most"
                    f" {samples} clients."
                )
            self.partitioner.dataset = dataset
            partition = self.partitioner.partition
        if asked is not None and asked != partition.num_clients and not _counts_itself(self.partitioner):
            raise ValueError(
                f"num_clients={asked} but the partitioner makes {partition.num_clients} clients: pass the same number"
                " to both, or leave num_clients out."
            )
        empty = (partition.sizes == 0).nonzero()[0]
        if len(empty):
            raise ValueError(
                f"partitioner: {len(empty)} of {partition.num_clients} clients have no samples ({name_clients(empty)}):"
                " use fewer clients, a larger min_partition_size, or leave these clients out of the partition."
            )
        return partition


def check(
    *,
    num_clients: int | None,
    clients_per_round: int | float | None,
    partitioner: str | Partitioner | Partition,
    local_epochs: int | None,
    local_steps: int | None,
    rounds_per_epoch: int,
    sampler: Sampler,
    aggregator: str | Aggregator,
    server_optimizer: ServerOptimizer,
    client_optimizer: Literal["reset", "keep"],
    seed: int,
) -> Arguments:
    """Check all arguments that can be judged without data.

    Raises:
        TypeError: for a value of the wrong kind.
        ValueError: for a wrong value; both name the argument, the value and the remedy.
    """
    if num_clients is not None:
        _positive("num_clients", num_clients)
    if isinstance(partitioner, str):
        partitioner = by_name(partitioner, num_clients or DEFAULT_CLIENTS)
    elif not isinstance(partitioner, Partitioner | Partition):
        raise TypeError(
            f"partitioner={partitioner!r}: pass a name such as 'iid' or 'dirichlet', a Partitioner or a Partition."
        )
    known = num_clients
    if known is None:
        known = partitioner.num_clients if isinstance(partitioner, Partition) else _declared(partitioner)
    _check_clients_per_round(clients_per_round, known if not _counts_itself(partitioner) else None)
    if local_steps is not None and isinstance(local_epochs, _Unsaid):
        local_epochs = None
    if (local_epochs is None) == (local_steps is None):
        raise ValueError(
            f"local_epochs={local_epochs} and local_steps={local_steps}: give exactly one of them, the passes over its"
            " data or the number of batches that a client trains for in a round; set the other to None."
        )
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None:
            _positive(name, value)
    _positive("rounds_per_epoch", rounds_per_epoch)
    if not callable(sampler):
        raise TypeError(f"sampler={sampler!r} must be a function such as lightning_fedscale.samplers.uniform.")
    if isinstance(aggregator, str):
        aggregator = aggregators.by_name(aggregator)
    elif not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator={aggregator!r}: pass 'mean', 'uniform' or an aggregators.Aggregator.")
    if not isinstance(server_optimizer, ServerOptimizer):
        raise TypeError(
            f"server_optimizer={server_optimizer!r}: pass a server.ServerOptimizer such as server.fed_avg(), or wrap a"
            " torch optimizer, server.from_torch(torch.optim.SGD, lr=0.7)."
        )
    if client_optimizer not in ("reset", "keep"):
        raise ValueError(
            f"client_optimizer={client_optimizer!r}: choose 'reset', a fresh optimizer every round, or 'keep', its"
            " state lives on with the client."
        )
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer of at least 0.")
    return Arguments(
        num_clients=None if num_clients is None else int(num_clients),
        clients_per_round=clients_per_round,
        partitioner=partitioner,
        local_epochs=None if local_epochs is None else int(local_epochs),
        local_steps=None if local_steps is None else int(local_steps),
        rounds_per_epoch=int(rounds_per_epoch),
        sampler=sampler,
        aggregator=aggregator,
        server_optimizer=server_optimizer,
        keep_optimizers=client_optimizer == "keep",
        seed=int(seed),
    )


def name_clients(clients: IntArray) -> str:
    """The first few of them, for a message.

    Example:
        >>> import numpy as np
        >>> name_clients(np.arange(7))
        'client 0, 1, 2, 3, 4, ...'
    """
    return f"client {', '.join(map(str, clients[:5].tolist()))}{', ...' if len(clients) > 5 else ''}"


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be a whole number.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def _check_clients_per_round(value: object, num_clients: int | None) -> None:
    if value is None:
        return
    if isinstance(value, float):
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"clients_per_round={value} as a fraction must lie in (0, 1]: 0.1 takes a tenth of the clients; for a"
                " number of clients pass an int."
            )
        return
    _positive("clients_per_round", value)
    if num_clients is not None and isinstance(value, int) and value > num_clients:
        raise ValueError(
            f"clients_per_round={value} is more than num_clients={num_clients}: lower it, or leave it out to take all."
        )


def _declared(partitioner: Partitioner) -> int | None:
    """The number of clients that a partitioner was told, None if it depends on the data."""
    return partitioner._num_partitions


def _counts_itself(partitioner: Partitioner | Partition) -> bool:
    """Whether the number of clients is read off the data, as with natural ids."""
    return isinstance(partitioner, Partitioner) and _declared(partitioner) is None
