"""Training data on the device, cut into batches without a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset, default_collate
from tqdm import tqdm

from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import free_memory

_SHARE_OF_FREE_MEMORY = 0.25
_SAMPLES_PER_READ = 1024
_BATCHES_PER_TRANSFER = 64


class DeviceData:
    """All samples of a dataset as tensors on one device; a batch is a selection of their rows.

    Batches are bit-identical to those of the default collate function and have the same types.

    Args:
        samples: tensors with one row for each sample, alone or nested in lists, tuples and dicts.
        rows: row of each sample, on the CPU; None if sample i is row i.

    Example:
        >>> data = DeviceData([torch.arange(8).reshape(4, 2), torch.arange(4)])
        >>> data.batch([3, 1])
        [tensor([[6, 7],
                [2, 3]]), tensor([3, 1])]
        >>> data.stacked([[0, 1], [2, 3]])[1]
        tensor([[0, 1],
                [2, 3]])
    """

    def __init__(self, samples: Any, rows: Tensor | None = None) -> None:
        self._leaves, self._structure = tree_flatten(samples)
        self._rows = rows
        self._device = self._leaves[0].device
        self._flat = type(samples) is list and len(samples) == len(self._leaves)

    def batch(self, indices: list[int] | Tensor) -> Any:
        """Return the samples at these dataset positions, in order."""
        return self._select(self._to_rows(indices))

    def stacked(self, rows: list[list[int]]) -> Any:
        """Return several batches of equal size, stacked along a new first dimension."""
        selected = self._select(self._to_rows([index for row in rows for index in row]))
        leaves, _ = tree_flatten(selected)
        shape = len(rows), len(rows[0])
        return tree_unflatten([leaf.view(*shape, *leaf.shape[1:]) for leaf in leaves], self._structure)

    def batches(self, indices: Iterable[list[int]]) -> Iterator[Any]:
        """Yield the batches; the indices of many batches are sent to the device together."""
        remaining = iter(indices)
        while several := list(islice(remaining, _BATCHES_PER_TRANSFER)):
            rows = self._to_rows(list(chain.from_iterable(several)))
            for part in torch.split(rows, list(map(len, several))):
                yield self._select(part)

    def _to_rows(self, indices: list[int] | Tensor) -> Tensor:
        positions = torch.as_tensor(indices, dtype=torch.int64)
        if self._rows is not None:
            positions = self._rows[positions.cpu()]
        return positions.to(self._device)

    def _select(self, rows: Tensor) -> Any:
        leaves = [leaf.index_select(0, rows) for leaf in self._leaves]
        return leaves if self._flat else tree_unflatten(leaves, self._structure)


def device_data(
    loader: DataLoader[Any], cache: bool | Literal["auto"], device: torch.device, *, seed: int, show_progress: bool
) -> DeviceData | None:
    """Return the loader's dataset on the device; None if it is not to be cached.

    Args:
        loader: the user's train loader.
        cache: the strategy's ``cache_dataset``.
        device: where clients train.
        seed: for random numbers that the dataset draws while samples are read; these draws stay fixed from then on.
        show_progress: whether to show a progress bar while samples are read.

    Raises:
        ValueError: if ``cache`` is True and the samples cannot be kept as tensors.
    """
    if cache is False:
        return None
    reason, plain = _reason_not_cacheable(loader), _plain_tensors(loader.dataset)
    if cache == "auto" and (reason is not None or plain is None):
        return None
    if reason is not None:
        raise ValueError(
            f"cache_dataset=True: train_dataloader has {reason}, so its batches may be other than stacked samples:"
            " remove it, or pass cache_dataset=False."
        )
    samples, rows = plain or (_read_all(loader, seed, device, show_progress), None)
    leaves, structure = tree_flatten(samples)
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if leaf.device != device)
    free = free_memory(device) if size else 0
    if cache == "auto" and size > free * _SHARE_OF_FREE_MEMORY:
        return None
    if size > free:
        raise ValueError(
            f"cache_dataset=True: the dataset takes {size / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: pass"
            " cache_dataset=False."
        )
    return DeviceData(tree_unflatten([leaf.to(device) for leaf in leaves], structure), rows)


def _reason_not_cacheable(loader: DataLoader[Any]) -> str | None:
    """Return the loader's option that may make batches other than rows of stacked samples; None if there is none."""
    if loader.batch_sampler is None:
        return "batch_size=None"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"batch_sampler={type(loader.batch_sampler).__name__}"
    if loader.collate_fn is not default_collate:
        return f"collate_fn={getattr(loader.collate_fn, '__name__', loader.collate_fn)}"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"a custom __iter__ in {type(loader).__name__}"
    if loader.worker_init_fn is not None and loader.num_workers > 0:
        return f"worker_init_fn={getattr(loader.worker_init_fn, '__name__', loader.worker_init_fn)}"
    return None


def _plain_tensors(dataset: Any) -> tuple[list[Tensor], Tensor | None] | None:
    """Return the tensors of a `TensorDataset`, and the samples' rows if it is a subset; None for other datasets."""
    rows: Tensor | None = None
    while type(dataset) is Subset:
        chosen = torch.as_tensor(dataset.indices, dtype=torch.int64)
        rows, dataset = chosen if rows is None else chosen[rows], dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    tensors = list(dataset.tensors)
    if any(type(t) is not Tensor or t.layout != torch.strided or t.requires_grad for t in tensors):
        return None
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(dataset):
        return None
    return tensors, rows


def _read_all(loader: DataLoader[Any], seed: int, device: torch.device, show_progress: bool) -> Any:
    """Read every sample once and stack them; the global generators are unchanged afterwards."""
    drawn = randomness.derive(seed, randomness.CACHE)
    reader = DataLoader(
        loader.dataset,
        batch_size=_SAMPLES_PER_READ,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(drawn),
    )
    outside = randomness.capture(device)
    randomness.seed_globals(drawn, device)
    try:
        bar = tqdm(reader, desc="cache_dataset: reading all samples", disable=not show_progress, leave=False)
        parts = [tree_flatten(part) for part in bar]
        if other := [leaf for leaf in parts[0][0] if not isinstance(leaf, Tensor)]:
            raise TypeError(f"a sample has a {type(other[0]).__name__}")
        stacked = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in parts), strict=True)]
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"cache_dataset=True: the samples of dataset={type(loader.dataset).__name__} cannot be stacked ({error}):"
            " they must be tensors or numbers of the same shapes, alone or nested in tuples, lists and dicts. Change"
            " them, or pass cache_dataset=False."
        ) from error
    finally:
        randomness.restore(outside, device)
    return tree_unflatten(stacked, parts[0][1])
