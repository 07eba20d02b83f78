"""Real steps in a child process with little memory."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from lightning_fedscale.devices.verify import is_out_of_memory, real_step, true_max_batch


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
    done = real_step(lambda: time.sleep(60), 2**28, timeout=0.3)
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
    children, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    real_step(lambda: print("from the child", flush=True), 2**28)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ChildProcessError):
        os.waitpid(children[0], os.WNOHANG)


def test_truth_by_bisection() -> None:
    mebibytes = true_max_batch(lambda n: lambda: torch.ones(n, 2**18), 2**27, 1, 1000)
    assert 100 <= mebibytes <= 160  # what this process has freed before is used as well


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
