"""How much memory a round takes beyond what the plain Trainer does, as the operating system counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory
from tests import pythons

MILLIONS = 6  # a float64 vector of that length is so large that what else comes and goes hardly counts
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
def test_a_sequential_round_holds_three_float64_vectors(shape: list[str]) -> None:
    (count, plain), (same_count, federated) = (measured(each, *shape) for each in (memory.PLAIN, memory.FEDERATED))
    assert count == same_count == pytest.approx(MILLIONS * 1e6, rel=0.01)
    # The global model, the accumulator and a client's delta; the parameters themselves both have.
    assert 2.5 < (federated - plain) / (8 * count) < 3.3
