"""Free memory of the host and of devices, and amounts of memory as text."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROC = Path("/proc")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Return the free bytes on ``device``; for a CPU those of the host, within the limits of its control groups.

    Example:
        >>> import torch
        >>> free_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        import torch  # only when needed: amounts of memory as text, which `fedscale plan` writes, do without

        free: int = torch.cuda.mem_get_info(device)[0]
        # torch's allocator holds memory that it does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([_free_on_host(), *_left_by_control_groups()]))


def _free_on_host() -> int:
    # MemAvailable is what programs get without swapping: free pages, and caches that would be released for them.
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(_PROC / "meminfo"))
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_control_groups() -> Iterator[int]:
    """Yield the bytes that containers and batch systems still allow this process, by control groups version 1 and 2."""
    for _, controllers, path in re.findall(r"^(\d+):(.*?):(.*)$", _read(_PROC / "self" / "cgroup"), re.M):
        if controllers == "":
            names = "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        root = _CONTROL_GROUPS / controllers
        own = root / path.lstrip("/")
        # Limits are inherited. Inside a container the path may be the host's, of which only the root exists here.
        for folder in {root, own, *own.parents} - {*root.parents}:
            limit, used = _read(folder / names[0]).strip(), _read(folder / names[1]).strip()
            if limit.isdigit() and used.isdigit():
                cache = re.search(rf"^{names[2]} (\d+)$", _read(folder / "memory.stat"), re.M)
                yield int(limit) - int(used) + (int(cache[1]) if cache else 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# Messages of torch's allocators, and of the libraries below torch when they get no memory.
_SIGNS = (
    "can't allocate memory", "not enough memory", "out of memory", "could not create a memory",
    "could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # as Lightning has it, since cuDNN says so for lack of workspace
    "GET was unable to find an engine",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory ran out, on any device.

    Example:
        >>> is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), is_out_of_memory(KeyError())
        (True, False)
    """
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_bytes(name: str, value: int | str) -> int | None:
    """Return the number of bytes of an argument ``name``; None for "auto".

    Raises:
        ValueError: if it is neither a number nor an amount of memory; names the argument.

    Example:
        >>> parse_bytes("budget", "1.5GiB"), parse_bytes("budget", 1000), parse_bytes("budget", "auto")
        (1610612736, 1000, None)
    """
    if value == "auto":
        return None
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[kKMGT]i?)?B)?\s*", value)):
        return int(float(match[1]) * _UNITS[(match[2] or "").replace("k", "K")])
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name}={value!r}: pass a number of bytes, a string such as '4GiB' or '500MB', or 'auto'.")
    return int(value)


def format_bytes(amount: float) -> str:
    """Format an amount of memory for humans.

    Example:
        >>> format_bytes(3 * 1024**3), format_bytes(2600), format_bytes(12)
        ('3.00 GiB', '2.54 KiB', '12 B')
    """
    if abs(amount) < 1024:
        return f"{amount:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if abs(amount) < 1024:
            return f"{amount:.2f} {unit}"
    return f"{amount / 1024:.2f} TiB"
