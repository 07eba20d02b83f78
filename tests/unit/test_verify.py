"""Real steps in a child process with little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable

import pytest
import torch

from lightning_fedscale.devices.profiling.real_step import real_step
from lightning_fedscale.utils.memory import is_out_of_memory


def multiply(size: int) -> None:
    weights = torch.randn(size, size, requires_grad=True)
    (weights @ weights).sum().backward()


def test_a_step_that_fits() -> None:
    torch.set_num_threads(2)
    multiply(600)  # the parent's threads exist now, and the child has to do without them
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    done = real_step(lambda: multiply(600), 2**28)
    torch.set_num_threads(1)
    assert done.fits
    assert done.reason == ""
    assert done.peak_bytes is not None
    assert 0 <= done.peak_bytes < 2**26
    assert torch.equal(state, torch.get_rng_state())
    assert threads == 2


def test_a_step_that_does_not() -> None:
    done = real_step(lambda: multiply(5000), 2**28)
    assert (done.fits, done.out_of_memory, done.peak_bytes) == (False, True, None)
    assert "can't allocate memory" in done.reason
    assert real_step(lambda: multiply(100), 2**28).fits  # and this process goes on


def test_python_objects_count() -> None:
    assert real_step(lambda: bytearray(2**29), 2**28).out_of_memory


def test_its_own_error() -> None:
    def broken() -> None:
        raise KeyError("mine")

    done = real_step(broken, 2**28)
    assert (done.fits, done.out_of_memory) == (False, False)
    assert done.reason == "KeyError: 'mine'"


def test_one_that_hangs_is_killed() -> None:
    done = real_step(signal.pause, 2**28, timeout=0.3)
    assert (done.fits, done.out_of_memory) == (False, False)
    assert "killed after 0.3 s" in done.reason


def test_one_that_dies() -> None:
    done = real_step(lambda: os.kill(os.getpid(), signal.SIGTERM), 2**28)
    assert (done.fits, done.out_of_memory) == (False, False)
    assert "SIGTERM" in done.reason
    assert real_step(lambda: os.kill(os.getpid(), signal.SIGSEGV), 2**28).out_of_memory


def test_nothing_is_printed_and_nobody_is_left(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []
    fork = os.fork

    def noted() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", noted)
    real_step(lambda: print("from the child", flush=True), 2**28)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ChildProcessError):
        os.waitpid(children[0], os.WNOHANG)


def largest_that_fits(allocate: Callable[[int], object], budget: int) -> int:
    return bisect_left(range(1, 1000), True, key=lambda n: not real_step(lambda: allocate(n), budget).fits)


def test_a_budget_is_what_can_be_allocated() -> None:
    assert 100 <= largest_that_fits(lambda mebibytes: torch.ones(mebibytes, 2**18), 2**27) < 128


def small_blocks(count: int) -> list[torch.Tensor]:
    return [torch.ones(2**17) for _ in range(count)]  # 512 KiB each


def mebibytes_of_small_blocks(budget: int) -> float:
    return largest_that_fits(small_blocks, budget) / 2


def test_addresses_reserved_for_other_threads_do_not_help() -> None:
    """The C library gives every thread an arena, and the child of them all would use what these have reserved."""
    ready, done = threading.Barrier(5), threading.Event()

    def allocate() -> None:
        own = small_blocks(1)
        ready.wait()
        done.wait()
        own.clear()

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        assert 26 <= mebibytes_of_small_blocks(2**25) < 32
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_memory_freed_before_does_not_help() -> None:
    torch.ones(2**22)  # freed at once, which makes the C library keep smaller blocks when they are freed
    held = small_blocks(200)
    del held[::2]
    assert 26 <= mebibytes_of_small_blocks(2**25) < 32


def test_a_tighter_limit_of_the_process_itself_is_kept() -> None:
    program = (
        "import resource, torch\n"
        "from lightning_fedscale.devices.profiling.real_step import real_step\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        "done = real_step(lambda: None, 2**40)\n"
        "assert done.fits, done\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
