"""Temporary memory of operators, which they release before they return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_fedscale.devices.profiling import libraries

# Operators that take no memory besides their result.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "full", "full_like", "zero_", "fill_", "clone", "copy_", "_to_copy", "cat", "arange", "randn",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_WHOLE = {torch.float32, torch.float64}


class _Call(NamedTuple):
    operator: Any
    size: int  # bytes of arguments and results
    hidden: int  # temporary bytes besides these


class Scratch:
    """The temporary CPU memory of a step's operators, besides arguments and results, measured by running them.

    Convolutions reorder their arguments and results, backward passes copy gradients that are not contiguous, and some
    operators have internal tables; only the operator itself knows this. Therefore every operator of a step with few
    samples is run separately from the module, on real tensors of the right shapes with arbitrary values. The calls of
    larger steps are matched by their order; their temporary memory is extrapolated by the bytes of their arguments and
    results.

    Attributes:
        borders: batches above which some operators use another algorithm, which may take less.

    Example:
        >>> scratch, images, weights = Scratch(), torch.ones(16, 32, 8, 8), torch.ones(32, 32, 3, 3)
        >>> scratch.begin(learning=True)
        >>> convolved = torch.nn.functional.conv2d(images, weights)
        >>> how = images, weights, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        >>> scratch.hidden(torch.ops.aten.convolution.default, how, {}, convolved) > 0
        True
    """

    def __init__(self) -> None:
        self._measured: dict[Any, int] = {}
        self._steps: list[list[_Call]] = []
        self._calls: list[_Call] = []
        self._learning = False
        self._samples = 0
        self._kinds: set[Any] = set()
        self._used: list[libraries.Call] = []
        self._kept = libraries.Kept({}, 0, "")
        self.borders: set[int] = set()

    def begin(self, *, learning: bool = False, samples: int = 0) -> None:
        """Start a dry run on fake tensors, whose operators are run on real tensors or looked up."""
        self._calls, self._learning, self._samples, self._kinds = [], learning, samples, set()

    def learned(self) -> None:
        """Finish the dry run, and use it for later ones."""
        self._steps.append(self._calls)

    def ask(self) -> None:
        """Measure the memory that libraries keep for the calls of all learning dry runs."""
        if self._used:
            self._kept = libraries.kept_of(self._used)

    @property
    def assumed(self) -> str:
        """Why a typical value is assumed for the libraries' memory; empty if it was measured, or if it is zero."""
        return self._kept.assumed

    def kept(self) -> int:
        """Return the libraries' memory for the calls of this dry run; buffers are the same for any batch."""
        if not self._kept.assumed and self._kinds - self._kept.code.keys():
            self._kept = self._kept._replace(assumed="some operators could not be run on a few samples")
        return libraries.code_bytes(self._kinds, self._kept.code) + self._kept.buffers

    def runs(self, operator: Any, args: Any) -> None:
        """Note the kind of code that a call needs."""
        if (kind := libraries.kind_of(operator, args)) is not None:
            self._kinds.add(kind)

    def hidden(self, operator: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the maximum temporary bytes of a call, besides its arguments and results."""
        given, results = tensors_of(args, kwargs), tensors_of(result)
        if _takes_nothing(operator, given, results):
            return 0
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*given, *results])
        self.runs(operator, args)
        bytes_ = self._measure(operator, args, kwargs) if self._learning else self._follow(operator, size)
        self._calls.append(_Call(operator, size, bytes_))
        return bytes_

    def _follow(self, operator: Any, size: int) -> int:
        number = len(self._calls)
        known = [step[number] for step in self._steps if number < len(step) and step[number].operator is operator]
        if not known or len(known) < len(self._steps):  # in another order: use this operator's largest ratio
            calls = [call for step in self._steps for call in step if call.operator is operator]
            return round(max((call.hidden / max(1, call.size) for call in calls), default=0.0) * size)
        first, last = min(known, key=_size_of), max(known, key=_size_of)
        slope = (last.hidden - first.hidden) / (last.size - first.size) if last.size > first.size else 0.0
        if slope < 0:  # another algorithm for more samples
            slope = last.hidden / last.size
        return max(0, round(last.hidden + slope * (size - last.size)))

    def _measure(self, operator: Any, args: Any, kwargs: Any) -> int:
        key = operator, *map(_key_of, tree_leaves((args, kwargs)))
        if key not in self._measured:
            self._measured[key] = _run(operator, args, kwargs)
            if libraries.uses(operator):
                self._used.append(libraries.call_of(operator, args, kwargs))
                self._look_below(operator, args)
        return self._measured[key]

    def _look_below(self, operator: Any, args: Any) -> None:
        """Record the largest batch for which a convolution uses another algorithm, if it is below this one."""
        rows = len(args[0])
        if libraries.kind_of(operator, args) != libraries.kind_of(operator, args, libraries.FEW - 1):
            self.borders.add(-(-libraries.FEW * self._samples // rows) - 1)


def _size_of(call: _Call) -> int:
    return call.size


def tensors_of(*values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results; faster than a pytree, which knows any container.

    Example:
        >>> one, two = torch.ones(1), torch.ones(2)
        >>> [len(tensor) for tensor in tensors_of(two, [one, None], (3, {"out": (two,)}))]
        [2, 1, 2]
    """
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_of(*value)
        elif isinstance(value, dict):
            found += tensors_of(*value.values())
    return found


def _takes_nothing(operator: Any, given: list[Tensor], results: list[Tensor]) -> bool:
    name = operator._overloadpacket.__name__
    if operator.is_view or name in _FREE or name.startswith(("_foreach", "_fused")):
        return True
    if any(tensor.device.type != "cpu" for tensor in given):
        return True
    kinds = {tensor.dtype for tensor in [*given, *results] if tensor.ndim}
    if torch.Tag.pointwise in operator.tags:
        return len(kinds - {torch.bool}) <= 1 and not any(kind.is_complex for kind in kinds)
    return name in _PRODUCTS and kinds <= _WHOLE and all(map(_is_dense, given))


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers are contiguous in memory, for any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _key_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def _run(operator: Any, args: Any, kwargs: Any) -> int:
    with unset_fake_temporarily(), _disable_current_modes(), torch.enable_grad():
        try:
            args, kwargs = tree_map_only(Tensor, libraries.like, (args, kwargs))
            return _most_taken(lambda: operator(*args, **kwargs))
        except Exception:  # such as for invalid indices
            return 0


def _most_taken(call: Callable[[], Any]) -> int:
    if not torch._C._autograd._profiler_enabled():
        return watched(call)[1]
    found: list[int] = []  # the user's own profiler is only active in this thread
    thread = threading.Thread(target=lambda: found.append(watched(call)[1]))
    thread.start()
    thread.join()
    return found[0] if found else 0


def watched(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return a call's result, and its peak of torch's allocated bytes minus those in use at its end."""
    if torch._C._autograd._profiler_enabled():
        return call(), 0
    torch._C._autograd._enable_profiler_legacy(_MEMORY)
    try:
        result = call()
    finally:
        threads = torch._C._autograd._disable_profiler_legacy()
    alive = most = 0
    event: Any
    for event in (event for events in threads for event in events):
        if event.kind() == "memory_alloc":
            alive += event.cpu_memory_usage()
            most = max(most, alive)
    return result, most - max(0, alive)


_autograd: Any = torch.autograd
_MEMORY = _autograd.ProfilerConfig(
    _autograd.ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
)
