"""Selections of rows of stacked tensors: the clients of a wave that take a step together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rows:
    """A selection of rows; `of` returns a view if the rows are adjacent, else a copy.

    Args:
        indices: the rows, ascending.

    Example:
        >>> stack = torch.arange(4.0)
        >>> Rows([1, 2]).of(stack).add_(10), Rows([0, 3]).of(stack).tolist()
        (tensor([11., 12.]), [0.0, 3.0])
        >>> stack.tolist()
        [0.0, 11.0, 12.0, 3.0]
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        self.adjacent = self.indices[-1] - self.indices[0] + 1 == len(self.indices)
        self._slice = slice(self.indices[0], self.indices[-1] + 1)
        self._index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, stack: Tensor) -> Tensor:
        """Return these rows of a stack."""
        return stack[self._slice] if self.adjacent else stack.index_select(0, self._on(stack))

    def write(self, stack: Tensor, values: Tensor) -> None:
        """Set these rows of a stack; do nothing if ``values`` is already a view of them."""
        if self.adjacent:
            target = stack[self._slice]
            if target.data_ptr() != values.data_ptr() or values.dtype != stack.dtype:
                target.copy_(values)
        else:
            stack.index_copy_(0, self._on(stack), values.to(stack.dtype))

    def add(self, stack: Tensor, values: Tensor) -> None:
        """Add to these rows of a stack."""
        if self.adjacent:
            stack[self._slice] += values
        else:
            stack.index_add_(0, self._on(stack), values.to(stack.dtype))

    def _on(self, stack: Tensor) -> Tensor:
        if self._index is None:
            self._index = torch.tensor(self.indices, device=stack.device)
        return self._index
