"""Base class of all partitioners: it takes a dataset and computes its partition lazily and once."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.alike import alike_by_labels, alike_by_size
from lightning_fedscale.partitioners.labels import Labels, find_labels, num_samples
from lightning_fedscale.partitioners.partition import IntArray, Partition


class Partitioner(ABC):
    """Base of all partitioners.

    Assign :attr:`dataset`, then ask for :attr:`partition` or for :meth:`load_partition`. The dataset may be a 1-D
    array of labels, any map-style torch dataset, or a Hugging Face dataset. After another one is assigned, the next
    request splits the new dataset, as a new partitioner would.

    A subclass only has to store its arguments, for logs, and to call its pure function in :meth:`_split`.

    Args:
        num_partitions: number of clients; None if the data determine it.
        partition_by: column, key or attribute with the labels; None looks in the usual places, see
            :func:`~lightning_fedscale.partitioners.find_labels`.

    Example:
        >>> from lightning_fedscale.partitioners import IidPartitioner
        >>> partitioner = IidPartitioner(num_partitions=2)
        >>> partitioner.dataset = [0, 0, 1, 1, 1]
        >>> partitioner.partition.sizes.tolist()
        [3, 2]
    """

    def __init__(self, num_partitions: int | None = None, partition_by: str | None = None) -> None:
        checks.column(partition_by)
        self.partition_by = partition_by
        self._num_partitions = None if num_partitions is None else checks.integer("num_partitions", num_partitions)
        self._dataset: Any = None
        self._partition: Partition | None = None

    @abstractmethod
    def _split(self) -> Partition:
        """Split the assigned dataset."""

    @property
    def dataset(self) -> Any:
        """The dataset to split.

        Raises:
            AttributeError: no dataset was assigned yet.
        """
        if self._dataset is None:
            raise AttributeError(
                f"{type(self).__name__} has no dataset: assign one first, partitioner.dataset = dataset."
            )
        return self._dataset

    @dataset.setter
    def dataset(self, dataset: Any) -> None:
        num_samples(dataset)  # Rejects streams and empty datasets here, not at the first request.
        self._dataset = dataset
        self._partition = None

    @property
    def partition(self) -> Partition:
        """The whole partition, computed at the first request."""
        if self._partition is None:
            self._partition = self._split()
        return self._partition

    @property
    def num_partitions(self) -> int:
        """Number of clients; if the data determine it, a dataset must have been assigned."""
        return self.partition.num_clients if self._num_partitions is None else self._num_partitions

    def load_partition(self, partition_id: int) -> IntArray:
        """Return the positions of the samples of one client.

        Raises:
            IndexError: there is no such client.
        """
        return self.partition.client(partition_id)

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Divide further data, such as a validation set, among the same clients as the dataset.

        Partitioners by label divide it by label, see :func:`~lightning_fedscale.partitioners.alike.alike_by_labels`;
        partitioners by natural id give each sample to the client of its id; all others divide it in proportion to
        sizes. Assigning the further data as a new dataset would draw other clients. A client may get no sample, and
        samples of labels or ids that no client has are left out.

        Args:
            dataset: the further data, of the same kind as the dataset that was assigned.
            seed: equal seeds give equal divisions.

        Raises:
            AttributeError: no dataset was assigned yet.
            TypeError, ValueError: the further data lack these labels or ids.

        Example:
            >>> from lightning_fedscale.partitioners import PathologicalPartitioner
            >>> partitioner = PathologicalPartitioner(num_partitions=2, num_classes_per_partition=1)
            >>> partitioner.dataset = [0, 1] * 10
            >>> validation = [1, 1, 0, 1]
            >>> [sorted(validation[i] for i in partitioner.divide_alike(validation).client(k)) for k in range(2)]
            [[1, 1, 1], [0]]
        """
        if "partition_by" not in self._arguments():
            return alike_by_size(self.partition, num_samples(dataset), seed)
        return alike_by_labels(self.partition, self._labels(), find_labels(dataset, self.partition_by), seed)

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._changed_arguments().items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def _changed_arguments(self) -> dict[str, Any]:
        """Return the stored arguments by name that differ from their defaults; a subclass may store only some."""
        # Properties are not read: `partition` and `dataset`, which may also be arguments of subclasses, need data.
        own = {name: value for name, value in vars(self).items() if name not in ("_dataset", "_partition")}
        stored = {name.removeprefix("_"): value for name, value in own.items()} | own
        given = {name: parameter for name, parameter in self._arguments().items() if name in stored}
        return {name: stored[name] for name, each in given.items() if repr(stored[name]) != repr(each.default)}

    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self)).parameters

    def _labels(self) -> Labels:
        return find_labels(self.dataset, self.partition_by)

    def _num_samples(self) -> int:
        return num_samples(self.dataset)
