"""Memory that libraries keep for the lifetime of the process: oneDNN its compiled code, MKL its buffers.

Compiled code is reused, and may have been released since, so a process that already ran operators cannot measure it.
Calls are therefore measured by this file, run as a separate program with torch and without the rest of this package.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ..x. \S+ 00:00 0 *$", re.MULTILINE)
_START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_SECONDS = 900

# Position of the weight among the arguments. The input is before it; after it come the bias and the parameters _HOW.
_CONVOLUTIONS = {"convolution": 1, "convolution_backward": 2}
_HOW = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
_RECURRENT = "mkldnn_rnn_layer"
FEW = 16
"""Number of rows from which on torch uses oneDNN for some convolutions; for fewer it may convolve by itself."""

# Typical bytes for code that could not be measured: the mean over the zoo.
_USUAL = {
    "convolution": 2**20, "convolution_backward": 3 * 2**19,
    "mkldnn_rnn_layer": 3 * 2**20, "mkldnn_rnn_layer_backward": 3 * 2**20,
}  # fmt: skip
WITH_DESCRIPTION = 1.1
"""Factor for the description of each kernel on the heap. A kernel has 256 KiB of addresses, few of them ever used."""


class Call(NamedTuple):
    """A call of an operator to be measured.

    Attributes:
        operator: the operator.
        args, kwargs: its arguments, whose tensors have shapes but no contents.
        kind: the kind by `kind_of`.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Any


class Kept(NamedTuple):
    """The memory that libraries keep.

    Attributes:
        code: bytes by kind of call.
        buffers: bytes, independent of the calls.
        assumed: why typical values are assumed for code; empty if it was measured.
    """

    code: Mapping[Any, int]
    buffers: int
    assumed: str


def uses(operator: Any) -> bool:
    """Return whether libraries may keep memory for an operator that the headroom does not cover."""
    name: str = operator._overloadpacket.__name__
    return name in _CONVOLUTIONS or name.startswith(_RECURRENT)


def kind_of(operator: Any, args: tuple[Any, ...], rows: int | None = None) -> Any:
    """Return a key of calls that share compiled code, independent of the batch; None for calls that need none.

    Torch convolves by oneDNN or by itself, depending on batch and threads: 1x1 convolutions, for instance, use oneDNN
    only from 16 rows.

    Args:
        operator: operator of the call.
        args: arguments of the call.
        rows: use only this many rows of its input; None for all.
    """
    name = operator._overloadpacket.__name__
    if (place := _CONVOLUTIONS.get(name)) is not None and len(args) > place:
        inputs, weight, how = args[place - 1], args[place], args[place + 2 : place + 8]
        if rows is not None:
            inputs = inputs[:rows]
        if inputs.device.type != "cpu" or len(how) < len(_HOW) or not _by_onednn(inputs, weight, how):
            return None
        return operator, inputs.dtype, tuple(inputs.shape[1:]), tuple(weight.shape), repr(how)
    if name.startswith(_RECURRENT):
        return operator, args[0].dtype, *(tuple(weight.shape) for weight in args[1:3])
    return None


def call_of(operator: Any, args: Any, kwargs: Any) -> Call:
    """Return a call on fake tensors, to be measured later, without references to them."""
    kind = kind_of(operator, args)
    with unset_fake_temporarily(), _disable_current_modes():
        args, kwargs = tree_map_only(Tensor, _without_contents, (args, kwargs))
    return Call(operator, args, kwargs, kind)


def code_bytes(kinds: Iterable[Any], known: Mapping[Any, int]) -> int:
    """Return the address space of the code of these kinds of calls; unknown ones count with typical values."""
    code = (known.get(kind, _USUAL.get(kind[0]._overloadpacket.__name__, 0)) for kind in kinds)
    return round(WITH_DESCRIPTION * sum(code))


