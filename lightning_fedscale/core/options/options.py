"""The arguments of `FederatedStrategy`, checked once and in one place."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import distributed

from lightning_fedscale import aggregators, compressors, local_rules, samplers, server
from lightning_fedscale.aggregators import Aggregator, weighted_sum
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.devices import Population
from lightning_fedscale.local_rules import Ditto, LocalRule
from lightning_fedscale.partitioners import (
    FilePartitioner,
    FinishedPartitioner,
    Partition,
    Partitioner,
    by_name,
    check_partition,
)
from lightning_fedscale.partitioners.checks import integer
from lightning_fedscale.partitioners.registry import is_file
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.samplers import Sampler
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.types import IntArray
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.buffers import Policy
from lightning_fedscale.utils.buffers import checked as checked_buffers
from lightning_fedscale.utils.checks import flag
from lightning_fedscale.utils.memory import parse_bytes

LocalSteps: TypeAlias = Callable[[int], int]
"""Maps a round's number to its number of local batches; the same on every rank and after a restart."""


class Options(NamedTuple):
    """Checked arguments; see `FederatedStrategy` for their meaning.

    ``num_clients`` is None if it is inferred from the data, as with natural ids. ``client_state_memory`` is in bytes,
    None for "auto".
    """

    num_clients: int | None
    clients_per_round: int | float | None
    partitioner: Partitioner | Partition
    local_epochs: int | None
    local_steps: int | LocalSteps | None
    rounds_per_epoch: int
    sampler: Sampler
    algorithm: AlgorithmOptions
    server_optimizer: ServerOptimizer
    downlink_compressor: Compressor | None
    asynchrony: FedBuff | None
    keep_optimizers: bool
    executor: Literal["auto", "sequential", "vectorized"]
    clients_per_wave: int | None
    verify_executor: bool
    cache_dataset: bool | Literal["auto"]
    client_log_every_n: int | None
    client_state_memory: int | None
    population: Population | None
    seed: int

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


