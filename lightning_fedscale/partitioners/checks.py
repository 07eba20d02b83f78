"""Checks of the partitioners' arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners.partition import IntArray, Partition
from lightning_fedscale.utils.checks import in_interval, integer, one_of

__all__ = [
    "column",
    "concentration",
    "enough_samples",
    "given",
    "in_interval",
    "integer",
    "one_of",
    "seed_value",
    "sizes",
    "whole_partition",
]


def seed_value(seed: object) -> None:
    """Check a seed: a non-negative integer, or None for a new one at each computation."""
    if seed is not None:
        integer("seed", seed, minimum=0)


def whole_partition(value: object) -> None:
    """Check a ``partition``.

    Raises:
        TypeError: it is not a Partition.
    """
    if not isinstance(value, Partition):
        raise TypeError(f"partition={value!r}: pass a Partition, such as partitioner.partition.")


def column(partition_by: object) -> None:
    """Check ``partition_by``; a number is most likely meant for the argument after it."""
    if partition_by is not None and not isinstance(partition_by, str):
        raise TypeError(
            f"partition_by={partition_by!r}: pass the name of a column, the position of an entry as a string, such as"
            " '1', or None; pass the arguments after it by keyword."
        )


def concentration(alpha: object) -> float | npt.NDArray[np.float64]:
    """Return a Dirichlet concentration as one float, or as one float per entry.

    Raises:
        TypeError: it is neither a number nor a list of numbers.
        ValueError: an entry is not positive and finite.
    """
    try:
        values = np.asarray(alpha, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"alpha={alpha!r}: pass a number above 0, such as 0.5, or a list of them.") from None
    if alpha is None or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"alpha={alpha!r}: pass a finite number above 0, such as 0.5, or a list of them.")
    return float(values) if values.ndim == 0 else values.ravel()


def sizes(name: str, value: object, minimum: int) -> IntArray:
    """Return a list of sizes as an int64 array.

    Raises:
        TypeError: it is not a list of integers.
        ValueError: it is empty, or a size is below ``minimum``.
    """
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}={value!r}: pass a list of integers, one size per client.")
    if not array.size:
        raise ValueError(f"{name}={value!r}: pass the size of at least one client.")
    if (array < minimum).any():
        i = int(np.argmax(array < minimum))
        raise ValueError(f"{name}[{i}]={array[i]}: pass sizes of at least {minimum}.")
    return array.astype(np.int64)


def enough_samples(num_samples: int, num_partitions: int, min_partition_size: int = 1) -> None:
    """Check that every client can have its minimum of samples.

    Example:
        >>> enough_samples(num_samples=3, num_partitions=5)
        Traceback (most recent call last):
        ValueError: num_partitions=5: pass at most the number of samples, 3.
    """
    if num_partitions > num_samples:
        raise ValueError(f"num_partitions={num_partitions}: pass at most the number of samples, {num_samples}.")
    if num_partitions * min_partition_size > num_samples:
        raise ValueError(
            f"min_partition_size={min_partition_size} with num_partitions={num_partitions}: this needs"
            f" {num_partitions * min_partition_size} samples, and there are {num_samples}: pass a min_partition_size of"
            f" at most {num_samples // num_partitions}, or lower num_partitions."
        )


def given(name: str, value: object, example: str) -> None:
    """Check that a required argument was given (it has a default because it follows the optional ``partition_by``)."""
    if value is None:
        raise ValueError(f"{name}=None: pass a value, as in {example}.")
