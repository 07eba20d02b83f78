"""How much memory a round takes beyond what the plain Trainer does, as the operating system counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory
from tests import pythons

MILLIONS = 6  # so many that what else comes and goes hardly counts
# Else the allocator keeps some of what was freed, another amount each time. M_MMAP_THRESHOLD is -3.
PEAK = """
import ctypes
from benchmarks import memory

ctypes.CDLL(None).mallopt(-3, 2**17)
memory.main()
"""


def measured(contender: str, *options: str) -> tuple[int, int]:
    """The number of parameters, and the peak memory of a process that trains them."""
    command = "-c", PEAK, "--parameters", MILLIONS, "--optimizer", "sgd", *options, "--contender", contender
    done = pythons.run(*command, folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    count, peak = done.stdout.split()[-2:]
    return int(count), int(peak)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("shape", [[], ["--wide"]])
def test_a_sequential_round_takes_twelve_bytes_a_parameter(shape: list[str]) -> None:
    (count, plain), (same_count, federated) = (measured(each, *shape) for each in (memory.PLAIN, memory.FEDERATED))
    assert count == same_count == pytest.approx(MILLIONS * 1e6, rel=0.01)
    # The global model in float32 and the sum over clients in float64, and some megabytes for what is computed in parts.
    assert 11 < (federated - plain) / count < 15
