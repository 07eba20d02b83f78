"""Deltas of clients that train one after the other: computed in parts, so that no vector is as long as the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.types import PendingDelta
from lightning_fedscale.utils.flat_view import FlatView, Part, elements_at_once, pieces_of, rows_of


class Deltas:
    """Computes the deltas of a rank's clients, in memory that they share.

    Args:
        shared: the module's tensors.
        server: copies of them, of the global model.
    """

    def __init__(self, shared: SharedTensors, server: FlatView) -> None:
        self._shared = shared
        self._view = shared.view
        self._server = server
        most = max(part.size for part in self._view.parts)
        self._memory = self._empty(most)
        self._origin = self._empty(most)
        self._in_origin: Part | None = None  # read only once if there is only one
        self._whole = self._memory if most == self._view.size else None
        self._for_checks: Tensor | None = None

    def of(self, start: Tensor | None) -> ClientDelta:
        """Return the delta of the client whose model the module holds.

        Args:
            start: the model from which it started; None for the global one.
        """
        return ClientDelta(self, self._view, None if start is None else self._shared.origin(start))

    def subtract(self, part: Part, origin: Tensor | None, out: Tensor) -> Tensor:
        """Compute a part of ``origin - module``; None is the global model."""
        own = self._of_server(part) if origin is None else origin[part.elements]
        out = out[: part.size]
        # Widen first: `torch.sub` of float64 and float32 would make another float64 copy.
        if part.size < self._view.size or part.size <= elements_at_once(out.device):
            return torch.sub(own, self._view.read_part(part, out), out=out)
        pieces, sizes = self._pieces
        for piece, start, values in zip(pieces, torch.split(own, sizes), torch.split(out, sizes), strict=True):
            values.view(piece.shape).copy_(piece)
            torch.sub(start, values, out=values)
        return out

    @property
    def memory(self) -> Tensor:
        """Memory for one part."""
        return self._memory

    def whole(self) -> Tensor:
        """Return memory for a whole delta."""
        if self._whole is None:
            self._whole = self._empty(self._view.size)
        return self._whole

    def spoils(self, parts: Iterable[Tensor]) -> bool:
        """Return whether carried elements are not finite in a delta, but are in the global model."""
        for part, delta in zip(self._view.parts, parts, strict=True):
            carried = _carried(part, self._view)
            if carried.start < part.size:
                if self._for_checks is None:
                    self._for_checks = self._empty(len(self._memory))
                server = self._server.read_part(part, self._for_checks)
                if (~delta[carried].isfinite() & server[carried].isfinite()).any():
                    return True
        return False

    @cached_property
    def _pieces(self) -> tuple[list[Tensor], list[int]]:
        """The module's tensors in pieces that stay in the cache, and their sizes."""
        most = elements_at_once(self._view.device)
        found = [(rows_of(each, rows), size) for each in self._view.tensors for rows, size in pieces_of(each, most)]
        return [piece for piece, _ in found], [size for _, size in found]

    def _of_server(self, part: Part) -> Tensor:
        """Return a part of the origin; see `SharedTensors.origin`."""
        if self._in_origin is not part:
            self._server.read_part(part, self._origin)
            self._origin[_carried(part, self._view)].nan_to_num_(0.0, 0.0, 0.0)
            self._in_origin = part
        return self._origin[: part.size]

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=self._view.device)


class ClientDelta(PendingDelta):
    """``origin - module`` for one client, as long as the module holds its model."""

    def __init__(self, deltas: Deltas, view: FlatView, origin: Tensor | None) -> None:
        self._deltas = deltas
        self._view = view
        self._origin = origin
        self._vector: Tensor | None = None
        self._zero: list[slice] = []

    def vector(self) -> Tensor:
        """Return the whole delta, which may be changed; it is overwritten by the next client's."""
        if self._vector is None:
            whole = self._deltas.whole()
            for part in self._view.parts:
                self._deltas.subtract(part, self._origin, whole[part.elements])
            self._vector = whole
            if self._zero:
                self.clear(self._zero)
        return self._vector

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the parts of the delta."""
        if len(self._view.parts) == 1:
            self.vector()  # to compute it once
        for part in self._view.parts:
            if self._vector is not None:
                yield part.elements, self._vector[part.elements]
                continue
            memory = self._deltas.subtract(part, self._origin, self._deltas.memory)
            for elements in self._zero:
                _within(memory, part.elements, elements).zero_()
            yield part.elements, memory

    def clear(self, elements: Iterable[slice]) -> None:
        """Have these elements be zero from now on."""
        self._zero = list(elements)
        if self._vector is not None:
            for each in self._zero:
                self._vector[each].zero_()

    def norm(self) -> float:
        """Return the L2 norm of the trainable part; NaN if any element is not finite."""
        squares, sums = [], []
        for part, (_, delta) in zip(self._view.parts, self.parts(), strict=True):
            first = _carried(part, self._view).start
            if first:
                moved = delta if first == part.size else delta[:first]
                squares.append(moved.dot(moved))
            if first < part.size:
                sums.append(delta[first:].sum())
        numbers: list[float] = torch.stack([*squares, *sums]).tolist()
        square, total = math.fsum(numbers[: len(squares)]), sum(numbers[len(squares) :])
        # The carried part does not count, but must be finite wherever the server's is (see `SharedTensors.origin`). If
        # its sum is finite, so is every element; the sum takes no memory.
        if not math.isfinite(total) and self._deltas.spoils(delta for _, delta in self.parts()):
            return math.nan
        return math.sqrt(square) if math.isfinite(square) else math.nan


def _carried(part: Part, view: FlatView) -> slice:
    """Return the place in the part of what is not trainable."""
    return slice(min(max(0, view.trainable - part.elements.start), part.size), part.size)


def _within(memory: Tensor, place: slice, elements: slice) -> Tensor:
    """Return those of some elements that are in a part at this place."""
    start, stop = max(elements.start, place.start), min(elements.stop, place.stop)
    return memory[start - place.start : max(start, stop) - place.start]
