"""What libraries keep of a step as long as the process lives: oneDNN the code that it compiles, MKL its buffers."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ..x. \S+ 00:00 0 *$", re.MULTILINE)

# Where the weight is among the arguments; the input is before it, how to convolve after it and the bias.
_CONVOLUTIONS = {"convolution": 1, "convolution_backward": 2}
_HOW = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")

# For convolutions whose code was compiled before anybody could see how much it is: the mean over the zoo.
_USUAL = {"convolution": 2**20, "convolution_backward": 3 * 2**19}
WITH_DESCRIPTION = 1.1
"""Each kernel has 256 KiB of addresses of its own, few of them ever touched, and is described on the heap."""

_learned: dict[Any, int] = {}


def kind_of(operator: Any, args: tuple[Any, ...]) -> Any:
    """What tells apart the calls that need code of their own, whatever their batch; None for calls that need none.

    Torch convolves by oneDNN or by itself, as batch and threads decide: one by one, for instance, only from 16 samples.
    """
    name = operator._overloadpacket.__name__
    if (place := _CONVOLUTIONS.get(name)) is not None and len(args) > place:
        inputs, weight, how = args[place - 1], args[place], args[place + 2 : place + 8]
        if inputs.device.type != "cpu" or len(how) < len(_HOW) or not _by_onednn(inputs, weight, how):
            return None
        return operator, inputs.dtype, tuple(inputs.shape[1:]), tuple(weight.shape), repr(how)
    if name.startswith("mkldnn_rnn_layer"):
        return operator, args[0].dtype, *(tuple(weight.shape) for weight in args[1:3])
    return None


def learn(kind: Any, grown: int) -> None:
    """Remember by how much executable memory has grown in a first call of a kind: later ones find the code there."""
    _learned[kind] = max(grown, _learned.get(kind, 0))


def code_bytes(kinds: Iterable[Any]) -> int:
    """Address space that the code of so many different calls takes."""
    code = (_learned.get(kind) or _USUAL.get(kind[0]._overloadpacket.__name__, 0) for kind in kinds)
    return round(WITH_DESCRIPTION * sum(code))


def executable_bytes() -> int:
    """Bytes of memory of this process that may be executed and came from no file; 0 where that cannot be read."""
    try:
        maps = _MAPS.read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(end, 16) - int(start, 16) for start, end in _ANONYMOUS.findall(maps))


def free_buffers() -> None:
    """Have MKL give back the buffers that nobody uses at the moment."""
    if (mkl := _mkl()) is not None:
        mkl.mkl_serv_free_buffers()


def buffer_bytes() -> int:
    """What MKL holds: buffers in which it packs the factors of larger products, which it keeps for the next ones."""
    mkl = _mkl()
    return 0 if mkl is None else int(mkl.mkl_serv_mem_stat(ctypes.byref(ctypes.c_int())))


@cache
def _mkl() -> Any:
    """The library with torch's products; None where they are not MKL's, or it does not say what it holds."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.mkl_serv_mem_stat.restype = ctypes.c_longlong
        library.mkl_serv_free_buffers.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, how: Iterable[Any]) -> bool:
    try:  # as torch itself asks for fake tensors
        select: Any = torch._C._select_conv_backend
        name: str = select(inputs, weight, bias=None, **dict(zip(_HOW, how, strict=True))).name
    except (AttributeError, TypeError):
        return True
    # Torch's own; some of oneDNN's have no name.
    return not name.startswith(("Slow", "Winograd", "Nnpack", "Xnnpack")) and not name.endswith("Empty")
