"""Many tensors as one float64 vector, to copy, subtract and average models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

ONE_PART = 1 << 20
"""Vectors of up to so many elements, 8 MB, are one part: computing them in several costs more than it saves."""


class Part(NamedTuple):
    """A part of the vector that is read at once.

    Attributes:
        elements: its place in the vector.
        pieces: the pieces of tensors in it, by type: the place of each in the part, its tensor's number, and which rows
            of that tensor; None for all.
    """

    elements: slice
    pieces: dict[torch.dtype, list[tuple[slice, int, slice | None]]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.elements.stop - self.elements.start)


class FlatView:
    """The tensors that server and clients exchange, as one float64 vector.

    Trainable tensors come first, so that ``vector[:trainable]`` is the pseudo-gradient's part. float64 represents every
    float32, bfloat16, float16 and (up to 2**53) integer exactly, so copying to the vector and back changes no bit.
    Complex numbers take two elements each.

    Args:
        trainable: parameters that local training changes.
        carried: all other tensors that are exchanged: float and integer buffers, frozen parameters. Integer tensors are
            written back rounded.

    Attributes:
        tensors: the tensors; complex ones are pairs of real numbers, booleans are bytes.

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
        self._number_trainable = len(trainable)
        self.tensors = [as_real(tensor) for tensor in (*trainable, *carried)]
        self._starts = list(accumulate((tensor.numel() for tensor in self.tensors), initial=0))
        # Copy tensors of one type at a time: with several types this is slow, and on CUDA wrong before torch 2.11.
        self._alike = _by_type(enumerate(self.tensors))
        self._integers = [i for i, tensor in enumerate(self.tensors) if not tensor.is_floating_point()]
        self._exact: dict[int, Tensor] = {}
        self._cut: dict[int, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    def empty(self) -> Tensor:
        """Return an uninitialised float64 vector of the right length."""
        return torch.empty(self.size, dtype=torch.float64, device=self.device)

    def zeros(self) -> Tensor:
        """Return zeros of the vector's length that take no memory; do not write to them."""
        return torch.zeros((), dtype=torch.float64, device=self.device).expand(self.size)

    def copy(self) -> FlatView:
        """Return a view of copies of the tensors, in their own precision."""
        tensors, number = [torch.empty_like(tensor) for tensor in self.tensors], self._number_trainable
        copy = FlatView(tensors[:number], tensors[number:])
        copy.write_copy(self)
        self._exact = {i: tensors[i] for i in self._integers}
        return copy

    @cached_property
    def vector(self) -> Tensor:
        """The tensors' values as a vector, which is kept; for copies, which do not change."""
        return self.read()

    @cached_property
    def parts(self) -> list[Part]:
        """The vector in parts: one if it is short, else of about `elements_at_once`; no row of a tensor is divided."""
        return _parts(self.tensors, self.size if self.size <= ONE_PART else elements_at_once(self.device))

    def read_part(self, part: Part, out: Tensor) -> Tensor:
        """Copy a part into the first elements of ``out`` and return these."""
        if part.size == self.size:
            return self._read_into(out)
        vector = out[: part.size]
        for pieces in part.pieces.values():
            own = [rows_of(self.tensors[number], rows) for _, number, rows in pieces]
            places = [vector[place] for place, _, _ in pieces]
            torch._foreach_copy_([place.view(p.shape) for place, p in zip(places, own, strict=True)], own)
        return vector

    def write_copy(self, copy: FlatView) -> None:
        """Write the values of another view to the tensors, in place, so that every reference to them stays valid."""
        for numbers in self._alike.values():
            torch._foreach_copy_([self.tensors[i] for i in numbers], [copy.tensors[i] for i in numbers])

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of ``vector`` in the tensors' shapes, without a copy."""
        # Views are cached, since a round cuts the same few vectors for every client. They keep the vector's memory
        # alive, so no other vector can get its address.
        views = self._cut.get(vector.data_ptr())
        if views is None:
            views = self._cut[vector.data_ptr()] = _split(vector, self.tensors)
        return views

    def elements(self, number: int) -> slice:
        """Return the slice of the tensor of this number in the vector."""
        return slice(self._starts[number], self._starts[number + 1])

    def completed(self, vector: Tensor) -> Tensor:
        """Return a vector from before the last tensors were exchanged, with their present values."""
        missing = [
            tensor.double().flatten()
            for tensor, end in zip(self.tensors, self._starts[1:], strict=True)
            if end > len(vector)
        ]
        return torch.cat([vector, *missing]) if missing else vector

    def forget(self, vector: Tensor) -> None:
        """Release a vector that is no longer needed, so that its memory can be reused."""
        self._cut.pop(vector.data_ptr(), None)

    def read(self) -> Tensor:
        """Return a new vector with the tensors' values; the exact integers are kept too."""
        self._exact = {i: self.tensors[i].clone() for i in self._integers}
        return self._read_into(self.empty())

    def _read_into(self, vector: Tensor) -> Tensor:
        views = self.views(vector)
        for numbers in self._alike.values():
            torch._foreach_copy_([views[i] for i in numbers], [self.tensors[i] for i in numbers])
        return vector

    def write(self, vector: Tensor) -> None:
        """Copy ``vector`` into the tensors, in place, so that every reference to them stays valid."""
        views = self.views(vector)
        for dtype, numbers in self._alike.items():
            if dtype.is_floating_point:
                torch._foreach_copy_([self.tensors[i] for i in numbers], [views[i] for i in numbers])
            else:
                self._write_integers(numbers, views)

    def _write_integers(self, numbers: list[int], views: list[Tensor]) -> None:
        """Write tensors of one integer type: together if they are single numbers, such as the counters of BatchNorm."""
        counters = [i for i in numbers if self.tensors[i].dim() == 0]
        if len(counters) > 1:
            exact = torch.stack([self._exact.get(i, self.tensors[i]) for i in counters])
            values = _rounded(torch.stack([views[i] for i in counters]), exact)
            torch._foreach_copy_([self.tensors[i] for i in counters], list(values.unbind()))
            numbers = [i for i in numbers if self.tensors[i].dim()]
        for i in numbers:
            self.write_rows(i, None, views[i])

    def write_rows(self, number: int, rows: slice | None, value: Tensor) -> None:
        """Write these rows of the tensor of this number, counted in the vector's order; None for all."""
        rows_of(self.tensors[number], rows).copy_(self._narrow(number, value, rows))

    def substituted(self, state: Mapping[str, Any], values: Tensor | FlatView) -> dict[str, Any]:
        """Return ``state`` with other values for entries that share memory with one of the tensors.

        Args:
            state: tensors and other values by name.
            values: a vector, or copies of the tensors.
        """
        if is_exact := isinstance(values, FlatView):
            views = values.tensors
        else:
            views = self._cut.get(values.data_ptr()) or _split(values, self.tensors)
        numbers = {(tensor.data_ptr(), tensor.shape): number for number, tensor in enumerate(self.tensors)}

        def substitute(entry: Any) -> Any:
            if not isinstance(entry, Tensor):
                return entry
            real = as_real(entry)
            if (number := numbers.get((real.data_ptr(), real.shape))) is None:
                return entry
            # A copy is also needed since a complex number cannot start at an odd position of the vector.
            value = views[number] if is_exact else self._narrow(number, views[number])
            value = value.to(real.dtype, copy=True)
            return torch.view_as_complex(value) if entry.is_complex() else value.to(entry.dtype)

        return {name: substitute(entry) for name, entry in state.items()}

    def _narrow(self, number: int, value: Tensor, rows: slice | None = None) -> Tensor:
        tensor = self.tensors[number]
        if tensor.is_floating_point():
            return value
        return _rounded(value, rows_of(self._exact.get(number, tensor), rows))


def _split(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in tensors])
    return [p if t.dim() == 1 else p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]


