"""IID partition: every client is a random sample of the dataset."""

from __future__ import annotations

import numpy as np

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.grouping import deal_order, even_sizes
from lightning_fedscale.partitioners.partition import Partition, offsets_of


def iid_partition(num_samples: int, num_partitions: int, shuffle: bool = True, seed: int | None = 42) -> Partition:
    """Deal the samples at random into parts whose sizes differ by at most one, the larger first.

    Args:
        num_samples: length of the dataset.
        num_partitions: number of clients.
        shuffle: False cuts the dataset into contiguous parts instead.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: there are more clients than samples.

    Example:
        >>> iid_partition(num_samples=5, num_partitions=2, shuffle=False).client(0)
        array([0, 1, 2])
    """
    checks.enough_samples(num_samples, num_partitions)
    order = deal_order(num_samples, shuffle, np.random.default_rng(seed))
    return Partition(order, offsets_of(even_sizes(num_samples, num_partitions)))


class IidPartitioner(Partitioner):
    """Split at random: every client sees the same distribution.

    This is the baseline of every comparison. Sizes differ by at most one; all samples are used; the order within a
    client is random.

    Args:
        num_partitions: number of clients.
        shuffle: False cuts contiguous parts, which is only valid for a dataset in random order.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: ``num_partitions`` is not positive, or exceeds the number of samples.

    Example:
        >>> partitioner = IidPartitioner(num_partitions=3)
        >>> partitioner.dataset = range(7)
        >>> [len(partitioner.load_partition(i)) for i in range(3)]
        [3, 2, 2]
    """

    def __init__(self, num_partitions: int, shuffle: bool = True, seed: int | None = 42) -> None:
        super().__init__(num_partitions)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return iid_partition(self._num_samples(), self.num_partitions, self.shuffle, self.seed)
