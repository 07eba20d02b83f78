"""Partition by ids in the data: writers, speakers, hospitals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode
from lightning_fedscale.partitioners.grouping import even_sizes, group
from lightning_fedscale.partitioners.labels import Labels, find_labels, is_array
from lightning_fedscale.partitioners.partition import IntArray, Partition

GroupMode: TypeAlias = Literal["allow-smaller", "allow-bigger", "drop-reminder", "strict"]
_MODES = ("allow-smaller", "allow-bigger", "drop-reminder", "strict")


def natural_id_partition(ids: npt.NDArray[Any]) -> tuple[Partition, npt.NDArray[Any]]:
    """Make one client of each distinct id, in sorted order of the ids.

    Returns:
        ``(partition, names)`` with ``names[i]`` the id of client ``i``.

    Example:
        >>> partition, names = natural_id_partition(np.array(["eve", "bob", "eve"]))
        >>> partition.sizes.tolist(), names.tolist()
        ([1, 2], ['bob', 'eve'])
    """
    names, codes = encode(ids)
    return Partition(*group(codes, len(names))), names


def grouped_natural_id_partition(
    ids: npt.NDArray[Any], group_size: int, mode: GroupMode = "allow-smaller", sort_unique_ids: bool = False
) -> tuple[Partition, npt.NDArray[Any], IntArray]:
    """Make one client of every ``group_size`` distinct ids.

    Returns:
        ``(partition, names, group_of_name)``; the group is -1 for an id that is left out.

    Example:
        >>> ids = np.array(["eve", "bob", "eve", "ann"])
        >>> partition, names, groups = grouped_natural_id_partition(ids, group_size=2)
        >>> partition.sizes.tolist(), dict(zip(names.tolist(), groups.tolist()))
        ([3, 1], {'ann': 1, 'bob': 0, 'eve': 0})
    """
    names, codes = encode(ids)
    group_sizes = _group_sizes(len(names), group_size, mode)
    groups = np.full(len(names), -1, dtype=np.int64)
    groups[: group_sizes.sum()] = np.repeat(np.arange(len(group_sizes)), group_sizes)
    if not sort_unique_ids:
        first = np.full(len(names), len(ids), dtype=np.int64)
        np.minimum.at(first, codes, np.arange(len(ids)))
        rank = np.empty(len(names), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(names))
        groups = groups[rank]
    return Partition(*group(groups[codes], len(group_sizes))), names, groups


def _group_sizes(num_ids: int, group_size: int, mode: GroupMode) -> IntArray:
    num_full, rest = divmod(num_ids, group_size)
    if mode == "allow-smaller":
        return np.array([group_size] * num_full + [rest] * bool(rest))
    if num_full == 0:
        raise ValueError(
            f"group_size={group_size}: there are only {num_ids} ids: pass at most that many, or mode='allow-smaller'."
        )
    if mode == "strict" and rest:
        raise ValueError(
            f"group_size={group_size} with mode='strict': {num_ids} ids do not fill whole groups: pass a divisor of"
            f" {num_ids}, or another mode."
        )
    return even_sizes(num_ids, num_full) if mode == "allow-bigger" else np.full(num_full, group_size)


def _find_ids(dataset: Any, partition_by: str | None) -> Labels:
    # A list of tuples is a list of compound ids here; elsewhere it is a list of samples.
    if partition_by is None and isinstance(dataset, list) and isinstance(dataset[0], tuple):
        return np.fromiter(dataset, dtype=object, count=len(dataset))
    if partition_by is None and not is_array(dataset):
        # Do not fall back to the labels: one client per class would be a poor guess at the authors.
        raise ValueError(f"partition_by=None: {_where_ids_are(dataset)}.")
    return find_labels(dataset, partition_by)


def _where_ids_are(dataset: Any) -> str:
    """Return advice on how to name the ids in the data."""
    while (inner := getattr(dataset, "dataset", None)) is not None:  # of a Subset
        dataset = inner
    name, entries = type(dataset).__name__, len(getattr(dataset, "tensors", ()))  # of a TensorDataset
    if not entries:
        return (
            f'pass the column of {name} that has the ids, such as NaturalIdPartitioner(partition_by="user"), or their'
            ' position in samples that are tuples, partition_by="2"'
        )
    attribute = 'or set them as an attribute, dataset.user = ids, and pass partition_by="user"'
    if entries > 2:
        return (
            f"pass the number of the tensor of {name} that has the ids, such as"
            f' NaturalIdPartitioner(partition_by="{entries - 1}"), {attribute}'
        )
    return (
        f"a {name} of {entries} tensor(s) has no ids: add them as one more tensor,"
        f' NaturalIdPartitioner(partition_by="{entries}"), {attribute}'
    )


def _by_known_ids(ids: Labels, clients: Mapping[Any, int], num_clients: int) -> Partition:
    names, codes = encode(ids)
    of_name = np.array([clients.get(name, -1) for name in names.tolist()], dtype=np.int64)
    return Partition(*group(of_name[codes], num_clients))


class NaturalIdPartitioner(Partitioner):
    """Make one client of each distinct value of a column: the natural federated split, by the origin of the data.

    The data determine the number of clients. Clients are numbered by their sorted ids, whatever order they appear in.
    All samples are used, and each client's samples are in the order of the dataset.

    Args:
        partition_by: column with the ids, or their position in samples that are tuples, such as "2"; None if
            the dataset is itself a list or array of ids. Ids may be strings, numbers or, in a list, tuples.

    Raises:
        ValueError: there is no such column, or an id is missing.

    Example:
        >>> partitioner = NaturalIdPartitioner()
        >>> partitioner.dataset = ["eve", "bob", "eve"]
        >>> partitioner.num_partitions, partitioner.partition_id_to_natural_id
        (2, {0: 'bob', 1: 'eve'})
    """

    def __init__(self, partition_by: str | None = None) -> None:
        super().__init__(None, partition_by)
        self._names: npt.NDArray[Any] = np.empty(0)

    @property
    def partition_id_to_natural_id(self) -> dict[int, Any]:
        """The id of each client, by its number."""
        assert self.partition is not None  # Sets the names.
        return dict(enumerate(self._names.tolist()))

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Give each further sample to the client of its id, if there is one."""
        clients = {name: client for client, name in self.partition_id_to_natural_id.items()}
        return _by_known_ids(_find_ids(dataset, self.partition_by), clients, self.partition.num_clients)

    def _split(self) -> Partition:
        partition, self._names = natural_id_partition(_find_ids(self.dataset, self.partition_by))
        return partition


