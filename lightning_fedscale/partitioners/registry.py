"""Partitioners by their short names, as in ``FederatedStrategy(partitioner="dirichlet")``."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.continuous import ContinuousPartitioner
from lightning_fedscale.partitioners.dirichlet import DirichletPartitioner
from lightning_fedscale.partitioners.distribution import DistributionPartitioner
from lightning_fedscale.partitioners.finished import FilePartitioner
from lightning_fedscale.partitioners.iid import IidPartitioner
from lightning_fedscale.partitioners.inner_dirichlet import InnerDirichletPartitioner
from lightning_fedscale.partitioners.natural_id import GroupedNaturalIdPartitioner, NaturalIdPartitioner
from lightning_fedscale.partitioners.pathological import PathologicalPartitioner
from lightning_fedscale.partitioners.shard import ShardPartitioner
from lightning_fedscale.partitioners.sizes import (
    ExponentialPartitioner,
    IdToSizeFncPartitioner,
    LinearPartitioner,
    SizePartitioner,
    SquarePartitioner,
)
from lightning_fedscale.utils import checks

PARTITIONERS: dict[str, type[Partitioner]] = {
    "iid": IidPartitioner,
    "dirichlet": DirichletPartitioner,
    "inner_dirichlet": InnerDirichletPartitioner,
    "pathological": PathologicalPartitioner,
    "shard": ShardPartitioner,
    "distribution": DistributionPartitioner,
    "continuous": ContinuousPartitioner,
    "size": SizePartitioner,
    "id_to_size_fnc": IdToSizeFncPartitioner,
    "linear": LinearPartitioner,
    "square": SquarePartitioner,
    "exponential": ExponentialPartitioner,
    "natural_id": NaturalIdPartitioner,
    "grouped_natural_id": GroupedNaturalIdPartitioner,
    "file": FilePartitioner,
}

DEFAULT_CLIENTS = 10
"""Number of clients of a partitioner given by name."""


def is_file(name: str) -> bool:
    """Return whether this is the name of a partition's file, rather than of a kind of partitioner.

    Example:
        >>> is_file("hospitals.json"), is_file("iid")
        (True, False)
    """
    return name.lower().endswith(".json")


def by_name(name: str, num_partitions: int | None = None, **kwargs: Any) -> Partitioner:
    """Build a partitioner from its short name, its class name (case does not matter), or the file of a partition.

    "dirichlet" has defaults here that suit any dataset: ``alpha=0.5, min_partition_size=1``. "natural_id" and
    "grouped_natural_id" take the number of clients from the data and ignore ``num_partitions``: compare
    ``partitioner.num_partitions`` once a dataset is assigned. A file, "hospitals.json", has its own clients.

    Args:
        name: "iid", "dirichlet", "inner_dirichlet", "pathological", "shard", "distribution", "continuous", "size",
            "id_to_size_fnc", "linear", "square", "exponential", "natural_id" or "grouped_natural_id", or a path that
            ends in ".json", see `FilePartitioner`.
        num_partitions: number of clients; None means those of the file, or 10 without a file.
        **kwargs: the other arguments of the class.

    Raises:
        ValueError: the name is unknown, an argument of the class is missing or unknown, or the file cannot be read or
            has another number of clients.

    Example:
        >>> by_name("dirichlet", num_partitions=10, alpha=0.1)
        DirichletPartitioner(num_partitions=10, alpha=0.1, min_partition_size=1)
    """
    cls = FilePartitioner if is_file(name) else _find(name)
    parameters = inspect.signature(cls).parameters
    if cls is DirichletPartitioner:
        kwargs = {"alpha": 0.5, "min_partition_size": 1, **kwargs}
    if is_file(name):
        kwargs = {"path": name, **kwargs}
    if "num_partitions" in parameters:
        kwargs = {"num_partitions": DEFAULT_CLIENTS if num_partitions is None else num_partitions, **kwargs}
    unknown = sorted(set(kwargs) - set(parameters))
    if unknown:
        hint = checks.did_you_mean(unknown[0], parameters) or f" It has {', '.join(parameters)}."
        raise ValueError(f"partitioner={name!r}: {cls.__name__} has no argument {unknown[0]!r}.{hint}")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in kwargs]
    if missing:
        call = ", ".join(f"{p}=..." for p in ("num_partitions", *missing) if p in parameters)
        raise ValueError(f"partitioner={name!r} needs {', '.join(missing)}: pass an object, {cls.__name__}({call}).")
    partitioner = cls(**kwargs)
    if cls is FilePartitioner and num_partitions not in (None, partitioner.num_partitions):
        raise ValueError(
            f"num_partitions={num_partitions}: partitioner={name!r} divides the data among"
            f" {partitioner.num_partitions} clients: pass {partitioner.num_partitions}, or leave the number out."
        )
    wanted = DEFAULT_CLIENTS if num_partitions is None else num_partitions
    if "partition_sizes" in parameters and partitioner.num_partitions != wanted:
        raise ValueError(
            f"partition_sizes has {partitioner.num_partitions} entries for num_partitions={wanted}: pass one size per"
            " client."
        )
    return partitioner


def name_of(partitioner: Partitioner) -> str | None:
    """Return the short name that builds an equal partitioner for its number of clients; None if there is none.

    Example:
        >>> name_of(by_name("dirichlet", 4)), name_of(by_name("dirichlet", 4, alpha=0.1))
        ('dirichlet', None)
    """
    name = next((name for name, cls in PARTITIONERS.items() if type(partitioner) is cls), None)
    if name is None:
        return None
    try:
        same = by_name(name, partitioner.num_partitions)
    except ValueError:  # it needs arguments
        return None
    return name if repr(same) == repr(partitioner) else None


def _find(name: str) -> type[Partitioner]:
    known = {cls.__name__.lower(): cls for cls in PARTITIONERS.values()} | PARTITIONERS
    key = str(name).lower()
    if key in known:
        return known[key]
    raise checks.unknown("partitioner", name, PARTITIONERS, [cls.__name__ for cls in PARTITIONERS.values()])
