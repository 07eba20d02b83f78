"""Divide further data, such as a validation set, in the same way as an earlier dataset."""

from __future__ import annotations

import numpy as np

from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.grouping import cut, deal_order, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import Partition


def alike_by_labels(partition: Partition, labels: Labels, others: Labels, seed: int = 0) -> Partition:
    """Divide further samples of each class among the clients in proportion to their samples of that class.

    Each client gets the classes that it has, and in its own proportions if the classes are as frequent in the further
    data. Numbers are rounded at random so that they are right on average. A client may get none. Samples of a class
    that no client has are left out.

    Args:
        partition: the partition of the earlier samples.
        labels: the class of each earlier sample.
        others: the class of each further sample.
        seed: equal seeds give equal divisions.

    Raises:
        ValueError: the labels are not classes.

    Example:
        >>> partition = Partition.from_lists([[0, 1, 2], [3, 4, 5]])
        >>> labels, others = np.array([0, 0, 0, 0, 1, 1]), np.array([1, 0, 0, 0, 0, 1])
        >>> [sorted(others[alike_by_labels(partition, labels, others).client(i)].tolist()) for i in range(2)]
        [[0, 0, 0], [0, 1, 1]]
    """
    classes, codes = encode_classes(np.concatenate([labels, others]))
    owner = np.repeat(np.arange(partition.num_clients), partition.sizes)
    held, held_starts = group(codes[: len(labels)][partition.indices], len(classes))
    rng = np.random.default_rng(seed)
    order = deal_order(len(others), True, rng)
    members, starts = group(codes[len(labels) :], len(classes), order)
    owners = np.full(len(others), -1, dtype=np.int64)
    for mine, samples in zip(np.split(held, held_starts[1:-1]), np.split(members, starts[1:-1]), strict=True):
        if len(mine) and len(samples):
            counts = np.bincount(owner[mine], minlength=partition.num_clients)
            owners[samples] = np.repeat(np.arange(len(counts)), cut(counts.astype(np.float64), len(samples), rng))
    return Partition(*group(owners, partition.num_clients))


def alike_by_size(partition: Partition, num_samples: int, seed: int = 0) -> Partition:
    """Divide ``num_samples`` further samples at random, in proportion to the clients' numbers of samples.

    Example:
        >>> alike_by_size(Partition.from_lists([[0], [1, 2, 3]]), num_samples=8).sizes.tolist()
        [2, 6]
    """
    held = int(partition.indices.max(initial=0)) + 1
    return alike_by_labels(partition, np.zeros(held, np.int64), np.zeros(num_samples, np.int64), seed)
