"""Partitioners that return an existing partition."""

from __future__ import annotations

import os
from typing import Any

from lightning_fedscale.partitioners.alike import alike_by_labels, alike_by_size
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.labels import find_labels, num_samples
from lightning_fedscale.partitioners.partition import Partition, check_partition


class FinishedPartitioner(Partitioner):
    """Return an existing partition, such as one read from a file, for inspection or plots.

    Args:
        partition: the partition.
        partition_by: column, item or attribute with the labels, for plots and `divide_alike`.

    Raises:
        ValueError: on the first request after a dataset is assigned, if the partition does not fit it.

    Example:
        >>> partitioner = FinishedPartitioner(Partition.from_lists([[0, 2], [1]]))
        >>> partitioner.dataset = ["cat", "dog", "cat"]
        >>> partitioner.load_partition(0)
        array([0, 2])
    """

    def __init__(self, partition: Partition, partition_by: str | None = None) -> None:
        super().__init__(partition.num_clients, partition_by)
        self._finished = partition

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Divide further data by label if the dataset has classes, else in proportion to sizes."""
        try:
            labels = self._labels()
            encode_classes(labels)
        except ValueError:
            if self.partition_by is not None:
                raise
            return alike_by_size(self.partition, num_samples(dataset), seed)
        return alike_by_labels(self.partition, labels, find_labels(dataset, self.partition_by), seed)

    def _split(self) -> Partition:
        check_partition(self._finished, self._num_samples())
        return self._finished

    def __repr__(self) -> str:
        return repr(self._finished)


class FilePartitioner(FinishedPartitioner):
    """Return the partition in a file that `Partition.save` or ``fedscale partition --save`` wrote.

    Wherever a partitioner is given by name, the name of such a file (ending in ``.json``) is valid too.

    Args:
        path: path of the file.
        partition_by: column, item or attribute with the labels, for plots and `divide_alike`.

    Raises:
        ValueError: there is no such file, or it holds no partition or a changed one; on the first request after a
            dataset is assigned, if the file divides more or fewer samples. A partition with gaps fits all data that
            have its samples; to leave out samples beyond its last one, pass ``Partition.load(path)`` instead.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "hospitals.json")
        >>> Partition.from_lists([[0, 2], [1]]).save(path)
        >>> FilePartitioner(path).num_partitions
        2
    """

    def __init__(self, path: str | os.PathLike[str], partition_by: str | None = None) -> None:
        self.path = os.fspath(path)
        try:
            partition = Partition.load(self.path)
        except OSError as error:
            raise ValueError(
                f"partitioner={self.path!r}: the file cannot be read: {error.strerror}. Pass a file that Partition.save"
                " or fedscale partition --save wrote."
            ) from None
        except ValueError as error:
            raise ValueError(f"partitioner={self.path!r}: {error}") from error
        super().__init__(partition, partition_by)

    def _split(self) -> Partition:
        divided, samples = self._finished.num_samples, self._num_samples()
        if divided != samples and self._finished.covers(divided):
            others = f", or pass Partition.load({self.path!r}) to train on these alone" if divided < samples else ""
            raise ValueError(
                f"it divides {divided:,} samples, and the dataset has {samples:,}, so it was made for other data."
                f" Partition this dataset with fedscale partition --save{others}."
            )
        return super()._split()

    __repr__ = Partitioner.__repr__