def kept_of(calls: Iterable[Call]) -> Kept:
    """Measure the memory that libraries keep for a sequence of calls, in a new process.

    The result does not depend on what this process has run before; equal calls are measured only once.
    """
    calls = list(calls)
    request = [(call.operator.name(), call.args, call.kwargs) for call in calls]
    try:
        grown, buffers = _ask(pickle.dumps((torch.get_num_threads(), torch._C._get_mkldnn_enabled(), request)))
    except Exception as error:
        return Kept({}, 0, f"{type(error).__name__}: {error}"[:300])
    code: dict[Any, int] = {}
    for call, bytes_ in zip(calls, grown, strict=True):
        code[call.kind] = max(bytes_, code.get(call.kind, 0))  # over different batches
    return Kept(code, buffers, "")


def like(tensor: Tensor) -> Tensor:
    """Return a real tensor of the same shape and strides: ones, or zeros if it may be an index."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    fill = torch.ones if tensor.is_floating_point() or tensor.is_complex() else torch.zeros
    numbers: Tensor = fill(last + 1 if tensor.numel() else 0, dtype=tensor.dtype)
    return numbers.as_strided(tensor.shape, tensor.stride())


def executable_bytes() -> int:
    """Return the bytes of this process's executable memory that is not mapped from a file."""
    maps = _MAPS.read_text(encoding="utf-8")
    return sum(int(end, 16) - int(start, 16) for start, end in _ANONYMOUS.findall(maps))


def buffer_bytes() -> int:
    """Return the bytes of MKL's buffers, in which it packs the factors of larger products and which it keeps."""
    mkl = _mkl()
    return 0 if mkl is None else int(mkl.mkl_serv_mem_stat(ctypes.byref(ctypes.c_int())))


@cache
def _mkl() -> Any:
    """Return the library with torch's products; None if they are not MKL's, or it does not report its buffers."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.mkl_serv_mem_stat.restype = ctypes.c_longlong
    except (OSError, AttributeError):
        return None
    return library


def _by_onednn(inputs: Tensor, weight: Tensor, how: Iterable[Any]) -> bool:
    try:  # as torch itself does for fake tensors
        select: Any = torch._C._select_conv_backend
        name: str = select(inputs, weight, bias=None, **dict(zip(_HOW, how, strict=True))).name
    except (AttributeError, TypeError):
        return True
    # These names are torch's own backends; some of oneDNN's have no name.
    return not name.startswith(("Slow", "Winograd", "Nnpack", "Xnnpack")) and not name.endswith("Empty")


def _without_contents(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@lru_cache(maxsize=256)
def _ask(request: bytes) -> tuple[list[int], int]:
    if getattr(sys, "frozen", False) or not sys.executable or not _MAPS.exists():
        raise RuntimeError("this can only be measured on Linux, by a Python interpreter")
    command = [sys.executable, "-c", _START, __file__, *sys.path]
    done = subprocess.run(command, input=request, capture_output=True, timeout=_SECONDS, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(": ".join([f"the measuring process ended with exit code {done.returncode}", *last]))
    grown, buffers = json.loads(done.stdout.splitlines()[-1])
    return grown, buffers


def _answer(request: bytes) -> tuple[list[int], int]:
    """Return the growth of executable memory in each call, and MKL's buffers afterwards; needs a new process."""
    threads, enabled, calls = pickle.loads(request)
    torch.set_num_threads(threads)
    torch._C._set_mkldnn_enabled(enabled)
    grown = []
    for name, args, kwargs in calls:
        space, packet, *overload = re.split(r"::|\.", name)
        operator = getattr(getattr(getattr(torch.ops, space), packet), *overload or ["default"])
        args, kwargs = tree_map_only(Tensor, like, (args, kwargs))
        before = executable_bytes()
        with suppress(Exception):  # a call that fails compiles nothing
            operator(*args, **kwargs)
        grown.append(max(0, executable_bytes() - before))
    return grown, buffer_bytes()


if __name__ == "__main__":
    print(json.dumps(_answer(sys.stdin.buffer.read())))
