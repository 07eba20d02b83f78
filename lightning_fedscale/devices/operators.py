"""Counts what operators cost while a step runs, and knows which of them it cannot count."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_fedscale.devices.costs import flops_of

FREE, COUNTED, UNKNOWN = "free", "counted", "unknown"

# What has products in it and should be in the tables of costs; element by element nothing counts, as is usual.
_PRODUCTS = re.compile(
    r"mm$|mm_|_mm|conv|attention|rnn|lstm|gru|linalg|fft|cholesky|solve|svd|cdist|trilinear|multi_head|transformer"
    r"|quantized|geqrf|ormqr|lu_"
)
_ELEMENTWISE = re.compile(r"_foreach_|_thnn_fused|convert|vector_norm|linalg_(cross|diagonal|vecdot)|fftshift|fftfreq")
_COPIES = {"clone", "copy_", "_to_copy", "fill_", "zero_"}
_OF_TORCH = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "fsdp")


@dataclass
class Operator:
    """What was seen of an operator.

    Attributes:
        kind: "counted"; "free" where nothing is to be counted, as in everything element by element; "unknown" where
            something is, or may be, and is not known.
        calls: how often it ran.
        flops: of all calls.
        seconds: of all calls, if they were timed.
    """

    kind: str
    calls: int = 0
    flops: float = 0.0
    seconds: float = 0.0


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs by phase and takes note of every operator, while it is the current mode.

    In phase "optimizer" arithmetic counts element by element too, since an optimizer has nothing else.

    Args:
        timed: measure how long each operator takes; for real tensors.

    Attributes:
        phase: what the operators are for.
        flops: by phase.
        operators: by name.
    """

    supports_higher_order_operators = True

    def __init__(self, timed: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.operators: dict[str, Operator] = {}
        self._timed = timed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, begun = kwargs or {}, self._now()
        result = func(*args, **kwargs)
        flops = self._flops(func, args, kwargs, result)
        seen = self.operators.setdefault(_name(func), Operator(_kind(func, flops)))
        if flops and seen.kind != COUNTED:
            seen.kind = COUNTED
        seen.calls += 1
        seen.flops += flops
        seen.seconds += self._now() - begun
        self.flops[self.phase] += flops
        return result

    def uncounted_share(self) -> float:
        """Share of the measured time that went to operators of unknown cost."""
        total = sum(operator.seconds for operator in self.operators.values())
        unknown = sum(operator.seconds for operator in self.operators.values() if operator.kind == UNKNOWN)
        return unknown / total if total else 0.0

    def _flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        if isinstance(func, torch._ops.HigherOrderOperator):
            known = flop_counter.flop_registry.get(func)
            return float(known(*args, **kwargs, out_val=result)) if known is not None else 0.0
        flops = flops_of(func, args, kwargs, result)
        if not flops and self.phase == "optimizer" and _is_arithmetic(func):
            flops = max((leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor)), default=0)
        return float(flops)

    def _now(self) -> float:
        if not self._timed:
            return 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _is_arithmetic(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags and func._overloadpacket.__name__ not in _COPIES


def _name(func: Any) -> str:
    return str(func) if isinstance(func, torch._ops.HigherOrderOperator) else str(func._overloadpacket)


def _kind(func: Any, flops: float) -> str:
    if flops:
        return COUNTED
    if isinstance(func, torch._ops.HigherOrderOperator):
        return UNKNOWN
    if func.is_view or (torch.Tag.pointwise in func.tags and func.namespace in _OF_TORCH):
        return FREE
    name = func._schema.name
    if func.namespace not in _OF_TORCH:
        return UNKNOWN
    return UNKNOWN if _PRODUCTS.search(name) and not _ELEMENTWISE.search(name) else FREE