class GroupedNaturalIdPartitioner(Partitioner):
    """Make one client of every few distinct values of a column, as organisations of many people.

    This turns a cross-device dataset into a cross-silo one. Ids are grouped in the order in which they first appear.
    Each client's samples are in the order of the dataset.

    Args:
        partition_by: column with the ids, or their position in samples that are tuples, such as "2"; None if
            the dataset is itself a list or array of ids.
        group_size: ids in each group; required.
        mode: what happens to the ids that do not fill a group. ``"allow-smaller"``: they form a smaller last group;
            ``"allow-bigger"``: they are spread over the first groups; ``"drop-reminder"``: their samples belong to no
            client; ``"strict"``: they raise an error.
        sort_unique_ids: group the ids in sorted order instead.

    Raises:
        ValueError: there is no such column, there are too few ids for one group, or they do not fill whole groups
            (``"strict"``).

    Example:
        >>> partitioner = GroupedNaturalIdPartitioner(group_size=2)
        >>> partitioner.dataset = ["eve", "bob", "eve", "ann"]
        >>> partitioner.partition_id_to_natural_ids
        {0: ['bob', 'eve'], 1: ['ann']}
    """

    def __init__(
        self,
        partition_by: str | None = None,
        group_size: int | None = None,
        mode: GroupMode = "allow-smaller",
        sort_unique_ids: bool = False,
    ) -> None:
        super().__init__(None, partition_by)
        checks.given("group_size", group_size, 'GroupedNaturalIdPartitioner(partition_by="user", group_size=10)')
        self.group_size = checks.integer("group_size", group_size)
        checks.one_of("mode", mode, _MODES)
        self.mode = mode
        self.sort_unique_ids = sort_unique_ids
        self._names: npt.NDArray[Any] = np.empty(0)
        self._groups: IntArray = np.empty(0, dtype=np.int64)

    @property
    def natural_id_to_partition_id(self) -> dict[Any, int]:
        """The client's number for each id that belongs to one, by sorted id."""
        assert self.partition is not None  # Sets names and groups.
        kept = self._groups >= 0
        return dict(zip(self._names[kept].tolist(), self._groups[kept].tolist(), strict=True))

    @property
    def partition_id_to_natural_ids(self) -> dict[int, list[Any]]:
        """The ids of each client, by its number, sorted."""
        members: dict[int, list[Any]] = {i: [] for i in range(self.partition.num_clients)}
        for name, client in self.natural_id_to_partition_id.items():
            members[client].append(name)
        return members

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Give each further sample to the client of its id, if there is one."""
        ids = _find_ids(dataset, self.partition_by)
        return _by_known_ids(ids, self.natural_id_to_partition_id, self.partition.num_clients)

    def _split(self) -> Partition:
        ids = _find_ids(self.dataset, self.partition_by)
        partition, self._names, self._groups = grouped_natural_id_partition(
            ids, self.group_size, self.mode, self.sort_unique_ids
        )
        return partition
