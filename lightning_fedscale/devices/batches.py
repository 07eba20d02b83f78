"""Batches of another size than the one at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_REMEDY = "pass make_batch=, a function of the number of samples that returns such a batch."


def samples_in(batch: Any) -> int:
    """The number of samples in a batch: what all its tensors have in their first dimension.

    Args:
        batch: tensors in any nesting of lists, tuples, dicts and named tuples; other things in it do not count.

    Raises:
        ValueError: if there is no tensor in it or the tensors disagree, so that the batch cannot be resized.

    Example:
        >>> samples_in({"image": torch.zeros(8, 1, 28, 28), "label": torch.zeros(8)})
        8
    """
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if not sizes:
        raise ValueError(f"batch={type(batch).__name__} holds no tensor with a first dimension to resize: {_REMEDY}")
    if len(sizes) > 1:
        raise ValueError(
            f"batch: its tensors have {', '.join(map(str, sorted(sizes)))} entries in their first dimension, so none of"
            f" these is the number of samples: {_REMEDY}"
        )
    return sizes.pop()


def resized(batch: Any, samples: int) -> Any:
    """The batch with its own samples repeated, or cut off, to have so many.

    Example:
        >>> resized((torch.tensor([1, 2]), "name"), 5)
        (tensor([1, 2, 1, 2, 1]), 'name')
    """
    present = samples_in(batch)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.ndim or samples == present:
            return tensor
        return tensor[torch.arange(samples, device=tensor.device) % present]

    return tree_map_only(Tensor, resize, batch)
