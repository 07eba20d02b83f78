"""Run a real training step in a child process with limited memory, so that out-of-memory is harmless."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_fedscale.utils.memory import is_out_of_memory

_STATUS = Path("/proc/self/status")
_LARGE = 2**16
_RESERVED = 2**28


class RealStep(NamedTuple):
    """The result of a real step.

    Attributes:
        fits: whether it finished.
        out_of_memory: whether it failed because memory ran out.
        peak_bytes: largest growth of the process's address space; None if it did not finish.
        seconds: its duration.
        reason: why it ended, if it did not finish.
    """

    fits: bool
    out_of_memory: bool
    peak_bytes: int | None
    seconds: float
    reason: str


def real_step(step: Callable[[], object], budget: int, *, timeout: float = 300.0) -> RealStep:
    """Run a step in a fork of this process with a limit on additional writable address space.

    Beyond the limit, allocations in the child fail, as on a machine with that much memory. This process does not
    change: its memory is copied when the child writes to it. Address space includes memory outside the model, such as
    the scratch memory of libraries. The child cannot use memory that this process has freed or reserved.

    Args:
        step: the step to run. Its result is dropped.
        budget: bytes.
        timeout: seconds after which the child is killed.

    Raises:
        RuntimeError: if this is impossible: without ``fork``, or once CUDA is in use, whose state a fork cannot share.

    Example:
        >>> real_step(lambda: torch.zeros(1000).sum(), budget=2**28).fits
        True
        >>> real_step(lambda: torch.zeros(2**28).sum(), budget=2**28).out_of_memory
        True
    """
    if not hasattr(os, "fork") or not _STATUS.exists():
        raise RuntimeError("verify=True: the memory of a process can only be limited on Linux: pass verify=False.")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("verify=True: a process that uses CUDA cannot be forked: pass verify=False.")
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(step, budget, writing)
    os.close(writing)
    started = time.perf_counter()
    answer = _read(reading, timeout)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer is None:
        return RealStep(False, False, None, time.perf_counter() - started, f"killed after {timeout:g} s")
    if not answer:
        killed = signal.Signals(status & 0x7F).name if status & 0x7F else f"exit code {status >> 8}"
        # Libraries that do not check their allocations crash when these fail.
        gone = killed in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGKILL")
        return RealStep(False, gone, None, time.perf_counter() - started, f"the child ended with {killed}")
    return RealStep(*pickle.loads(answer))


def real_step_on_cuda(step: Callable[[], object], device: torch.device) -> RealStep:
    """Run a step in this process and measure its additional memory on a CUDA device.

    Args:
        step: the step to run.
        device: device of the step.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    reason = ""
    try:
        step()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error)  # keep the text only, since the error's frames keep memory alive
    seconds = time.perf_counter() - started
    # The allocator takes blocks that it does not fill, so the reserved bytes are what the device lacks.
    taken = max(torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved)
    torch.cuda.empty_cache()
    return RealStep(not reason, bool(reason), None if reason else taken, seconds, reason)


def _be_the_child(step: Callable[[], object], budget: int, writing: int) -> None:
    """Run the step in the child and exit, without the parent's exit handlers."""
    answer: tuple[Any, ...]
    started = time.perf_counter()
    try:
        torch.set_num_threads(1)  # the child does not have the parent's worker threads
        _silence()
        _take_memory_from_the_system()
        before = _status("VmSize")
        # glibc reserves addresses for every thread, 64 MiB at a time, and falls back on them in the end. The budget
        # therefore limits writable addresses. The limit on all addresses is higher, since Linux checks memory that
        # becomes writable only while that limit is not reached.
        _limit(resource.RLIMIT_DATA, _status("VmData") + budget)
        _limit(resource.RLIMIT_AS, before + budget + _RESERVED)
        step()
        answer = True, False, min(budget, _status("VmPeak") - before), time.perf_counter() - started, ""
    except BaseException as error:
        gone = is_out_of_memory(error)
        answer = False, gone, None, time.perf_counter() - started, f"{type(error).__name__}: {error}"[:2000]
    try:
        os.write(writing, pickle.dumps(answer))
    finally:
        os._exit(0)


def _take_memory_from_the_system() -> None:
    """Give blocks of 64 KiB and more their own pages, so that fragments and previously freed blocks do not count."""
    with suppress(AttributeError, OSError):  # raised with another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, _LARGE)  # M_MMAP_THRESHOLD
        libc.malloc.restype = ctypes.c_void_p
        # Free blocks of this size are used first, whatever the threshold, so allocate them until there are none left.
        while (block := libc.malloc(_LARGE)) and not _has_own_pages(block):
            pass


def _has_own_pages(block: int) -> bool:
    header = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    return bool(header & 2)  # IS_MMAPPED


def _limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))


def _silence() -> None:
    faulthandler.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout = sys.stderr = os.fdopen(null, "w")  # they may differ from 1 and 2, as in notebooks


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def _read(reading: int, timeout: float) -> bytes | None:
    """Read until the other end closes; return None if that takes too long."""
    parts: list[bytes] = []
    until = time.monotonic() + timeout
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            if not (part := pipe.read(65536)):
                return b"".join(parts)
            parts.append(part)
