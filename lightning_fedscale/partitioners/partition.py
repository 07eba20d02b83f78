"""The partition: which client has which sample, as one pair of arrays for any number of clients."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]

_FORMAT_VERSION = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of every client, grouped by client.

    Client ``i`` has ``indices[offsets[i]:offsets[i + 1]]``. It takes 8 bytes a sample and 8 bytes a client, without a
    Python object per client, so a million clients are two arrays. Both become read-only views; pass arrays that you
    will not write to again.

    Args:
        indices: positions of samples in the dataset, grouped by client, int64.
        offsets: start of each client, ``num_clients + 1`` numbers from 0 to ``len(indices)``, int64.

    Raises:
        ValueError: the offsets do not describe the indices.

    Example:
        >>> partition = Partition.from_lists([[4, 0], [1], [3, 2]])
        >>> partition.num_clients, partition.num_samples, partition.sizes.tolist()
        (3, 5, [2, 1, 2])
        >>> partition.client(2)
        array([3, 2])
    """

    indices: IntArray
    offsets: IntArray

    def __post_init__(self) -> None:
        for name in ("indices", "offsets"):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int64).view()
            if array.ndim != 1:
                raise ValueError(f"{name} has shape {array.shape}: pass an array with one dimension.")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        offsets = self.offsets
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(self.indices) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets={offsets}: pass numbers that rise from 0 to the number of indices, {len(self.indices)}, one"
                " more than there are clients; Partition.from_lists makes them."
            )

    @classmethod
    def from_lists(cls, clients: Sequence[npt.ArrayLike] | Mapping[int, npt.ArrayLike]) -> Partition:
        """Build a partition from one list of sample positions per client.

        Args:
            clients: a sequence, or a mapping with the keys ``0 .. num_clients - 1`` in any order.

        Raises:
            TypeError: ``clients`` contains no lists.
            ValueError: a key is missing, a position is not an integer, or a sample appears twice.

        Example:
            >>> Partition.from_lists({1: [2], 0: [0, 1]}).sizes.tolist()
            [2, 1]
        """
        if isinstance(clients, Mapping):
            if set(clients) != set(range(len(clients))):
                raise ValueError(
                    f"clients has the keys {sorted(clients)[:10]}: number the clients from 0 to num_clients - 1."
                )
            clients = [clients[i] for i in range(len(clients))]
        if not isinstance(clients, Iterable):
            raise TypeError(f"clients={clients!r}: pass a list of sample positions for each client, [[0, 2], [1]].")
        arrays = [np.asarray(client) for client in clients]
        for i, array in enumerate(arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"clients[{i}] has dtype {array.dtype}, shape {array.shape}: pass a list of integers.")
        sizes = np.array([array.size for array in arrays], dtype=np.int64)
        indices = np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)
        partition = cls(indices, offsets_of(sizes))
        check_partition(partition)
        return partition

    @property
    def num_clients(self) -> int:
        """Number of clients, those without samples included."""
        return len(self.offsets) - 1

    @property
    def num_samples(self) -> int:
        """Number of samples that belong to a client."""
        return len(self.indices)

    @property
    def sizes(self) -> IntArray:
        """Number of samples of each client."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return self.num_clients

    def client(self, i: int) -> IntArray:
        """Return the sample positions of client ``i``: a read-only view, not a copy.

        Raises:
            IndexError: there is no client ``i`` (negative numbers do not count from the end).
        """
        i = operator.index(i)
        if not 0 <= i < self.num_clients:
            raise IndexError(f"client {i} does not exist: pass a number from 0 to {self.num_clients - 1}.")
        return self.indices[self.offsets[i] : self.offsets[i + 1]]

    def covers(self, num_samples: int) -> bool:
        """Return whether each of the samples ``0 .. num_samples - 1`` belongs to exactly one client."""
        return len(self.indices) == num_samples and bool((np.sort(self.indices) == np.arange(num_samples)).all())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of offsets and indices as little-endian int64, equal on every platform."""
        digest = hashlib.sha256(np.int64(self.num_clients).astype("<i8").tobytes())
        for array in (self.offsets, self.indices):
            digest.update(array.astype("<i8", copy=False).data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Partition(num_clients={self.num_clients}, num_samples={self.num_samples})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the partition as JSON, atomically: a reader sees the old file or the new one, never a part.

        Missing folders are created.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is unique, since several processes may save the same partition at once.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(f'{{"version": {_FORMAT_VERSION}, "num_clients": {self.num_clients}, ')
                file.write(f'"num_samples": {self.num_samples}, "fingerprint": "{self.fingerprint}", "offsets": [')
                _write_integers(file, self.offsets)
                file.write('], "indices": [')
                _write_integers(file, self.indices)
                file.write("]}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Partition:
        """Read a partition that :meth:`save` wrote, and verify its hash.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a partition, or it was changed since it was saved.
        """
        remedy = "restore the file, or partition the dataset again and save that."
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version, fingerprint = content["version"], content["fingerprint"]
            if version != _FORMAT_VERSION:
                raise ValueError(f"version={version}, and this release reads version {_FORMAT_VERSION}")
            partition = cls(np.array(content["indices"], np.int64), np.array(content["offsets"], np.int64))
        except FileNotFoundError as error:
            missing = FileNotFoundError(f"path={os.fspath(path)!r}: there is no such file: save a partition first.")
            missing.strerror = error.strerror  # for callers that report only the reason
            raise missing from None
        except (KeyError, TypeError, OverflowError, ValueError) as error:
            raise ValueError(
                f"path={os.fspath(path)!r}: the file is not a saved partition ({error}): {remedy}"
            ) from error
        if partition.fingerprint != fingerprint:
            raise ValueError(
                f"path={os.fspath(path)!r}: the file was changed after it was saved: its content has the fingerprint"
                f" {partition.fingerprint[:12]}..., and it states {str(fingerprint)[:12]}...: {remedy}"
            )
        return partition


def check_partition(partition: Partition, num_samples: int | None = None) -> None:
    """Check that no sample is outside the dataset or belongs to two clients.

    Args:
        partition: the partition to check.
        num_samples: length of the dataset; None checks no upper end.

    Raises:
        ValueError: the partition is invalid; the message names the sample.

    Example:
        >>> check_partition(Partition.from_lists([[0, 2], [1]]), num_samples=3)
    """
    ordered = np.sort(partition.indices)
    if not len(ordered):
        return
    if ordered[0] < 0 or (num_samples is not None and ordered[-1] >= num_samples):
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        known = "of at least 0" if num_samples is None else f"from 0 to {num_samples - 1}"
        raise ValueError(
            f"sample {wrong} is not in the dataset: pass positions {known}, or the dataset that was partitioned."
        )
    twice = ordered[:-1][ordered[:-1] == ordered[1:]]
    if len(twice):
        raise ValueError(f"sample {twice[0]} appears more than once: give every sample to at most one client.")


def offsets_of(sizes: npt.ArrayLike) -> IntArray:
    """Return the starts of consecutive groups of these sizes, and the end of the last one.

    Example:
        >>> offsets_of([2, 0, 3])
        array([0, 2, 2, 5])
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _write_integers(file: TextIO, array: IntArray) -> None:
    # Write in chunks: ten million Python integers at once would take half a gigabyte.
    for start in range(0, len(array), _CHUNK):
        file.write((", " if start else "") + json.dumps(array[start : start + _CHUNK].tolist())[1:-1])
