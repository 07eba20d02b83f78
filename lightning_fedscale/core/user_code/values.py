"""Snapshots of the values of tensors, arrays and numpy's generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_LARGE = 1 << 16  # bytes


class Closed(Exception):
    """Raised for an object that cannot be opened, or is too large."""


class TensorValue:
    """A snapshot of a tensor's identity, layout and values.

    Small tensors on the CPU are compared bit by bit. Others are compared by their version counter, which misses writes
    through ``.data``; ``exact`` compares their values as well. Large tensors are copied once, and again after they were
    written to; those of more than ``most`` bytes are not copied and cannot be restored.
    """

    def __init__(self, tensor: Tensor, exact: bool, most: int) -> None:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__:
            raise Closed
        self._exact = exact
        self._kind = id(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad, tensor.layout
        self._alias, self._bytes = tensor.detach(), None
        self._copy: Any = None
        self._version = tensor._version, 0
        if tensor.layout is not torch.strided:
            return
        self._version = tensor._version, tensor.data_ptr()
        if tensor.device.type == "cpu" and tensor.nbytes <= _LARGE:
            self._copy = self._alias.clone()
            self._bytes = _bits(self._copy).numpy().tobytes()
        elif tensor.nbytes <= most:
            self._copy = self._large(tensor)

    def _large(self, tensor: Tensor) -> Any:
        version, copy = _copies.get(tensor, (None, self._alias))  # type: ignore[no-untyped-call]
        if version != self._version or (self._exact and not torch.equal(_bits(copy), _bits(self._alias))):
            copy = self._alias.clone()
            _copies[tensor] = self._version, copy
        return copy

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorValue) or self._kind != other._kind:
            return False
        if self._bytes is not None or self._copy is None or not (self._exact and other._exact):
            return self._bytes == other._bytes if self._bytes is not None else self._version == other._version
        return self._copy is other._copy or torch.equal(_bits(self._copy), _bits(other._copy))

    __hash__ = None  # type: ignore[assignment]

    def write(self, tensor: Tensor) -> None:
        """Restore the values if they have changed."""
        if self._copy is None:
            return
        if tensor.data_ptr() != self._alias.data_ptr() or tensor.shape != self._alias.shape:
            tensor.data = self._alias
        if not torch.equal(_bits(self._alias), _bits(self._copy)):
            self._alias.data.copy_(self._copy)
            if tensor in _copies:  # so that this write does not count as a change
                _copies[tensor] = (tensor._version, tensor.data_ptr()), self._copy


_copies = WeakTensorKeyDictionary()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class ArrayValue:
    """A snapshot of a numpy array's identity, layout and values; a large array is opened only if ``exact``."""

    def __init__(self, array: Any, exact: bool, most: int) -> None:
        if isinstance(array, np.memmap) or array.dtype.hasobject or (array.nbytes > _LARGE and not exact):
            raise Closed
        self._copy = array.copy()
        self._key = id(array), array.dtype.str, array.shape, array.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrayValue) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]

    def write(self, array: Any) -> None:
        """Restore the values if they have changed."""
        if array.tobytes() != self._key[-1]:
            array[...] = self._copy


class GeneratorState:
    """The state of one of numpy's generators."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneratorState) and _flat(self.state) == _flat(other.state)

    __hash__ = None  # type: ignore[assignment]


def _flat(state: Any) -> Any:
    if isinstance(state, dict):
        return [(key, _flat(v)) for key, v in state.items()]
    return state.tobytes() if isinstance(state, np.ndarray) else state