def _parts(tensors: Sequence[Tensor], most: int) -> list[Part]:
    found: list[Part] = []
    start = end = 0
    pieces: dict[torch.dtype, list[tuple[slice, int, slice | None]]] = {}
    for number, tensor in enumerate(tensors):
        for rows, size in pieces_of(tensor, most):
            if pieces and end + size - start > most:
                found.append(Part(slice(start, end), pieces))
                pieces, start = {}, end
            pieces.setdefault(tensor.dtype, []).append((slice(end - start, end - start + size), number, rows))
            end += size
    return [*found, Part(slice(start, end), pieces)]


def pieces_of(tensor: Tensor, most: int) -> Iterator[tuple[slice | None, int]]:
    """Yield the rows of each piece, None for all, and its elements: at most so many, unless a row has more."""
    if tensor.numel() <= most or not tensor.dim():
        yield None, tensor.numel()
        return
    of_row = tensor.numel() // len(tensor)
    at_once = max(1, most // of_row)
    for start in range(0, len(tensor), at_once):
        end = min(start + at_once, len(tensor))
        yield slice(start, end), (end - start) * of_row


def rows_of(tensor: Tensor, rows: slice | None) -> Tensor:
    """Return some rows of a tensor; None is the whole."""
    return tensor if rows is None else tensor[rows]


def elements_at_once(device: torch.device) -> int:
    """Return how many elements of a long vector to compute with at a time, where temporaries would be as long.

    On a CPU they then stay in its cache: half a megabyte. On other devices each part is a launch of each operator.
    """
    return 1 << 16 if device.type == "cpu" else 1 << 24


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
