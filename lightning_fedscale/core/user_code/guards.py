"""Detection of changes in what a training step's Python code reads outside of its module."""

from __future__ import annotations

import builtins
import collections
import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedscale.core.user_code.objects import is_library
from lightning_fedscale.core.user_code.outside import names_in, resolved
from lightning_fedscale.core.user_code.state import PythonState
from lightning_fedscale.core.user_code.variables import Place, Variables

# Builtins whose results depend only on their arguments. Others print, open files, inspect the process or draw.
_PURE = {
    "abs", "all", "any", "bin", "callable", "chr", "divmod", "format", "getattr", "hasattr", "hash", "hex",
    "isinstance", "issubclass", "iter", "len", "max", "min", "next", "oct", "ord", "pow", "repr", "round", "setattr",
    "sorted", "sum", "__build_class__",
}  # fmt: skip
_PURE_MODULES = {"math", "cmath", "_operator", "_functools", "_bisect", "_heapq", "_statistics", "_abc"}
_PURE_TYPES = (
    str, bytes, int, float, complex, list, tuple, dict, set, frozenset, bytearray, types.MappingProxyType,
    collections.deque,
)  # fmt: skip
# Python modules of libraries that the step may call into.
_PURE_PACKAGES = (
    "collections", "contextlib", "copy", "copyreg", "dataclasses", "enum", "functools", "itertools", "math", "numbers",
    "operator", "statistics", "types", "typing", "abc", "_collections_abc", "omegaconf",
    "torch.nn", "torch.functional", "torch._tensor", "torch.autograd", "torch._functorch", "torch.func",
    "torch.distributions", "torch.utils.checkpoint", "torch.utils._pytree", "torch.utils._contextlib", "torch.amp",
    "torch.overrides", "torch._jit_internal", "torch._refs", "torch._ops", "torch._library", "torch._higher_order_ops",
    "torch.ao.nn", "torch.types", "torch._utils", "torch.masked", "torch.nested", "torch.sparse", "torch._C",
    "lightning.pytorch.core", "pytorch_lightning.core", "lightning.fabric.utilities.data",
    "lightning.fabric.utilities.device_dtype_mixin", "lightning_fabric.utilities",
    "lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing", "lightning_fedscale",
    "numpy._core", "numpy.core", "numpy.linalg",
)  # fmt: skip
_PURE_FUNCTIONS = {
    "torch._compile.inner", "torch.is_tensor", "torch.get_default_device", "torch.are_deterministic_algorithms_enabled",
    "torch.get_float32_matmul_precision", "os.__getitem__", "_collections_abc.get",
    # Once something was compiled, torch notes which modules are made and freed.
    "torch._dynamo.mutation_guard.patched_init", "torch._dynamo.utils.<lambda>",
}  # fmt: skip
# Methods and functions of torch that pass values to Python, or whose results depend on more than their arguments.
_IMPURE_OF_TORCH = {
    "item", "tolist", "numpy", "__array__", "data_ptr", "storage", "untyped_storage", "backward", "set_rng_state",
    "get_rng_state", "initial_seed", "seed", "manual_seed", "save", "load", "is_shared", "share_memory_",
}  # fmt: skip


class Unguarded(RuntimeError):
    """Raised if a step does something that cannot be guarded; says what."""


