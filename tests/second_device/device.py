"""A stand-in for a CUDA device: its tensors have shapes, types and a device, but no contents.

Operators on tensors of two devices raise an error, as on CUDA. What a real device would make slow is counted by file
and line of the package: reads (the host waits for the device), copies between host and device, and launches.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = torch.ops.aten
_ROOMS: Final = ("lightning_fedscale/", "callbacks/")
_COPIES_AT_ONCE: Final = 30  # tensors that a launch of torch's fast `_foreach_copy_` has room for, about
_KEPT: list[Any] = []  # registrations, which end with their library object


def _defined() -> torch.device:
    """Return "cuda" in a build of torch for CUDA, else a device that is defined in Python.

    A build for the CPU can make fake tensors on "cuda", but neither slice nor copy them.
    """
    if torch.backends.cuda.is_built():
        return torch.device("cuda", 0)
    define = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if define is None:
        pytest.skip("this torch has neither CUDA nor devices defined in Python", allow_module_level=True)
    define("second")
    library = torch.library.Library("aten", "IMPL")  # for torch.tensor(..., device=...), which no mode sees

    def empty(size: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        made: Tensor = torch._C._acc.create_empty_tensor(tuple(size), dtype or torch.get_default_dtype())
        return made

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, non_blocking=False: target, "PrivateUse1")
    _KEPT.append(library)
    return torch.device("second", 0)


DEVICE: Final = _defined()


def is_there(tensors: Any) -> bool:
    """Return whether all tensors of a pytree are on the device."""
    return all(tensor.device.type == DEVICE.type for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


def through_checkpoint(state: Any) -> Any:
    """Return the state as Lightning reads it from a checkpoint: on the CPU."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, state)


class Seen(TorchDispatchMode):
    """Answers what asks for numbers on the device, and counts.

    Attributes:
        reads: waits for a number on the device, by place.
        copies: between host and device, by direction, whether the host waits, and place.
        launches: operators on the device, by name and place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = Counter[str]()
        self.copies = Counter[str]()
        self.launches = Counter[str]()

    def clear(self) -> None:
        """Begin to count again."""
        for counter in (self.reads, self.copies, self.launches):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument in args:  # else fake tensors compute with the numbers of which they were made
            if isinstance(argument, FakeTensor) and argument.constant is not None and is_there(argument):
                argument.constant = None
        if func in (_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default):
            if is_there(args[0]):
                self.reads[_place()] += 1
            return _answer(func, args[0])
        result = func(*args, **kwargs)
        self._count_copy(func, args, kwargs, result)
        self._count_launches(func, args, result)
        return result

    def _count_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func not in (_ATEN._to_copy.default, _ATEN.copy_.default):
            return
        source, target = (args[0], result) if func is _ATEN._to_copy.default else (args[1], args[0])
        if source.device.type != target.device.type:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self.copies[f"{'to' if is_there(target) else 'from'} device{', waits' * waits} {_place()}"] += 1

    def _count_launches(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if func.is_view or func.namespace != "aten" or not any(map(is_there, tensors)):
            return
        launches = 1
        if func is _ATEN._foreach_copy_.default:
            targets, sources = args[:2]
            alike = len({t.dtype for t in targets}) == len({t.dtype for t in sources}) == 1 and all(
                target.stride() == source.stride() for target, source in zip(targets, sources, strict=True)
            )
            launches = -(-len(targets) // _COPIES_AT_ONCE) if alike else len(targets)
        self.launches[f"{func} {_place()}"] += launches


def _answer(func: Any, tensor: Tensor) -> Any:
    """Return an answer that lets the caller go on: numbers are 3, everything is equal and nothing is zero."""
    if func is _ATEN.nonzero.default:
        return torch.arange(tensor.numel(), device=tensor.device).view(-1, 1).expand(-1, max(1, tensor.dim()))
    if func is _ATEN.equal.default or tensor.dtype is torch.bool:
        return True
    return 3.0 if tensor.is_floating_point() else 3


def _place() -> str:
    """Return file and line of the package's code that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if (room := next((room for room in _ROOMS if room in name), None)) and "site-packages" not in name:
            return f"{name[name.rindex(room) :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


_NUMPY, _DATA_PTR, _DEEPCOPY = Tensor.numpy, Tensor.data_ptr, Tensor.__deepcopy__
_TYPES: Final = {
    torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64,
    torch.int32: np.int32, torch.uint8: np.uint8, torch.bool: np.bool_,
}  # fmt: skip


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return _NUMPY(tensor, *args, **kwargs)
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first.")
    return np.ones(tuple(tensor.shape), dtype=_TYPES[tensor.dtype])


def _data_ptr(tensor: Tensor) -> int:
    if not isinstance(tensor, FakeTensor):
        return _DATA_PTR(tensor)
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _deepcopy(tensor: Tensor, memo: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return _DEEPCOPY(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone())  # their storages cannot be copied


@contextmanager
def second_device() -> Iterator[Seen]:
    """Let tensors on `DEVICE` be made and computed with inside the context; yield what is counted there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "numpy", _numpy)
        patch.setattr(Tensor, "data_ptr", _data_ptr)
        patch.setattr(Tensor, "__deepcopy__", _deepcopy)
        with FakeTensorMode(allow_non_fake_inputs=True), Seen() as seen:
            yield seen
