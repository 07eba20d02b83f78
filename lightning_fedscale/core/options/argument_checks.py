"""Checks of single arguments of `FederatedStrategy`: each takes name and value, and returns the value to be used."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import distributed

from lightning_fedscale import compressors, local_rules, samplers, server
from lightning_fedscale.aggregators import Aggregator, aggregator_of
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.devices import Population
from lightning_fedscale.local_rules import Ditto, LocalRule
from lightning_fedscale.partitioners import FilePartitioner, Partition, Partitioner, by_name
from lightning_fedscale.partitioners.registry import is_file
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.samplers import Sampler
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.buffers import Policy, checked
from lightning_fedscale.utils.checks import integer

Check: TypeAlias = Callable[[str, Any], Any]

LocalSteps: TypeAlias = Callable[[int], int]
"""Maps a round's number to its number of local batches; the same on every rank and after a restart."""


def optional(check: Check) -> Check:
    """Return a check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def choice(*allowed: object, remedy: str) -> Check:
    """Return a check that accepts these values only.

    Args:
        *allowed: the values.
        remedy: what to pass instead, from "choose" to the full stop.
    """

    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: {remedy}")
        return allowed[allowed.index(value)]

    return check


def partitioner(name: str, value: Any, num_clients: int | None = None) -> Partitioner | Partition:
    """Return a partitioner or a finished partition, given as such, by name or by file.

    Args:
        name: name of the argument.
        value: the user's value.
        num_clients: number of clients of a partitioner by name; None is that of the file, or 10.
    """
    if isinstance(value, Path):
        return FilePartitioner(value)
    if isinstance(value, str):
        return by_name(value, None if is_file(value) else num_clients)
    if isinstance(value, type) and issubclass(value, Partitioner):
        raise TypeError(f"{name}={value.__name__} is a class: make an object of it, {value.__name__}(...).")
    if not isinstance(value, (Partition, Partitioner)):
        raise TypeError(
            f"{name}={value!r}: pass a name such as 'iid' or 'dirichlet', a file, a Partitioner or a"
            " Partition (Partition.from_lists builds one from lists of indices)."
        )
    if getattr(value, "seed", 0) is None:
        raise ValueError(
            f"{name}={value!r}: seed=None would divide the data differently on every rank and after every restart: pass"
            " an integer."
        )
    return value


def clients_per_round(name: str, value: Any) -> int | float | None:
    """Return a number of clients as an int, a fraction of them as a float, and None for all of them."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: pass a number of clients, a fraction in (0, 1], or None for all of them.")
    if isinstance(value, numbers.Integral):
        return integer(name, value)
    fraction = float(value)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"{name}={fraction}: pass a fraction in (0, 1], such as 0.1 for a tenth of the clients, or a number of"
            " clients as an int."
        )
    return fraction


def local_steps(name: str, value: Any) -> int | LocalSteps | None:
    """Return a number of batches, or a function of the round."""
    if value is None:
        return None
    if not callable(value):
        return integer(name, value)
    try:
        inspect.signature(value).bind(0)
    except TypeError as error:
        raise TypeError(
            f"{name}={value!r}: {error}; pass a number of batches, or a function that returns it for a round's index."
        ) from None
    steps: LocalSteps = value
    return steps


def sampler(name: str, value: Any) -> Sampler:
    """Return a sampler, given as such or by name."""
    made = samplers.by_name(value) if isinstance(value, str) else value
    remedy = (
        "pass a function sampler(*, seed, round, num_clients, clients_per_round) such as"
        " lightning_fedscale.samplers.uniform."
    )
    if not callable(made):
        raise TypeError(f"{name}={value!r}: {remedy}")
    try:
        inspect.signature(made).bind(seed=0, round=0, num_clients=1, clients_per_round=1)
    except TypeError as error:
        raise TypeError(f"{name}={value!r}: {error}; {remedy}") from None
    return made


def local_rule(name: str, value: Any) -> LocalRule | None:
    """Return a local rule, given as such or by name."""
    if isinstance(value, str):
        return local_rules.by_name(value)
    checks.called(name, value, "local_rules", local_rules.FACTORIES)
    if value is not None and not isinstance(value, LocalRule):
        raise TypeError(
            f"{name}={value!r}: pass a local_rules.LocalRule such as local_rules.fed_prox(0.1), its name, or None."
        )
    return value


def aggregator(_: str, value: Any) -> Aggregator:
    """Return an aggregator, given as such or by name."""
    return aggregator_of(value)


def server_optimizer(name: str, value: Any) -> ServerOptimizer:
    """Return a server optimizer, given as such or by name; None is that of FedAvg."""
    if value is None:
        return server.fed_avg()
    if isinstance(value, str):
        return server.by_name(value)
    checks.called(name, value, "server", server.FACTORIES)
    if not isinstance(value, ServerOptimizer):
        raise TypeError(
            f"{name}={value!r}: pass a server.ServerOptimizer such as server.fed_avg(), or wrap a torch optimizer,"
            " server.from_torch(torch.optim.SGD, lr=0.7)."
        )
    return value


def compressor(name: str, value: Any) -> Compressor | None:
    """Return a compressor, given as such or by name."""
    if isinstance(value, str):
        return compressors.by_name(value, name)
    checks.called(name, value, "compressors", {**compressors.FACTORIES, **compressors.WRAPPERS})
    if value is not None and not isinstance(value, Compressor):
        raise TypeError(f"{name}={value!r}: pass a compressor such as compressors.top_k(0.01), its name, or None.")
    return value


def privacy(name: str, value: Any) -> Privacy | None:
    """Return a privacy mechanism or None."""
    if value is not None and not isinstance(value, Privacy):
        raise TypeError(f"{name}={value!r}: pass the result of privacy.dp_fed_avg(...), or None.")
    return value


def personal(name: str, value: Any) -> tuple[str, ...] | Ditto:
    """Return patterns of names, or `Ditto`."""
    if isinstance(value, Ditto):
        return value
    patterns = () if value is None else value
    if (
        isinstance(patterns, str)
        or not isinstance(patterns, Iterable)
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise TypeError(
            f"{name}={value!r}: pass a list of patterns of names, such as ['head.*'], or local_rules.Ditto(0.1)."
        )
    return tuple(patterns)


def buffers(_: str, value: Any) -> tuple[tuple[str, Policy], ...]:
    """Return patterns of names with their policies."""
    return checked(value)


def mode(name: str, value: Any) -> Literal["sync"] | FedBuff:
    """Return "sync", or the buffer of asynchronous training."""
    if isinstance(value, FedBuff):
        return value
    if value not in ("sync", "async"):
        raise ValueError(f"{name}={value!r}: choose 'sync', 'async' or an asynchrony.FedBuff(...).")
    return FedBuff() if value == "async" else "sync"


def population(name: str, value: Any) -> Population | None:
    """Return a population or None."""
    if value is not None and not isinstance(value, Population):
        raise TypeError(
            f"{name}={value!r}: pass a devices.Population such as Population({{'phone': 0.7, 'jetson': 0.3}})."
        )
    return value


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
