"""The identity of a partition, by which a request is compared with the runs of a law."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class PartitionId(NamedTuple):
    """What identifies a partition that was passed.

    Attributes:
        name: name of a partitioner or a file; None for a Partition.
        fingerprint: fingerprint of the partition; None if only a partitioner's name is known.
        clients: number of clients of the partition; None if only a partitioner's name is known.
    """

    name: str | None
    fingerprint: str | None = None
    clients: int | None = None

    def __str__(self) -> str:
        return self.name or f"{self.fingerprint or ''}"[:8]


def partition_id(given: Any) -> PartitionId:
    """Identify a partitioner's name, the file of a saved partition, or a Partition.

    Raises:
        ValueError: for a file that is not there, or holds no partition.
        TypeError: for anything else.
    """
    if isinstance(known := getattr(given, "fingerprint", None), str):
        return PartitionId(None, known, getattr(given, "num_clients", None))
    if not isinstance(given, (str, Path)):
        raise TypeError(
            f"partition={given!r}: pass a partitioner's name, the file of a saved partition, or a Partition."
        )
    file = Path(given)
    if file.suffix != ".json":
        return PartitionId(str(given))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return PartitionId(file.name, str(content["fingerprint"]), int(content["num_clients"]))
    except FileNotFoundError:
        raise ValueError(f"partition={str(file)!r}: this file does not exist. Write it with Partition.save.") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"partition={str(file)!r}: this file holds no saved partition ({error!r}). Write it with Partition.save."
        ) from None


def is_fingerprint(text: str) -> bool:
    """Return whether a text is the fingerprint of a partition."""
    return _FINGERPRINT.fullmatch(text) is not None
