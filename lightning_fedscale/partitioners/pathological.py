"""Label skew by a fixed number of classes per client."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import numpy as np

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.grouping import deal_order, even_sizes, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import IntArray, Partition

Mode: TypeAlias = Literal["random", "deterministic", "first-deterministic"]
_MODES = ("random", "deterministic", "first-deterministic")
_BLOCK = 1 << 22


def pathological_partition(
    labels: Labels,
    num_partitions: int,
    num_classes_per_partition: int,
    class_assignment_mode: Mode = "random",
    shuffle: bool = True,
    seed: int | None = 42,
) -> Partition:
    """Choose the classes of each client, then cut each class evenly among the clients that have it.

    (Li et al. 2021, https://arxiv.org/abs/2102.02079.)

    Args: the labels, then those of :class:`PathologicalPartitioner`.

    Example:
        >>> labels = np.array([0, 0, 1, 1, 2, 2])
        >>> partition = pathological_partition(labels, 3, 2, "deterministic")
        >>> [sorted(labels[partition.client(i)].tolist()) for i in range(3)]
        [[0, 1], [1, 2], [0, 2]]
    """
    checks.enough_samples(len(labels), num_partitions)
    classes, codes = encode_classes(labels)
    if num_classes_per_partition > len(classes):
        raise ValueError(
            f"num_classes_per_partition={num_classes_per_partition}: pass at most the number of classes,"
            f" {len(classes)}."
        )
    rng = np.random.default_rng(seed)
    order = deal_order(len(labels), shuffle, rng)
    chosen = _choose_classes(num_partitions, len(classes), num_classes_per_partition, class_assignment_mode, rng)
    holders, holder_starts = group(chosen.ravel(), len(classes))
    holders //= num_classes_per_partition
    members, starts = group(codes, len(classes), order)
    num_holders, num_members = np.diff(holder_starts), np.diff(starts)
    if (num_holders > num_members).any():
        worst = int(np.argmax(num_holders - num_members))
        other = "" if class_assignment_mode == "deterministic" else ", or pass class_assignment_mode='deterministic'"
        raise ValueError(
            f"num_partitions={num_partitions}, num_classes_per_partition={num_classes_per_partition}:"
            f" {num_holders[worst]} clients share class {classes[worst]}, which has {num_members[worst]} samples: lower"
            f" one of them{other}."
        )
    owner = np.full(len(labels), -1, dtype=np.int64)
    for k in np.flatnonzero(num_holders):
        clients = holders[holder_starts[k] : holder_starts[k + 1]]
        owner[members[starts[k] : starts[k + 1]]] = np.repeat(clients, even_sizes(int(num_members[k]), len(clients)))
    if not num_holders.all():
        warnings.warn(
            f"No client has the classes {classes[num_holders == 0].tolist()}, so their samples are not used: raise"
            " num_partitions or num_classes_per_partition to use them.",
            stacklevel=2,
        )
    return Partition(*group(owner, num_partitions, order))


def _choose_classes(
    num_partitions: int, num_classes: int, num_chosen: int, mode: Mode, rng: np.random.Generator
) -> IntArray:
    """Choose different classes for each client, ``num_partitions x num_chosen``."""
    clients = np.arange(num_partitions)[:, None]
    if mode == "deterministic":
        return (clients + np.arange(num_chosen)) % num_classes
    chosen = np.empty((num_partitions, num_chosen), dtype=np.int64)
    block = max(1, _BLOCK // num_classes)
    for start in range(0, num_partitions, block):
        # Choose the classes with the smallest random keys; a key below zero is always among them.
        keys = rng.random((min(block, num_partitions - start), num_classes))
        if mode == "first-deterministic":
            np.put_along_axis(keys, clients[start : start + block] % num_classes, -1.0, axis=1)
        chosen[start : start + block] = np.argpartition(keys, num_chosen - 1, axis=1)[:, :num_chosen]
    return chosen


class PathologicalPartitioner(Partitioner):
    """Give each client a fixed number of classes: the strongest kind of label skew.

    Each class is cut evenly among the clients that have it. A class that no client has is left out, with a warning that
    names it; all other samples are used. The order within a client is random.

    Args:
        num_partitions: number of clients.
        partition_by: column with the labels; None looks in the usual places.
        num_classes_per_partition: classes of each client; required.
        class_assignment_mode: ``"random"``; ``"deterministic"``: client ``i`` has the classes ``i, i + 1, ...`` modulo
            their number; ``"first-deterministic"``: client ``i`` has class ``i`` modulo their number, and random others
            (as in the paper; no class is left out if there are at least as many clients as classes).
        shuffle: False deals the samples of a class in the order of the dataset, and leaves each client's ascending.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: there are fewer classes than a client needs, or a class has fewer samples than clients.

    Example:
        >>> partitioner = PathologicalPartitioner(num_partitions=4, num_classes_per_partition=1,
        ...                                       class_assignment_mode="deterministic")
        >>> partitioner.dataset = ["cat", "dog", "cat", "dog"]
        >>> partitioner.partition.sizes.tolist()
        [1, 1, 1, 1]
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str | None = None,
        num_classes_per_partition: int | None = None,
        class_assignment_mode: Mode = "random",
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions, partition_by)
        checks.given(
            "num_classes_per_partition",
            num_classes_per_partition,
            "PathologicalPartitioner(num_partitions=10, num_classes_per_partition=2)",
        )
        self.num_classes_per_partition = checks.integer("num_classes_per_partition", num_classes_per_partition)
        checks.one_of("class_assignment_mode", class_assignment_mode, _MODES)
        checks.seed_value(seed)
        self.class_assignment_mode = class_assignment_mode
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return pathological_partition(
            self._labels(),
            self.num_partitions,
            self.num_classes_per_partition,
            self.class_assignment_mode,
            self.shuffle,
            self.seed,
        )
