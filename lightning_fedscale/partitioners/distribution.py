"""Label skew by the user's own table, such as a power law."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.grouping import deal_order, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import IntArray, Partition


def distribution_partition(
    labels: Labels,
    distribution_array: npt.NDArray[Any],
    num_partitions: int,
    num_unique_labels_per_partition: int,
    preassigned_num_samples_per_label: int,
    rescale: bool = True,
    shuffle: bool = True,
    seed: int | None = 42,
) -> Partition:
    """Divide each class among its clients by a row of a table.

    Client ``i`` has the classes ``i, i + 1, ..., i + m - 1`` modulo their number, where ``m`` is
    ``num_unique_labels_per_partition``. Row ``k`` of the table holds the shares of the clients that have class ``k``,
    in ascending order of the clients.
    (After Li et al. 2020, https://arxiv.org/abs/1812.06127.)

    Args: the labels, then those of :class:`DistributionPartitioner`.

    Example:
        >>> labels = np.repeat([0, 1], 10)
        >>> table = np.array([[1.0, 4.0], [1.0, 1.0]])
        >>> distribution_partition(labels, table, 4, 1, 0).sizes.tolist()
        [2, 5, 8, 5]
    """
    classes, codes = encode_classes(labels)
    num_columns = _check_shapes(len(classes), distribution_array, num_partitions, num_unique_labels_per_partition)
    checks.enough_samples(len(labels), num_partitions)
    rng = np.random.default_rng(seed)
    order = deal_order(len(labels), shuffle, rng)
    members, starts = group(codes, len(classes), order)
    if rescale:
        counts = _rescale(distribution_array, np.diff(starts), preassigned_num_samples_per_label, rng)
    else:
        counts = distribution_array.astype(np.int64)
        if (counts.sum(axis=1) > np.diff(starts)).any():
            k = int(np.argmax(counts.sum(axis=1) - np.diff(starts)))
            raise ValueError(
                f"distribution_array: its row for class {classes[k]} takes {counts[k].sum()} samples, and there are"
                f" {starts[k + 1] - starts[k]}: lower the row, or pass rescale=True."
            )
    owner = np.full(len(labels), -1, dtype=np.int64)
    for k, samples in enumerate(np.split(members, starts[1:-1])):
        # The clients that have class k lie within the m before k, modulo the number of classes.
        first = (k - np.arange(num_unique_labels_per_partition)) % len(classes)
        clients = np.sort((first + np.arange(0, num_partitions, len(classes))[:, None]).ravel())
        assert len(clients) == num_columns
        holders = np.repeat(clients, counts[k])
        owner[samples[: len(holders)]] = holders
    return Partition(*group(owner, num_partitions, order))


def _check_shapes(num_classes: int, table: npt.NDArray[Any], num_partitions: int, per_partition: int) -> int:
    if num_partitions % num_classes:
        raise ValueError(
            f"num_partitions={num_partitions}: pass a multiple of the number of classes, {num_classes}, such as"
            f" {max(1, num_partitions // num_classes) * num_classes}."
        )
    if per_partition > num_classes:
        raise ValueError(
            f"num_unique_labels_per_partition={per_partition}: pass at most the number of classes, {num_classes}."
        )
    num_columns = per_partition * num_partitions // num_classes
    if table.shape != (num_classes, num_columns):
        raise ValueError(
            f"distribution_array has shape {table.shape}: pass ({num_classes}, {num_columns}), which is classes x"
            " (num_unique_labels_per_partition * num_partitions / classes)."
        )
    return num_columns


def _rescale(table: npt.NDArray[Any], stock: IntArray, preassigned: int, rng: np.random.Generator) -> IntArray:
    """Scale each row to the samples of its class; a random client of the row gets the remainder of the rounding."""
    num_columns = table.shape[1]
    free = stock - preassigned * num_columns
    if (free < 0).any():
        raise ValueError(
            f"preassigned_num_samples_per_label={preassigned}: {num_columns} clients share a class of {stock.min()}"
            f" samples: pass at most {stock.min() // num_columns}."
        )
    shares = table / table.sum(axis=1, keepdims=True)
    counts: IntArray = np.floor(shares * free[:, None]).astype(np.int64) + preassigned
    lucky = rng.integers(0, num_columns, size=len(stock))
    counts[np.arange(len(stock)), lucky] += stock - counts.sum(axis=1)
    return counts


class DistributionPartitioner(Partitioner):
    """Divide each class among its clients by a table.

    With ``rescale=True`` all samples are used; with ``rescale=False`` the table holds numbers of samples (cut to
    integers), and the remaining samples belong to no client. The order within a client is random.

    Args:
        distribution_array: ``classes x (num_unique_labels_per_partition * num_partitions / classes)``; row ``k`` is for
            the ``k``-th class in sorted order and has one entry for each client that has it.
        num_partitions: number of clients, a multiple of the number of classes.
        num_unique_labels_per_partition: classes of each client.
        partition_by: column with the labels; None looks in the usual places.
        preassigned_num_samples_per_label: samples of each of its classes that a client gets before the table is applied
            (only with ``rescale``); required.
        rescale: treat rows as proportions.
        shuffle: False deals the samples of a class in the order of the dataset, and leaves each client's ascending.
        seed: equal seeds give equal partitions.

    Raises:
        TypeError: the table is not an array of numbers.
        ValueError: the table does not fit the classes and clients, or needs more samples than there are.

    Example:
        >>> table = np.random.default_rng(0).lognormal(0.0, 2.0, size=(2, 4))
        >>> partitioner = DistributionPartitioner(table, num_partitions=4, num_unique_labels_per_partition=2,
        ...                                       preassigned_num_samples_per_label=5)
        >>> partitioner.dataset = [0, 1] * 100
        >>> partitioner.partition.num_samples
        200
    """

    def __init__(
        self,
        distribution_array: npt.NDArray[Any],
        num_partitions: int,
        num_unique_labels_per_partition: int,
        partition_by: str | None = None,
        preassigned_num_samples_per_label: int | None = None,
        rescale: bool = True,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions, partition_by)
        self.distribution_array = np.asarray(distribution_array)
        if self.distribution_array.dtype.kind not in "iuf" or self.distribution_array.ndim != 2:
            raise TypeError(
                f"distribution_array has dtype {self.distribution_array.dtype}, shape {self.distribution_array.shape}:"
                " pass a 2-D array of numbers, one row per class."
            )
        values = self.distribution_array
        if not np.isfinite(values).all() or (values < 0).any() or (rescale and not values.any(axis=1).all()):
            raise ValueError(
                "distribution_array: pass finite numbers of at least 0, and with rescale=True no row of zeros only."
            )
        self.num_unique_labels_per_partition = checks.integer(
            "num_unique_labels_per_partition", num_unique_labels_per_partition
        )
        checks.given(
            "preassigned_num_samples_per_label",
            preassigned_num_samples_per_label,
            "DistributionPartitioner(table, num_partitions=100, num_unique_labels_per_partition=2, "
            "preassigned_num_samples_per_label=5)",
        )
        self.preassigned_num_samples_per_label = checks.integer(
            "preassigned_num_samples_per_label", preassigned_num_samples_per_label, minimum=0
        )
        checks.seed_value(seed)
        self.rescale = rescale
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return distribution_partition(
            self._labels(),
            self.distribution_array,
            self.num_partitions,
            self.num_unique_labels_per_partition,
            self.preassigned_num_samples_per_label,
            self.rescale,
            self.shuffle,
            self.seed,
        )
