"""Count the cost of operators while a step runs, and list those that cannot be counted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_fedscale.devices.profiling.costs import flops_of, has_formula

FREE, COUNTED, UNKNOWN = "free", "counted", "unknown"

# Operators with products, which should be in the tables of costs; elementwise operations do not count, as is usual.
_PRODUCTS = re.compile(
    r"mm$|mm_|_mm|conv|attention|rnn|lstm|gru|linalg|fft|cholesky|solve|svd|cdist|trilinear|multi_head|transformer"
    r"|quantized|geqrf|ormqr|lu_"
)
_ELEMENTWISE = re.compile(r"_foreach_|_thnn_fused|convert|vector_norm|linalg_(cross|diagonal|vecdot)|fftshift|fftfreq")
_COPIES = {"clone", "copy_", "_to_copy", "fill_", "zero_"}
_OF_TORCH = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "fsdp")


@dataclass
class Operator:
    """The record of an operator.

    Attributes:
        kind: "counted"; "free" if it has no FLOPs to count, like elementwise operators; "unknown" if it may have FLOPs
            that are not known.
        calls: number of calls.
        flops: FLOPs of all calls.
        seconds: time of all calls, if they were timed.
    """

    kind: str
    calls: int = 0
    flops: float = 0.0
    seconds: float = 0.0


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums FLOPs by phase and records every operator of a module's own step, while it is the current mode.

    The phases are "forward", "backward" and "optimizer"; in the last one elementwise arithmetic counts too, since an
    optimizer has nothing else. Operators in hooks of callbacks, or on copies of the module, are not part of the step
    and do not count. The computation is not changed.

    Args:
        hook: gives the name of the module's hook that is running, None outside of all; asked for every operator.
        step: the hook whose operators are the forward pass.
        tables: lookup tables by the identity of their storage; those that are multiplied are recorded.
        timed: measure the time of each operator, on CUDA with a synchronization.
        everything: count all operators, in any hook.

    Attributes:
        flops: FLOPs by phase.
        operators: records by name.
        multiplied: identities of the tables that took part in a product.
        steps: number of optimizer steps.
        timed: the argument.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        hook: Callable[[], str | None],
        step: str,
        tables: Collection[int] = (),
        *,
        timed: bool = False,
        everything: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        self.operators: dict[str, Operator] = {}
        self.multiplied: set[int] = set()
        self.steps = 0
        self.timed = timed
        self._waits = timed and torch.cuda.is_available()
        self._hook = hook
        self._step = step
        self._around = {None, step, "backward", "optimizer_step"}  # hooks in which operators belong to the step
        self._everything = everything
        self._tables = {table: table for table in tables}
        self._copies: list[Tensor] = []  # copies of tables, kept so that no other tensor gets their address
        self._scopes: list[tuple[bool, Any]] = []  # torch's profiler scopes: is it an optimizer's step, in which hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = _PLANS.get(func) or _plan_of(func)
        if plan.composite and not plan.counts and not any(getattr(value, "is_nested", False) for value in args):
            # In inference mode operators arrive here before they are decomposed, as torch itself would do next.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        begun = self._now() if self.timed else 0.0
        result = func(*args, **kwargs)
        seconds = self._now() - begun if self.timed else 0.0
        if plan.scope is not None:
            self._enter_or_exit(plan.scope, args)
        elif (phase := self._phase()) is not None:
            self._note(plan, phase, func, args, kwargs, result, seconds)
        return result

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code stays compiled, and its calls of products are counted."""
        return True

    def uncounted_share(self) -> float:
        """Return the share of the measured time of operators of unknown cost."""
        total = sum(operator.seconds for operator in self.operators.values())
        unknown = sum(operator.seconds for operator in self.operators.values() if operator.kind == UNKNOWN)
        return unknown / total if total else 0.0

    def _phase(self) -> str | None:
        """Return the operator's phase; None if it does not belong to the step."""
        hook = self._hook()
        if not self._everything and hook not in self._around:
            return None
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if self._scopes and self._scopes[-1][0]:
            if hook == self._step and (hook != self._scopes[-1][1] or torch.is_grad_enabled()):
                return "forward"  # the closure runs the training step within the optimizer's step
            return None if torch.is_grad_enabled() else "optimizer"
        return "forward" if self._everything or hook == self._step else None

    def _enter_or_exit(self, enters: bool, args: Any) -> None:
        if not enters:
            del self._scopes[-1:]
            return
        steps = str(args[0]).startswith("Optimizer.step#")
        self._scopes.append((steps, self._hook()))
        self.steps += steps

    def _note(self, plan: _Plan, phase: str, func: Any, args: Any, kwargs: Any, result: Any, seconds: float) -> None:
        flops = 0.0
        if plan.counts:
            try:
                flops = plan.flops(func, args, kwargs, result)
            except Exception:  # the formula does not support these arguments; the step continues
                plan = plan._replace(kind=UNKNOWN)
            if flops and self._tables:
                self._note_tables(args)
        elif phase == "optimizer":
            flops = _arithmetic(plan, args, kwargs, result)
        if plan.copies and self._tables:
            self._note_copy(args, result)
        seen = self.operators.get(plan.name)
        if seen is None:
            seen = self.operators[plan.name] = Operator(plan.kind)
        if flops and seen.kind != COUNTED:
            seen.kind = COUNTED
        seen.calls += 1
        seen.flops += flops
        seen.seconds += seconds
        self.flops[phase] += flops

    def _note_tables(self, args: Any) -> None:
        for value in args:
            if isinstance(value, Tensor) and (storage := storage_of(value)) in self._tables:
                self.multiplied.add(self._tables[storage])

    def _note_copy(self, args: Any, result: Any) -> None:
        """Record that a copy in another precision is the same table."""
        if args and isinstance(args[0], Tensor) and (storage := storage_of(args[0])) in self._tables:
            self._copies.append(result)
            self._tables[storage_of(result)] = self._tables[storage]

    def _now(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter()


def storage_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage; 0 if it has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


class _Plan(NamedTuple):
    """How an operator is counted.

    Attributes:
        name: name of the operator.
        kind: whether its FLOPs are counted, free, or unknown.
        counts: whether there is a formula for it.
        composite: whether it is composed of other operators.
        pointwise: whether it counts as elementwise arithmetic in an optimizer's step.
        copies: whether it copies tensors into another precision.
        scope: True if it begins a scope of torch's profiler, False if it ends one, None otherwise.
    """

    name: str
    kind: str
    counts: bool
    composite: bool
    pointwise: bool
    copies: bool
    scope: bool | None

    def flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        """Return the FLOPs of a call by the formula."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            return float(flop_counter.flop_registry[func](*args, **kwargs, out_val=result))
        return float(flops_of(func, args, kwargs, result))


_PLANS: dict[Any, _Plan] = {}


def _plan_of(func: Any) -> _Plan:
    higher = isinstance(func, torch._ops.HigherOrderOperator)
    counts = func in flop_counter.flop_registry if higher else has_formula(func)
    name = _name(func)
    plan = _Plan(
        name=name,
        kind=COUNTED if counts else _kind(func),
        counts=counts,
        composite=not higher
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        pointwise=not higher and _is_arithmetic(func),
        copies=name == "aten._to_copy",
        scope=_SCOPES.get(name),
    )
    _PLANS[func] = plan
    return plan


_SCOPES = {
    "profiler._record_function_enter": True,
    "profiler._record_function_enter_new": True,
    "profiler._record_function_exit": False,
}


def _arithmetic(plan: _Plan, args: Any, kwargs: Any, result: Any) -> float:
    """Return the operations of an operator in an optimizer's step."""
    name = plan.name.removeprefix("aten.")
    if name.startswith("_fused_") and args:
        return float(sum(tensor.numel() for tensor in args[0]) * _operations_of_fused(name, kwargs))
    if name.startswith("_foreach_") and name not in _FOREACH_COPIES:
        lists = (value for value in args if isinstance(value, (list, tuple)))
        return float(sum(tensor.numel() for tensor in next(lists, ())))
    if plan.pointwise:
        return float(max((leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor)), default=0))
    return 0.0


