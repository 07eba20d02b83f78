"""The sample that takes most memory, which is the one to probe with."""

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
        sample: as the dataset gives it.
        looked_at: how many samples were looked at.
        total: how many there are; None if that is not known.
    """

    sample: Any
    looked_at: int
    total: int | None


def largest_sample(dataset: Any, seconds: float = 5.0) -> LargestSample:
    """Look for the largest sample of a dataset.

    Datasets whose samples are all alike are told by 64 of them, evenly spaced. Where sizes differ, all are looked at
    while the time lasts, in an order in which any beginning is spread over the dataset.

    Args:
        dataset: map-style, or iterable, of which only the beginning is read.
        seconds: most time to spend.

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
    """Whether a dataset can be asked for any of its samples."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def size_of(sample: Any) -> int:
    """How many numbers or characters a sample holds; anything unknown counts as one."""
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
        raise ValueError("train_dataloader: its dataset is empty: there is no sample to probe with.")
    return LargestSample(largest, looked_at, total)


def _sizes(sample: Any) -> tuple[int, ...]:
    if hasattr(sample, "__dict__") and not isinstance(sample, (Tensor, np.ndarray, Sequence)):
        sample = vars(sample)  # a data class or the like
    return tuple(map(_size, tree_leaves(sample)))


def _size(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(leaf, np.ndarray):
        return leaf.size
    return len(leaf) if isinstance(leaf, (str, bytes)) else 1


def _spread(total: int) -> Iterator[int]:
    """All indices, in steps of the golden section."""
    step = max(1, round(total * 0.6180339887))
    while np.gcd(step, total) != 1:
        step += 1
    return (number * step % total for number in range(total))
