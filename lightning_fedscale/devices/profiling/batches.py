"""Signatures of batches, and resizing of batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.data import BatchSampler

from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"Form": "BatchSignature", "form_of": "signature_of"})

_REMEDY = ": pass make_batch=..., a function that returns a batch of so many samples."


class BatchSignature(NamedTuple):
    """The signature of a batch: its nesting, and the shape, type and layout of every tensor in it.

    Attributes:
        spec: the nesting.
        leaves: shape, type and layout of tensors; other objects themselves, or their type if they cannot be compared.
    """

    spec: Any
    leaves: tuple[Any, ...]

    def __hash__(self) -> int:
        return hash(self.leaves)  # the nesting has no hash in older releases of torch, but it is compared

    def without_rows(self) -> BatchSignature:
        """Return the signature of each of the batches that are stacked in this one."""
        return BatchSignature(self.spec, tuple(_without_rows(leaf) for leaf in self.leaves))

    def anonymous(self) -> BatchSignature:
        """Return the signature with types in place of texts and objects, which do not change the cost of a batch."""
        return BatchSignature(
            self.spec, tuple(leaf if isinstance(leaf, _PLAIN) else type(leaf) for leaf in self.leaves)
        )

    @property
    def first(self) -> _TensorSignature | None:
        """The signature of the first tensor that has a dimension; None for a batch that cannot be opened."""
        return next((leaf for leaf in self.leaves if isinstance(leaf, _TensorSignature) and leaf.shape), None)

    @property
    def elements(self) -> int:
        """Total number of elements of the tensors."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves if isinstance(leaf, _TensorSignature))

    def without_sizes(self) -> BatchSignature:
        """Return the signature without sizes of tensors and values of other objects."""
        return BatchSignature(self.spec, tuple(map(_without_size, self.leaves)))


class _TensorSignature(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout


_PLAIN = (_TensorSignature, int, float, complex, torch.dtype, torch.device, type(None))


def signature_of(batch: Any) -> BatchSignature:
    """Return the signature of a batch, which can be a key of a dict. Any mapping counts as a dict.

    Example:
        >>> signature_of([torch.ones(4, 3)]) == signature_of([torch.zeros(4, 3)]) != signature_of([torch.zeros(5, 3)])
        True
    """
    leaves, spec = tree_flatten(_as_dict(batch))
    return BatchSignature(spec, tuple(map(_signature_of_leaf, leaves)))


def _as_dict(batch: Any) -> Any:
    # This is needed for mappings that pytree treats as leaves, such as the BatchEncoding of Hugging Face.
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def _signature_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _TensorSignature(tuple(leaf.shape), leaf.dtype, leaf.layout)
    try:
        hash(leaf)
    except TypeError:
        return type(leaf)
    return leaf


def _without_size(leaf: Any) -> Any:
    if isinstance(leaf, _TensorSignature):
        return len(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, type) else type(leaf)


def _without_rows(leaf: Any) -> Any:
    return leaf._replace(shape=leaf.shape[1:]) if isinstance(leaf, _TensorSignature) else leaf


def samples_in(batch: Any, remedy: str = _REMEDY) -> int:
    """Return the number of samples in a batch: the common size of its tensors' first dimension.

    Args:
        batch: tensors in any container; other objects in it are ignored.
        remedy: end of the error's message.

    Raises:
        ValueError: if it has no tensor or the tensors disagree, so that the batch cannot be resized.

    Example:
        >>> samples_in({"image": torch.zeros(8, 1, 28, 28), "label": torch.zeros(8)})
        8
    """
    sizes = {len(tensor) for tensor in _tensors_in(batch) if tensor.ndim}
    if not sizes:
        raise ValueError(f"batch={type(batch).__name__}: none of its tensors has a dimension of samples{remedy}")
    if len(sizes) > 1:
        raise ValueError(
            f"batch={type(batch).__name__}: the first dimensions of its tensors differ"
            f" ({', '.join(map(str, sorted(sizes)))}), so the number of samples is unknown{remedy}"
        )
    return sizes.pop()


def loaded_samples(loaders: Any, batch_idx: int) -> int | None:
    """Return the loader's number of samples in a batch that cannot be opened; None if the loader does not know it."""
    loader = next(iter(tree_leaves(loaders)), None)
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    try:
        if isinstance(size, int):
            usual = type(getattr(loader, "batch_sampler", None)) is BatchSampler
            left = len(sampler) - batch_idx * size if usual and sampler is not None else size
            return min(size, left) if left > 0 else size
        return max(1, round(len(loader.dataset) / len(loader)))  # type: ignore[union-attr, arg-type]
    except (AttributeError, TypeError, NotImplementedError, ZeroDivisionError):
        return size if isinstance(size, int) else None


def resized(batch: Any, samples: int) -> Any:
    """Resize a batch by repeating its samples or dropping the last ones.

    Example:
        >>> resized((torch.tensor([1, 2]), "name"), 5)
        (tensor([1, 2, 1, 2, 1]), 'name')
    """
    present = samples_in(batch)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.ndim or samples == present:
            return tensor
        return tensor[torch.arange(samples, device=tensor.device) % present]

    return changed(batch, resize)


def changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace every tensor of a batch, and keep the batch's types.

    Args:
        batch: tensors in any nesting of lists, tuples, dicts and named tuples, or in objects that can be copied.
        change: returns the replacement of a tensor.

    Example:
        >>> from collections import UserDict
        >>> changed(UserDict({"x": torch.tensor([1, 2]), "name": "a"}), lambda tensor: tensor[:1])
        {'x': tensor([1]), 'name': 'a'}
    """
    if all(isinstance(leaf, (Tensor, str, *_PLAIN)) for leaf in tree_leaves(batch)):
        return tree_map_only(Tensor, change, batch)
    with TensorCopies(change):
        return copy.deepcopy(batch)


class TensorCopies(TorchFunctionMode):
    """Chooses the copies of tensors while anything is deep-copied, which reaches tensors in all objects.

    Args:
        copied: returns the copy of a tensor; None for an ordinary one.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            copied = self._copied(tensor)
            if copied is None:
                return func(tensor, memo)  # type: ignore[no-untyped-call]
            memo[id(tensor)] = copied
        return memo[id(tensor)]


def _tensors_in(batch: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not found:  # they may be in objects that pytree does not open

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        with suppress(Exception):
            changed(batch, note)
    return found
