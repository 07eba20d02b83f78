"""Batches of another size than the one at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

_REMEDY = "pass make_batch=, a function of the number of samples that returns such a batch."


class Form(NamedTuple):
    """What two batches of one form have in common: their nesting, and shape, type and layout of every tensor in them.

    Attributes:
        spec: the nesting.
        leaves: of tensors shape, type and layout; other things as they are, or their type if they cannot be compared.
    """

    spec: Any
    leaves: tuple[Any, ...]

    def __hash__(self) -> int:
        return hash(self.leaves)  # in older releases of torch the nesting has none; it is compared all the same

    def without_rows(self) -> Form:
        """The form of each of the batches that are stacked in this one."""
        return Form(self.spec, tuple(_without_rows(leaf) for leaf in self.leaves))

    def anonymous(self) -> Form:
        """The form without what tells batches of one cost apart: types in place of texts and of objects."""
        return Form(self.spec, tuple(leaf if isinstance(leaf, _PLAIN) else type(leaf) for leaf in self.leaves))

    @property
    def first(self) -> _TensorForm | None:
        """Of the first tensor that has a dimension; None in a batch that cannot be opened."""
        return next((leaf for leaf in self.leaves if isinstance(leaf, _TensorForm) and leaf.shape), None)

    @property
    def elements(self) -> int:
        """How many numbers there are in the tensors."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves if isinstance(leaf, _TensorForm))

    def without_sizes(self) -> Form:
        """What batches of all sizes, and with any numbers beside their tensors, have in common."""
        return Form(self.spec, tuple(map(_without_size, self.leaves)))


class _TensorForm(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout


_PLAIN = (_TensorForm, int, float, complex, torch.dtype, torch.device, type(None))


def form_of(batch: Any) -> Form:
    """The form of a batch; can be a key of a dict. Any mapping counts as a dict.

    Example:
        >>> form_of([torch.ones(4, 3)]) == form_of([torch.zeros(4, 3)]) != form_of([torch.zeros(5, 3)])
        True
    """
    leaves, spec = tree_flatten(_as_dict(batch))
    return Form(spec, tuple(map(_form_of_leaf, leaves)))


def _as_dict(batch: Any) -> Any:
    # Such as the BatchEncoding of Hugging Face, which pytree takes for a leaf.
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def _form_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _TensorForm(tuple(leaf.shape), leaf.dtype, leaf.layout)
    try:
        hash(leaf)
    except TypeError:
        return type(leaf)
    return leaf


def _without_size(leaf: Any) -> Any:
    if isinstance(leaf, _TensorForm):
        return len(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, type) else type(leaf)


def _without_rows(leaf: Any) -> Any:
    return leaf._replace(shape=leaf.shape[1:]) if isinstance(leaf, _TensorForm) else leaf


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