def check(
    *,
    num_clients: int | None,
    clients_per_round: int | float | None,
    partitioner: str | Partitioner | Partition,
    local_epochs: int | Literal["auto"] | None,
    local_steps: int | LocalSteps | None,
    rounds_per_epoch: int,
    sampler: str | Sampler,
    local_rule: str | LocalRule | None,
    aggregator: str | Aggregator,
    server_optimizer: str | ServerOptimizer,
    compressor: str | Compressor | None,
    downlink_compressor: str | Compressor | None,
    privacy: Privacy | None,
    personal: Sequence[str] | Ditto | None,
    buffers: Mapping[str, Policy] | None,
    mode: Literal["sync", "async"] | FedBuff,
    client_optimizer: Literal["reset", "keep"],
    executor: Literal["auto", "sequential", "vectorized"],
    clients_per_wave: int | None,
    verify_executor: bool,
    cache_dataset: bool | Literal["auto"],
    client_log_every_n: int | None,
    client_state_memory: int | str,
    population: Population | None,
    seed: int,
) -> Options:
    """Check all arguments that do not depend on the data.

    Raises:
        TypeError: for a value of an invalid type.
        ValueError: for an invalid value; both name the argument, the value and the remedy.
    """
    if num_clients is not None:
        num_clients = integer("num_clients", num_clients)
    if isinstance(partitioner, Path):
        partitioner = FilePartitioner(partitioner)
    if isinstance(partitioner, type) and issubclass(partitioner, Partitioner):
        raise TypeError(
            f"partitioner={partitioner.__name__} is a class: make an object of it, {partitioner.__name__}(...)."
        )
    if isinstance(partitioner, str):
        partitioner = by_name(partitioner, None if is_file(partitioner) else num_clients)
    elif isinstance(partitioner, Partitioner):
        if getattr(partitioner, "seed", 0) is None:
            raise ValueError(
                "partitioner: seed=None divides the data differently on every rank and after every restart: give it a"
                " number."
            )
    elif not isinstance(partitioner, Partition):
        raise TypeError(
            f"partitioner={partitioner!r}: pass a name such as 'iid' or 'dirichlet', a file, a Partitioner or a"
            " Partition (Partition.from_lists makes one of index lists)."
        )
    declared = partitioner.num_clients if isinstance(partitioner, Partition) else _declared(partitioner)
    if num_clients is not None and declared not in (None, num_clients):
        raise ValueError(
            f"num_clients={num_clients} but the partitioner makes {declared} clients: pass the same number to both, or"
            " leave num_clients out (None)."
        )
    clients_per_round = _checked_clients_per_round(clients_per_round, declared)
    if local_epochs == "auto":
        local_epochs = 1 if local_steps is None else None
    if (local_epochs is None) == (local_steps is None):
        raise ValueError(
            f"local_epochs={local_epochs} and local_steps={local_steps}: give exactly one of them, the passes over its"
            " data or the number of batches that a client trains for in a round; set the other to None."
        )
    if isinstance(sampler, str):
        sampler = samplers.by_name(sampler)
    _check_sampler(sampler)
    if privacy is not None and aggregator != "mean":
        raise ValueError(
            f"aggregator={aggregator!r} with privacy: noise is made for a sum of clipped updates over a fixed number,"
            " and for nothing else. Leave aggregator out; privacy has weights of its own."
        )
    aggregator = aggregators.aggregator_of(aggregator)
    if isinstance(server_optimizer, str):
        server_optimizer = server.by_name(server_optimizer)
    checks.called("server_optimizer", server_optimizer, "server", server.FACTORIES)
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
    if executor not in ("auto", "sequential", "vectorized"):
        raise ValueError(f"executor={executor!r}: choose 'auto', 'sequential' or 'vectorized'.")
    if population is not None and not isinstance(population, Population):
        raise TypeError(
            f"population={population!r}: pass a devices.Population, Population({{'phone': 0.7, 'jetson': 0.3}})."
        )
    if cache_dataset not in ("auto", True, False):
        raise ValueError(f"cache_dataset={cache_dataset!r}: choose 'auto', True or False.")
    return Options(
        num_clients=declared,
        clients_per_round=clients_per_round,
        partitioner=partitioner,
        local_epochs=None if local_epochs is None else integer("local_epochs", local_epochs),
        local_steps=_checked_local_steps(local_steps),
        rounds_per_epoch=integer("rounds_per_epoch", rounds_per_epoch),
        sampler=sampler,
        algorithm=_rules(
            local_rule,
            _checked_compressor("compressor", compressor),
            privacy,
            aggregator,
            () if personal is None else personal,
        )._replace(buffers=checked_buffers(buffers)),
        server_optimizer=server_optimizer,
        downlink_compressor=_checked_compressor("downlink_compressor", downlink_compressor),
        asynchrony=_checked_mode(mode),
        keep_optimizers=client_optimizer == "keep",
        executor=executor,
        clients_per_wave=None if clients_per_wave is None else integer("clients_per_wave", clients_per_wave),
        verify_executor=flag("verify_executor", verify_executor),
        cache_dataset=cache_dataset if cache_dataset == "auto" else bool(cache_dataset),
        client_log_every_n=None if client_log_every_n is None else integer("client_log_every_n", client_log_every_n),
        client_state_memory=parse_bytes("client_state_memory", client_state_memory),
        population=population,
        seed=integer("seed", seed, minimum=0),
    )


def _checked_mode(mode: object) -> FedBuff | None:
    if isinstance(mode, FedBuff):
        return mode
    if mode not in ("sync", "async"):
        raise ValueError(f"mode={mode!r}: choose 'sync', 'async' or an asynchrony.FedBuff(...).")
    return FedBuff() if mode == "async" else None


def _checked_compressor(argument: str, value: object) -> Compressor | None:
    if isinstance(value, str):
        return compressors.by_name(value, argument)
    if value is None or isinstance(value, Compressor):
        return value
    checks.called(argument, value, "compressors", {**compressors.FACTORIES, **compressors.WRAPPERS})
    raise TypeError(f"{argument}={value!r}: pass a compressor such as compressors.top_k(0.01), its name, or None.")


