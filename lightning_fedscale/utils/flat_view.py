"""Many tensors as one float64 vector, to copy, subtract and average models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


class FlatView:
    """The tensors that server and clients exchange, as one float64 vector.

    Trainable tensors come first, so that ``vector[:trainable]`` is the pseudo-gradient's part. float64 represents every
    float32, bfloat16, float16 and (up to 2**53) integer exactly, so copying to the vector and back changes no bit.
    Complex numbers take two elements each.

    Args:
        trainable: parameters that local training changes.
        carried: all other tensors that are exchanged: float and integer buffers, frozen parameters. Integer tensors are
            written back rounded.

    Example:
        >>> weight, counter = torch.ones(2), torch.tensor(3)
        >>> view = FlatView([weight], [counter])
        >>> vector = view.read()
        >>> vector.tolist(), view.trainable
        ([1.0, 1.0, 3.0], 2)
        >>> view.write(vector * 1.5)
        >>> weight.tolist(), counter.item()
        ([1.5, 1.5], 4)
    """

    def __init__(self, trainable: Sequence[Tensor], carried: Sequence[Tensor]) -> None:
        self.trainable = sum(_width(tensor) for tensor in trainable)
        self.size = self.trainable + sum(_width(tensor) for tensor in carried)
        self._tensors = [as_real(tensor) for tensor in (*trainable, *carried)]
        self._sizes = [tensor.numel() for tensor in self._tensors]
        self._starts = list(accumulate(self._sizes, initial=0))
        # Copy tensors of one type at a time: with several types this is slow, and on CUDA wrong before torch 2.11.
        self._alike = _by_type(enumerate(self._tensors))
        self._integers = [i for i, tensor in enumerate(self._tensors) if not tensor.is_floating_point()]
        self._exact: dict[int, Tensor] = {}
        self._cut: dict[int, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._tensors[0].device

    def empty(self) -> Tensor:
        """Return an uninitialised float64 vector of the right length."""
        return torch.empty(self.size, dtype=torch.float64, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of ``vector`` in the tensors' shapes, without a copy."""
        # Views are cached, since a round cuts the same few vectors for every client. They keep the vector's memory
        # alive, so no other vector can get its address.
        views = self._cut.get(vector.data_ptr())
        if views is None:
            views = self._cut[vector.data_ptr()] = self._split(vector)
        return views

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector, self._sizes)
        return [p if t.dim() == 1 else p.view(t.shape) for p, t in zip(parts, self._tensors, strict=True)]

    def elements(self, number: int) -> slice:
        """Return the slice of the tensor of this number in the vector."""
        return slice(self._starts[number], self._starts[number + 1])

    def value(self, number: int) -> Tensor:
        """Return the value of the tensor of this number in float64, as in the vector."""
        return self._tensors[number].double()

    def completed(self, vector: Tensor) -> Tensor:
        """Return a vector from before the last tensors were exchanged, with their present values."""
        missing = [
            tensor.double().flatten()
            for tensor, end in zip(self._tensors, self._starts[1:], strict=True)
            if end > len(vector)
        ]
        return torch.cat([vector, *missing]) if missing else vector

    def forget(self, vector: Tensor) -> None:
        """Release a vector that is no longer needed, so that its memory can be reused."""
        self._cut.pop(vector.data_ptr(), None)

    def read(self) -> Tensor:
        """Return a new vector with the tensors' values; the exact integers are kept too."""
        self._exact = {i: self._tensors[i].clone() for i in self._integers}
        return self._read_into(self.empty())

    def write(self, vector: Tensor) -> None:
        """Copy ``vector`` into the tensors, in place, so that every reference to them stays valid."""
        views = self.views(vector)
        for dtype, numbers in self._alike.items():
            if dtype.is_floating_point:
                torch._foreach_copy_([self._tensors[i] for i in numbers], [views[i] for i in numbers])
            else:
                self._write_integers(numbers, views)

    def _write_integers(self, numbers: list[int], views: list[Tensor]) -> None:
        """Write tensors of one integer type: together if they are single numbers, such as the counters of BatchNorm."""
        counters = [i for i in numbers if self._tensors[i].dim() == 0]
        if len(counters) > 1:
            exact = torch.stack([self._exact.get(i, self._tensors[i]) for i in counters])
            values = _rounded(torch.stack([views[i] for i in counters]), exact)
            torch._foreach_copy_([self._tensors[i] for i in counters], list(values.unbind()))
            numbers = [i for i in numbers if self._tensors[i].dim()]
        for i in numbers:
            self.write_one(i, views[i])

    def write_one(self, number: int, value: Tensor) -> None:
        """Write only the tensor of this number, counted in the vector's order."""
        self._tensors[number].copy_(self._narrow(number, value))

    def substituted(self, state: Mapping[str, Any], vector: Tensor) -> dict[str, Any]:
        """Return ``state`` with the values of ``vector`` for entries that share memory with one of the tensors."""
        views = self._cut.get(vector.data_ptr()) or self._split(vector)
        numbers = {(tensor.data_ptr(), tensor.shape): number for number, tensor in enumerate(self._tensors)}

        def substitute(entry: Any) -> Any:
            if not isinstance(entry, Tensor):
                return entry
            real = as_real(entry)
            if (number := numbers.get((real.data_ptr(), real.shape))) is None:
                return entry
            # A copy is also needed since a complex number cannot start at an odd position of the vector.
            value = self._narrow(number, views[number]).to(real.dtype, copy=True)
            return torch.view_as_complex(value) if entry.is_complex() else value.to(entry.dtype)

        return {name: substitute(entry) for name, entry in state.items()}

    def subtract_from(self, vector: Tensor, out: Tensor) -> Tensor:
        """Compute ``out = vector - tensors``, the delta of the client whose model is in the tensors."""
        # Convert to float64 in ``out`` first: `torch.sub` of float64 and float32 would make another float64 copy.
        return torch.sub(vector, self._read_into(out), out=out)

    def _narrow(self, number: int, value: Tensor) -> Tensor:
        tensor = self._tensors[number]
        if tensor.is_floating_point():
            return value
        return _rounded(value, self._exact.get(number, tensor))

    def _read_into(self, vector: Tensor) -> Tensor:
        views = self.views(vector)
        for numbers in self._alike.values():
            torch._foreach_copy_([views[i] for i in numbers], [self._tensors[i] for i in numbers])
        return vector


def elements_at_once(device: torch.device) -> int:
    """Return how many elements of a long vector to compute with at a time, where temporaries would be as long.

    On a CPU they then stay in its cache. On other devices each part is a launch of each operator.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 24


def as_real(tensor: Tensor) -> Tensor:
    """View the memory as real numbers: complex ones as pairs, booleans as bytes."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _by_type(tensors: Iterable[tuple[int, Tensor]]) -> dict[torch.dtype, list[int]]:
    """Return the numbers of the tensors by their type."""
    alike: dict[torch.dtype, list[int]] = {}
    for number, tensor in tensors:
        alike.setdefault(tensor.dtype, []).append(number)
    return alike


def _rounded(value: Tensor, exact: Tensor) -> Tensor:
    """Round to integers; unchanged values keep their bits, even if float64 cannot represent them."""
    return torch.where(value == exact.double(), exact, value.round().to(exact.dtype))


def _width(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)
