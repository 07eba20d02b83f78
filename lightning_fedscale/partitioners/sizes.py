"""Partitions by given sizes: clients differ only in their amount of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.grouping import deal_order
from lightning_fedscale.partitioners.partition import IntArray, Partition, offsets_of

SizeFunction: TypeAlias = Callable[[npt.NDArray[np.float64]], npt.NDArray[Any]]


def size_partition(
    num_samples: int, partition_sizes: npt.ArrayLike, shuffle: bool = True, seed: int | None = 42
) -> Partition:
    """Deal the samples at random into parts of given sizes. The remaining samples belong to no client.

    Args:
        num_samples: length of the dataset.
        partition_sizes: size of each client.
        shuffle: False cuts contiguous parts instead.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: the sizes add up to more than ``num_samples``.

    Example:
        >>> size_partition(4, [1, 3], shuffle=False).client(1)
        array([1, 2, 3])
    """
    sizes = checks.sizes("partition_sizes", partition_sizes, minimum=0)
    check_sum(int(sizes.sum()), num_samples)
    order = deal_order(num_samples, shuffle, np.random.default_rng(seed))
    return Partition(order[: sizes.sum()], offsets_of(sizes))


def check_sum(total: int, num_samples: int) -> None:
    """Reject sizes that exceed the dataset, and warn if they leave samples over."""
    if total > num_samples:
        raise ValueError(f"partition_sizes add up to {total}, and there are {num_samples} samples: lower the sizes.")
    if total < num_samples:
        warnings.warn(
            f"partition_sizes add up to {total}, so {num_samples - total} of {num_samples} samples belong to no"
            " client.",
            stacklevel=3,
        )


def sizes_by_id(num_samples: int, num_partitions: int, partition_id_to_size_fn: SizeFunction) -> IntArray:
    """Return sizes in proportion to a function of the client's number, counted from 1.

    ``size[i] = floor(n * f(i + 1) / sum_j f(j + 1))``; the last client also gets the remainder of the rounding.

    Raises:
        ValueError: a client would have no samples.

    Example:
        >>> sizes_by_id(14, 3, np.square)
        array([1, 4, 9])
    """
    with np.errstate(all="ignore"):
        units = np.asarray(partition_id_to_size_fn(np.arange(1.0, num_partitions + 1)), dtype=np.float64)
        shares = units * num_samples / units.sum()  # This order keeps whole numbers exact.
    sizes = np.where(np.isfinite(shares), shares, -1).astype(np.int64)
    if sizes.shape == (num_partitions,) and (sizes >= 0).all():
        sizes[-1] += num_samples - sizes.sum()
    if sizes.shape != (num_partitions,) or (sizes < 1).any():
        raise ValueError(
            f"num_partitions={num_partitions}: this size function gives a client none of the {num_samples} samples, or"
            " no finite number: lower num_partitions, or use SizePartitioner."
        )
    return sizes


class SizePartitioner(Partitioner):
    """Give each client a chosen number of random samples.

    Use it for pure quantity skew with known sizes. If the sizes add up to less than the dataset, the remaining samples
    belong to no client, and a warning gives their number. The order within a client is random.

    Args:
        partition_sizes: size of each client, at least 1.
        shuffle: False cuts contiguous parts, which is only valid for a dataset in random order.
        seed: equal seeds give equal partitions.

    Raises:
        TypeError: the sizes are not integers.
        ValueError: a size is below 1, or they exceed the dataset.

    Example:
        >>> partitioner = SizePartitioner([1, 4])
        >>> partitioner.dataset = range(5)
        >>> partitioner.partition.sizes.tolist()
        [1, 4]
    """

    def __init__(self, partition_sizes: Sequence[int] | IntArray, shuffle: bool = True, seed: int | None = 42) -> None:
        self.partition_sizes = checks.sizes("partition_sizes", partition_sizes, minimum=1)
        super().__init__(len(self.partition_sizes))
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return size_partition(self._num_samples(), self.partition_sizes, self.shuffle, self.seed)


class IdToSizeFncPartitioner(Partitioner):
    """Give each client a number of random samples in proportion to a function of its number.

    See :func:`sizes_by_id` for the formula. All samples are used; the order within a client is random.

    Args:
        num_partitions: number of clients.
        partition_id_to_size_fn: maps the array ``1.0, 2.0, ..., num_partitions`` to the array of relative sizes.
        shuffle: False cuts contiguous parts, which is only valid for a dataset in random order.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: a client would have no samples.

    Example:
        >>> partitioner = IdToSizeFncPartitioner(2, partition_id_to_size_fn=lambda i: i**3)
        >>> partitioner.dataset = range(18)
        >>> partitioner.partition.sizes.tolist()
        [2, 16]
    """

    def __init__(
        self,
        num_partitions: int,
        partition_id_to_size_fn: SizeFunction,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions)
        if not callable(partition_id_to_size_fn):
            raise TypeError(f"partition_id_to_size_fn={partition_id_to_size_fn!r}: pass a function of an array")
        checks.seed_value(seed)
        self.partition_id_to_size_fn = partition_id_to_size_fn
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return _by_id(self._num_samples(), self.num_partitions, self.partition_id_to_size_fn, self.shuffle, self.seed)


class LinearPartitioner(Partitioner):
    """Give the clients sizes in proportion to 1, 2, 3, ...: mild quantity skew.

    It otherwise equals :class:`IdToSizeFncPartitioner`.

    Example:
        >>> partitioner = LinearPartitioner(num_partitions=3)
        >>> partitioner.dataset = range(12)
        >>> partitioner.partition.sizes.tolist()
        [2, 4, 6]
    """

    def __init__(self, num_partitions: int, shuffle: bool = True, seed: int | None = 42) -> None:
        super().__init__(num_partitions)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return _by_id(self._num_samples(), self.num_partitions, np.positive, self.shuffle, self.seed)


class SquarePartitioner(Partitioner):
    """Give the clients sizes in proportion to 1, 4, 9, ...: marked quantity skew.

    It otherwise equals :class:`IdToSizeFncPartitioner`.

    Example:
        >>> partitioner = SquarePartitioner(num_partitions=3)
        >>> partitioner.dataset = range(28)
        >>> partitioner.partition.sizes.tolist()
        [2, 8, 18]
    """

    def __init__(self, num_partitions: int, shuffle: bool = True, seed: int | None = 42) -> None:
        super().__init__(num_partitions)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return _by_id(self._num_samples(), self.num_partitions, np.square, self.shuffle, self.seed)


class ExponentialPartitioner(Partitioner):
    """Give the clients sizes in proportion to e, e^2, e^3, ...: extreme quantity skew, for few clients.

    It otherwise equals :class:`IdToSizeFncPartitioner`. Ten clients need some 14,000 samples.

    Example:
        >>> partitioner = ExponentialPartitioner(num_partitions=3)
        >>> partitioner.dataset = range(100)
        >>> partitioner.partition.sizes.tolist()
        [9, 24, 67]
    """

    def __init__(self, num_partitions: int, shuffle: bool = True, seed: int | None = 42) -> None:
        super().__init__(num_partitions)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return _by_id(self._num_samples(), self.num_partitions, np.exp, self.shuffle, self.seed)


def _by_id(num_samples: int, num_partitions: int, fn: SizeFunction, shuffle: bool, seed: int | None) -> Partition:
    checks.enough_samples(num_samples, num_partitions)
    return size_partition(num_samples, sizes_by_id(num_samples, num_partitions, fn), shuffle, seed)
