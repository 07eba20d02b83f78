"""Find the sample that takes most memory, to probe with it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

_FIRST_LOOK = 64


class LargestSample(NamedTuple):
    """The largest sample found.

    Attributes:
        sample: the sample as returned by the dataset.
        looked_at: number of samples that were read.
        total: number of samples; None if it is unknown.
    """

    sample: Any
    looked_at: int
    total: int | None


def largest_sample(dataset: Any, seconds: float = 5.0) -> LargestSample:
    """Look for the largest sample of a dataset.

    First 64 evenly spaced samples are read, which suffice if all have the same size. If sizes differ, all samples are
    read while time remains, in an order in which the first ones are always spread over the dataset.

    Args:
        dataset: a map-style dataset, or an iterable one, of which only the beginning is read.
        seconds: maximum time.

    Raises:
        ValueError: if there is no sample.

    Example:
        >>> found = largest_sample([[0] * (n % 7) for n in range(100)])
        >>> len(found.sample), found.looked_at
        (6, 100)
    """
    if not is_map_style(dataset):
        return _largest(zip(range(_FIRST_LOOK), dataset, strict=False), None, seconds)
    total = len(dataset)
    first = np.unique(np.linspace(0, total - 1, min(total, _FIRST_LOOK)).astype(np.int64)).tolist()
    found = _largest(((index, dataset[index]) for index in first), total, seconds)
    if total == len(first) or len({_sizes(dataset[index]) for index in first}) == 1:
        return found
    return _largest(((index, dataset[index]) for index in _spread(total)), total, seconds)


def is_map_style(dataset: Any) -> bool:
    """Return whether a dataset can return any of its samples by index."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def size_of(sample: Any) -> int:
    """Return how many numbers or characters a sample has; any other object counts as one."""
    return sum(_sizes(sample))


def _largest(samples: Iterable[tuple[int, Any]], total: int | None, seconds: float) -> LargestSample:
    largest, most, looked_at, until = None, -1, 0, time.monotonic() + seconds
    for _, sample in samples:
        looked_at += 1
        if (size := size_of(sample)) > most:
            largest, most = sample, size
        if time.monotonic() > until:
            break
    if not looked_at:
        raise ValueError("train_dataloader: its dataset is empty: pass a dataset with at least one sample.")
    return LargestSample(largest, looked_at, total)


def _sizes(sample: Any) -> tuple[int, ...]:
    if hasattr(sample, "__dict__") and not isinstance(sample, (Tensor, np.ndarray, Sequence)):
        sample = vars(sample)  # such as a dataclass
    return tuple(map(_size, tree_leaves(sample)))


def _size(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(leaf, np.ndarray):
        return leaf.size
    return len(leaf) if isinstance(leaf, (str, bytes)) else 1


def _spread(total: int) -> Iterator[int]:
    """Yield all indices, in steps of the golden section."""
    step = max(1, round(total * 0.6180339887))
    while np.gcd(step, total) != 1:
        step += 1
    return (number * step % total for number in range(total))