class Reads:
    """Records, inside `watching`, the Python code that runs outside the libraries, and its direct calls.

    Attributes:
        reason: the first call that cannot be guarded; None if there was none.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._dynamic = False
        self._ran: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}
        self._classes: dict[type, None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the code that runs in this thread inside the context.

        Garbage is not collected meanwhile: finalizers and ``gc.callbacks`` would run, which are no code of the step.
        """
        if sys.getprofile() is not None:
            self.reason = "a profiler is active"
            yield
            return
        collects = gc.isenabled()
        gc.disable()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()

    def _note(self, frame: types.FrameType, event: str, arg: Any) -> None:
        mine = not is_library(frame.f_globals.get("__name__"))
        if event == "c_call" and mine:
            self._dynamic |= arg is getattr
            if not _is_pure(arg):
                self.reason = self.reason or f"it calls {getattr(arg, '__qualname__', arg)}"
        elif event == "call" and mine:
            code = frame.f_code
            self._ran[id(code), id(frame.f_globals)] = code, frame.f_globals
            if code.co_argcount:
                first = frame.f_locals.get(code.co_varnames[0])
                kind = first if isinstance(first, type) else type(first)
                if not is_library(kind.__module__):
                    self._classes[kind] = None
        elif event == "call" and frame.f_back is not None and not is_library(frame.f_back.f_globals.get("__name__")):
            module = str(frame.f_globals.get("__name__"))
            name = frame.f_code.co_name
            if name in _IMPURE_OF_TORCH or not (
                f"{module}.{name}" in _PURE_FUNCTIONS or any(f"{module}.".startswith(f"{p}.") for p in _PURE_PACKAGES)
            ):
                self.reason = self.reason or f"it calls {module}.{name}"

    def sources(self) -> tuple[list[Place], list[Any]]:
        """Return where the code that ran may read more than its arguments: global variables, classes and functions.

        Raises:
            Unguarded: if some code that ran may read anything.
        """
        if self.reason is not None:
            raise Unguarded(self.reason)
        codes = self._ran.values()
        if missing := {name for code, _ in codes for name in names_in(code).imports} - sys.modules.keys():
            raise Unguarded(f"it imports {min(missing)}")
        places, modules = resolved(codes)
        if self._dynamic and (own := [module.__name__ for module in modules if not is_library(module.__name__)]):
            raise Unguarded(f"it may read any variable of {own[0]}")
        return places, [*self._classes, *self._functions()]

    def _functions(self) -> list[types.FunctionType]:
        """Return the functions that ran and have a closure, defaults or attributes to read, wherever they are kept."""
        codes = {id(code): code for code, _ in self._ran.values()}
        return [
            found
            for found in gc.get_referrers(*codes.values())
            if isinstance(found, types.FunctionType)
            and id(found.__code__) in codes
            and (found.__closure__ or found.__defaults__ or found.__kwdefaults__ or found.__dict__)
        ]


class Guard:
    """Checks whether everything that captured steps read in Python is unchanged since their capture.

    Args:
        module: the user's module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: list[Place] = []
        self._objects: list[Any] = []
        self._then = self._now()

    def add(self, reads: Reads, state: PythonState) -> None:
        """Also guard the reads of a step that ``state`` does not cover.

        Raises:
            Unguarded: if they cannot be guarded.
        """
        if not state.complete:
            raise Unguarded("the module has an attribute whose contents cannot be read")
        places, objects = reads.sources()
        self._places = list({(id(place.variables), place.name): place for place in (*self._places, *places)}.values())
        known = {*map(id, self._objects)}
        self._objects += [one for one in objects if id(one) not in known and not state.reaches(one)]
        self._then = self._now()
        if not self._then[0].complete:
            raise Unguarded("it reads an object whose contents cannot be read")

    def holds(self) -> bool:
        """Return whether everything is unchanged."""
        variables, flags = self._then
        return flags == _flags() and variables == variables.again()

    def _now(self) -> tuple[Variables, Any]:
        return Variables(self._places, self._objects, self._module), _flags()


class NoValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises an error if an operator passes values, or sizes that depend on values, to Python."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise Unguarded(f"it reads the result of {func}")
        return func(*args, **kwargs or {})


def _is_pure(function: Any) -> bool:
    """Return whether a C function depends only on its arguments and on guarded state."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name in _IMPURE_OF_TORCH:
        return False
    if owner is builtins:
        return name in _PURE
    if isinstance(owner, types.ModuleType):
        package = owner.__name__.partition(".")[0]
        return owner.__name__ in _PURE_MODULES or (package in ("torch", "numpy") and "random" not in owner.__name__)
    if isinstance(owner, Tensor | np.ndarray | np.generic):
        return name != "tofile"
    kind = owner if isinstance(owner, type) else type(owner)
    if owner is torch.stack.__self__:  # type: ignore[attr-defined]  # torch's operators, whose class has no module
        return True
    return issubclass(kind, _PURE_TYPES) or (kind.__module__.startswith("torch") and kind is not torch.Generator)


def _flags() -> tuple[Any, ...]:
    """Return the process state that may change which of torch's operators are called."""
    hooks, modes = torch.nn.modules.module, torch._C._len_torch_function_stack()
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        modes,
        torch.get_default_device() if modes else None,  # the default device is a mode
        *(len(getattr(hooks, name)) for name in _GLOBAL_HOOKS),
    )


_GLOBAL_HOOKS = [
    name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and name.endswith("hooks")
]
