"""Label skew by shards, as in the paper that introduced FedAvg."""

from __future__ import annotations

import numpy as np

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode
from lightning_fedscale.partitioners.grouping import deal_order, even_sizes, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import IntArray, Partition


def shard_partition(
    labels: Labels,
    num_partitions: int,
    num_shards_per_partition: int | None = None,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
    shuffle: bool = True,
    seed: int | None = 42,
) -> Partition:
    """Sort the samples by label, cut them into shards, and deal the shards at random.

    (McMahan et al. 2017, https://arxiv.org/abs/1602.05629: 100 clients with 2 shards of 300 samples each.)

    Args: the labels, then those of :class:`ShardPartitioner`.

    Example:
        >>> labels = np.repeat([0, 1, 2, 3], 3)
        >>> partition = shard_partition(labels, num_partitions=2, num_shards_per_partition=2)
        >>> [len(set(labels[partition.client(i)])) for i in range(2)]
        [2, 2]
    """
    checks.enough_samples(len(labels), num_partitions)
    rng = np.random.default_rng(seed)
    order = deal_order(len(labels), shuffle, rng)
    distinct, codes = encode(labels)
    by_label, _ = group(codes, len(distinct), order)
    shards = _shard_sizes(len(labels), num_partitions, num_shards_per_partition, shard_size, keep_incomplete_shard)
    if num_shards_per_partition is None:
        num_used = len(shards)
        shards_of_client = even_sizes(num_used, num_partitions)
    else:
        num_used = num_partitions * num_shards_per_partition
        shards_of_client = np.full(num_partitions, num_shards_per_partition)
    owner_of_shard = np.full(len(shards), -1, dtype=np.int64)
    owner_of_shard[rng.permutation(len(shards))[:num_used]] = np.repeat(np.arange(num_partitions), shards_of_client)
    owner = np.full(len(labels), -1, dtype=np.int64)
    owner[by_label[: shards.sum()]] = np.repeat(owner_of_shard, shards)
    return Partition(*group(owner, num_partitions, order))


def _shard_sizes(
    num_samples: int, num_partitions: int, per_partition: int | None, shard_size: int | None, keep_incomplete: bool
) -> IntArray:
    """Return the sizes of the shards, in the order of the labels; samples after the last shard belong to no client."""
    if shard_size is None:
        assert per_partition is not None
        num_shards = num_partitions * per_partition
        if num_shards > num_samples:
            raise ValueError(
                f"num_shards_per_partition={per_partition} with num_partitions={num_partitions}: these are {num_shards}"
                f" shards of {num_samples} samples: lower one of them."
            )
        if keep_incomplete:
            return even_sizes(num_samples, num_shards)
        shard_size = num_samples // num_shards
    num_full, rest = divmod(num_samples, shard_size)
    sizes = np.full(num_full, shard_size)
    if per_partition is None:
        if keep_incomplete and rest:
            sizes = np.append(sizes, rest)
        if len(sizes) < num_partitions:
            raise ValueError(
                f"shard_size={shard_size}: {num_samples} samples give {len(sizes)} shards for"
                f" num_partitions={num_partitions}: pass at most {num_samples // num_partitions}."
            )
    elif num_full < num_partitions * per_partition:
        raise ValueError(
            f"shard_size={shard_size}, num_shards_per_partition={per_partition}, num_partitions={num_partitions}: these"
            f" need {num_partitions * per_partition * shard_size} samples, and there are {num_samples}: lower one of"
            " them."
        )
    return sizes


class ShardPartitioner(Partitioner):
    """Give each client some shards of the dataset sorted by label.

    With two shards per client most clients see two classes. The dataset can be cut in three ways:

    ============================  ==============  =================================================================
    ``num_shards_per_partition``  ``shard_size``  result
    ============================  ==============  =================================================================
    ``s``                         None            ``floor(n / (clients * s))`` samples a shard, ``s`` shards a client
    ``s``                         ``z``           ``z`` samples a shard, ``s`` shards a client
    None                          ``z``           all shards of ``z`` samples; the first clients may get one more
    ============================  ==============  =================================================================

    Samples that are left over belong to no client, unless ``keep_incomplete_shard`` is true: then all samples are used,
    in shards whose sizes differ by at most one (first row) or with a smaller last shard (third row). It has no effect
    if both numbers are given. The order within a client is random.

    Args:
        num_partitions: number of clients.
        partition_by: column with the labels; None looks in the usual places.
        num_shards_per_partition: shards of each client.
        shard_size: samples of each shard.
        keep_incomplete_shard: use all samples, see above.
        shuffle: False sorts by label stably, and leaves each client's samples ascending.
        seed: equal seeds give equal partitions.

    Raises:
        TypeError: a number is not an integer.
        ValueError: neither number is given, or there are too few samples for them.

    Example:
        >>> partitioner = ShardPartitioner(num_partitions=2, shard_size=2, keep_incomplete_shard=True)
        >>> partitioner.dataset = [0, 0, 1, 1, 2, 2, 3]
        >>> partitioner.partition.num_samples
        7
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str | None = None,
        num_shards_per_partition: int | None = None,
        shard_size: int | None = None,
        keep_incomplete_shard: bool = False,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions, partition_by)
        if num_shards_per_partition is None and shard_size is None:
            raise ValueError(
                "num_shards_per_partition=None and shard_size=None: pass one of them, such as"
                " ShardPartitioner(num_partitions=10, num_shards_per_partition=2)."
            )
        if num_shards_per_partition is not None:
            checks.integer("num_shards_per_partition", num_shards_per_partition)
        if shard_size is not None:
            checks.integer("shard_size", shard_size)
        checks.seed_value(seed)
        self.num_shards_per_partition = num_shards_per_partition
        self.shard_size = shard_size
        self.keep_incomplete_shard = keep_incomplete_shard
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return shard_partition(
            self._labels(),
            self.num_partitions,
            self.num_shards_per_partition,
            self.shard_size,
            self.keep_incomplete_shard,
            self.shuffle,
            self.seed,
        )
