"""How much memory a round takes beyond what the plain Trainer does, as the operating system counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory

MILLIONS = 8  # a float64 vector of that length is so large that what else comes and goes hardly counts


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("shape", [[], ["--wide"]])
def test_a_sequential_round_holds_three_float64_vectors(shape: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the allocator keeps some of what was freed, another amount each time.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
    options = ["--parameters", str(MILLIONS), "--optimizer", "sgd", *shape]
    count, plain = memory.measured(memory.PLAIN, options)
    same_count, federated = memory.measured(memory.FEDERATED, options)
    assert count == same_count == pytest.approx(MILLIONS * 1e6, rel=0.01)
    # The global model, the accumulator and a client's delta; the parameters themselves both have.
    assert 2.5 < (federated - plain) / (8 * count) < 3.3