def _rules(
    local_rule: str | LocalRule | None,
    compressor: Compressor | None,
    privacy: Privacy | None,
    aggregator: Aggregator,
    personal: Sequence[str] | Ditto,
) -> AlgorithmOptions:
    if isinstance(local_rule, str):
        local_rule = local_rules.by_name(local_rule)
    checks.called("local_rule", local_rule, "local_rules", local_rules.FACTORIES)
    if local_rule is not None and not isinstance(local_rule, LocalRule):
        raise TypeError(
            f"local_rule={local_rule!r}: pass a local_rules.LocalRule such as local_rules.fed_prox(0.1), its name, or"
            " None."
        )
    if privacy is not None:
        if not isinstance(privacy, Privacy):
            raise TypeError(f"privacy={privacy!r}: pass what privacy.dp_fed_avg(...) makes, or None.")
        aggregator = weighted_sum(privacy.weigh)
    if isinstance(personal, Ditto):
        return AlgorithmOptions(local_rule, compressor, privacy, aggregator, ditto=personal)
    if (
        isinstance(personal, str)
        or not isinstance(personal, Iterable)
        or not all(isinstance(pattern, str) for pattern in personal)
    ):
        raise TypeError(
            f"personal={personal!r}: pass a list of patterns of names, such as ['head.*'], or local_rules.Ditto(0.1)."
        )
    return AlgorithmOptions(local_rule, compressor, privacy, aggregator, tuple(personal))


def check_processes(start_method: str, timeout: timedelta, backend: str | None) -> None:
    """Check the start method of processes, their timeout, and the backend by which they communicate.

    Raises:
        TypeError: if ``timeout`` is not a timedelta.
        ValueError: if the start method or the backend is unknown.
    """
    known = ("popen", "fork", "spawn", "forkserver")
    if start_method not in known:
        raise ValueError(f"start_method={start_method!r}: choose one of {', '.join(map(repr, known))}.")
    if not isinstance(timeout, timedelta):
        raise TypeError(f"timeout={timeout!r}: pass a datetime.timedelta, such as timedelta(minutes=30).")
    if backend is not None and distributed.is_available():
        backends = [each for each in distributed.Backend.backend_list if each != distributed.Backend.UNDEFINED]
        # One for all devices, "gloo", or one for each, "cpu:gloo,cuda:nccl".
        if not all(each.rpartition(":")[2].lower() in backends for each in str(backend).split(",")):
            raise ValueError(
                f"process_group_backend={backend!r}: choose one of {', '.join(map(repr, backends))}, or None, which"
                " chooses by device."
            )


def name_clients(clients: IntArray) -> str:
    """List the first few clients, for a message.

    Example:
        >>> import numpy as np
        >>> name_clients(np.arange(7))
        'clients 0, 1, 2, 3, 4, ...'
    """
    shown = ", ".join(map(str, clients[:5].tolist()))
    return f"client{'s' * (len(clients) > 1)} {shown}{', ...' if len(clients) > 5 else ''}"


def _checked_clients_per_round(value: object, num_clients: int | None) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"clients_per_round={value!r}: pass a number of clients, a fraction in (0, 1], or None for all of them."
        )
    if not isinstance(value, numbers.Integral):
        fraction = float(value)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"clients_per_round={fraction}: a fraction must lie in (0, 1], 0.1 takes a tenth of the clients; for a"
                " number of clients pass an int."
            )
        return fraction
    wanted = integer("clients_per_round", value)
    if num_clients is not None and wanted > num_clients:
        raise ValueError(
            f"clients_per_round={wanted} is more than num_clients={num_clients}: lower it, or leave it out to take all."
        )
    return wanted


def _checked_local_steps(value: object) -> int | LocalSteps | None:
    if value is None:
        return None
    if not callable(value):
        return integer("local_steps", value)
    try:
        inspect.signature(value).bind(0)
    except TypeError as error:
        raise TypeError(
            f"local_steps={value!r}: {error}; pass a number of batches, or a function that makes one of the round's"
            " number."
        ) from None
    return value


def _check_sampler(sampler: Sampler) -> None:
    remedy = (
        "pass a function sampler(*, seed, round, num_clients, clients_per_round) such as"
        " lightning_fedscale.samplers.uniform."
    )
    if not callable(sampler):
        raise TypeError(f"sampler={sampler!r}: {remedy}")
    try:
        inspect.signature(sampler).bind(seed=0, round=0, num_clients=1, clients_per_round=1)
    except TypeError as error:
        raise TypeError(f"sampler={sampler!r}: {error}; {remedy}") from None


def _declared(partitioner: Partitioner) -> int | None:
    """Return the partitioner's number of clients; None if it depends on the data."""
    return partitioner._num_partitions