_FOREACH_COPIES = {"_foreach_copy_", "_foreach_copy", "_foreach_zero_", "_foreach_zero"}


def _operations_of_fused(name: str, kwargs: Any) -> int:
    """Return the operations per element of a fused optimizer, as in torch's loops over parameters."""
    given = bool(kwargs.get("weight_decay")) + bool(kwargs.get("maximize"))
    if "sgd" in name:
        momentum = 2 * (bool(kwargs.get("momentum")) and not kwargs.get("is_first_step"))
        return 1 + momentum + bool(kwargs.get("nesterov")) + given
    return given + (4 if "adagrad" in name else 7 + bool(kwargs.get("amsgrad")))


def _is_arithmetic(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags and func._overloadpacket.__name__ not in _COPIES


def _name(func: Any) -> str:
    return str(func) if isinstance(func, torch._ops.HigherOrderOperator) else str(func._overloadpacket)


def _kind(func: Any) -> str:
    """Return the kind of an operator without a formula."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        return UNKNOWN
    if func.is_view or (torch.Tag.pointwise in func.tags and func.namespace in _OF_TORCH):
        return FREE
    name = func._schema.name
    if func.namespace not in _OF_TORCH:
        return UNKNOWN
    return UNKNOWN if _PRODUCTS.search(name) and not _ELEMENTWISE.search(name) else FREE
