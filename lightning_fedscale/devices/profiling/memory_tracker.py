"""Track the live memory of a training step, and its kinds."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedscale.devices.profiling.costs import StepCost, bytes_moved_by, flops_of
from lightning_fedscale.devices.profiling.scratch import Scratch, tensors_of, watched
from lightning_fedscale.devices.profiling.workspaces import with_workspace

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES, BATCH = KINDS = (
    "parameters", "gradients", "optimizer state", "activations", "temporaries", "batch",
)  # fmt: skip


class OverBudget(RuntimeError):
    """Raised inside an operator once more memory is alive than the tracker's limit."""


class Peak(NamedTuple):
    """The moment of the largest live memory.

    Attributes:
        total: bytes alive.
        parts: these bytes by kind; buffers count as parameters.
    """

    total: int
    parts: dict[str, int]


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the lifetime of every storage that operators create, real or fake.

    The kind of a storage may become known only later: memory is known to be a gradient when backward returns it.
    Therefore allocations and releases are logged, and evaluated once all kinds are known.

    Args:
        granularity: storages take multiples of this many bytes; CUDA's allocator uses blocks of 512.
        stop_at: raise `OverBudget` as soon as more bytes than this are alive.
        scratch: returns the temporary memory of operators; None if it is unknown.
        fake: whether the tensors are fake; the temporary memory of operators on real ones is measured, not looked up.

    Example:
        >>> with MemoryTracker() as tracker:
        ...     a = torch.ones(1000)
        ...     b = a * 2 + 1
        >>> tracker.peak().total
        12000
    """

    def __init__(
        self,
        granularity: int = 1,
        stop_at: int | None = None,
        scratch: Scratch | None = None,
        *,
        fake: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._scratch = scratch
        self._granularity = granularity
        self._stop_at = stop_at
        self._numbers: dict[int, int] = {}  # address of each live storage -> its number
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._sizes: list[int] = []
        self._kinds: list[str | None] = []
        self._log: list[int] = []  # number of a storage at its allocation, the complement at its release
        self._alive = 0
        self._in_backward = False
        self._flops = self._bytes_moved = 0.0

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """Set the kind of these tensors' memory; the first kind that is set for a storage remains."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                number = self._number_of(tensor)
                if self._kinds[number] is None or self._kinds[number] == ACTIVATIONS:
                    self._kinds[number] = kind

    def peak(self) -> Peak:
        """Return the peak so far; the first one if several are equal."""
        alive = most = 0
        when = 0
        for moment, entry in enumerate(self._log):
            alive += self._sizes[entry] if entry >= 0 else -self._sizes[~entry]
            if alive > most:
                most, when = alive, moment
        parts = dict.fromkeys(KINDS, 0)
        living: Counter[int] = Counter()
        for entry in self._log[: when + 1]:
            living[entry if entry >= 0 else ~entry] += 1 if entry >= 0 else -1
        for number, count in living.items():
            parts[self._kinds[number] or TEMPORARIES] += count * self._sizes[number]
        return Peak(most, parts)

    def take_cost(self) -> StepCost:
        """Return the cost of the operators since the last call."""
        cost = StepCost(self._flops, self._bytes_moved)
        self._flops = self._bytes_moved = 0.0
        return cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note_backward()
        hidden = 0
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **kwargs)
        if self._scratch is not None and not self._fake:
            self._scratch.runs(func, args)
            result, hidden = watched(lambda: func(*args, **kwargs))
        else:
            result = func(*args, **kwargs)
        result = with_workspace(func, args, result)
        outputs = tensors_of(result)
        for tensor in outputs:
            self._number_of(tensor)
        if self._scratch is not None and self._fake:
            hidden = self._scratch.hidden(func, args, kwargs, result)
        if hidden:
            number = self._born(hidden)
            self._log += [number, ~number]
            self._check(hidden)
        self._flops += flops_of(func, args, kwargs, result)
        self._bytes_moved += bytes_moved_by(func, tensors_of(args, kwargs), outputs)
        return result

    def _note_backward(self) -> None:
        inside = torch._C._current_graph_task_id() != -1
        if inside and not self._in_backward:
            for number in self._numbers.values():
                if self._kinds[number] is None:
                    self._kinds[number] = ACTIVATIONS  # kept by forward for backward
        self._in_backward = inside

    def _number_of(self, tensor: Tensor) -> int:
        if tensor.layout is not torch.strided:
            return self._of_parts(tensor)
        storage = tensor.untyped_storage()
        address = storage._cdata
        if (number := self._numbers.get(address)) is not None:
            return number
        number = self._numbers[address] = self._born(storage.nbytes())
        self._log.append(number)
        self._alive += self._sizes[number]
        self._watched[address] = weakref.ref(storage, lambda _: self._died(address))
        self._check()
        return number

    def _born(self, size: int) -> int:
        """Return the number of a new storage."""
        self._sizes.append(-(-size // self._granularity) * self._granularity)
        self._kinds.append(None)
        return len(self._sizes) - 1

    def _check(self, more: int = 0) -> None:
        if self._stop_at is not None and self._alive + more > self._stop_at:
            raise OverBudget

    def _of_parts(self, tensor: Tensor) -> int:
        """Return the number of a sparse tensor, which consists of dense ones."""
        if tensor.layout is torch.sparse_coo:
            return max(self._number_of(tensor._indices()), self._number_of(tensor._values()))
        return self._number_of(tensor.values())

    def _died(self, address: int) -> None:
        number = self._numbers.pop(address)
        del self._watched[address]
        self._log.append(~number)
        self._alive -= self._sizes[number]
