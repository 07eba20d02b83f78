"""Buffers of every kind: averaged by samples, in their own type, from the global model in every client."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.features import local_loops, reference_loop
from tests.features.local_loops import Model, check


class Norm(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_batch_norm_statistics_are_averaged_by_samples_and_counters_stay_whole() -> None:
    before, after, trainer = check(Norm)
    assert after["net.1.num_batches_tracked"].dtype == torch.int64
    assert int(after["net.1.num_batches_tracked"]) > 0
    assert not torch.equal(before["net.1.running_var"], after["net.1.running_var"])
    floats = sum(value.numel() for value in before.values() if value.is_floating_point())
    assert trainer.strategy.last_round.upload_bytes == 2 * (4 * floats + 8)  # type: ignore[attr-defined]


class Buffers(Model):
    """Counters, flags, a constant beyond float64's integers, and a value that is not in the state dict."""

    seen: Tensor
    histogram: Tensor
    flags: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int32))
        self.register_buffer("histogram", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("flags", torch.tensor([True, False, False]))
        self.register_buffer("key", torch.tensor([2**60 + 1, -(2**62) - 3]))
        self.register_buffer("small", torch.tensor([7], dtype=torch.uint8))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def extra(self, batch: list[Tensor]) -> float:
        self.seen += len(batch[0])
        self.histogram += torch.bincount(batch[1], minlength=4)
        self.flags[1] = len(batch[0]) >= 8
        self.flags[2] |= bool((batch[1] == 3).any())
        self.hidden += 1.0
        return 0.0


def test_integer_and_boolean_buffers() -> None:
    before, after, trainer = check(Buffers)
    assert torch.equal(before["key"], after["key"])
    assert int(after["small"]) == 7
    assert bool(after["flags"][0])
    assert int(after["seen"]) > 0
    # Two clients a round with n_k samples in b_k batches: the mean of b_k, weighted by n_k, is added every round.
    sizes, batches = reference_loop.SIZES, (1, 1, 2, 3)
    expected = 0.0
    for round in range(4):
        cohort = reference_loop.cohort(round, reference_loop.partition(), 2)
        expected += sum(sizes[c] * batches[c] for c in cohort) / sum(sizes[c] for c in cohort)
    assert float(trainer.lightning_module.hidden) == pytest.approx(expected)  # type: ignore[arg-type]


class Replaced(Model):
    """A moving average kept by assignment, which puts another tensor in the buffer's place."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(12))

    def extra(self, batch: list[Tensor]) -> float:
        self.average = 0.5 * self.average + 0.5 * batch[0].mean(0)
        return 0.0


def test_a_buffer_that_is_assigned_anew_is_exchanged() -> None:
    before, after, _ = check(Replaced)
    assert not torch.equal(before["average"], after["average"])


class Infinite(Model):
    """A causal mask, a running minimum that starts at infinity, and a value still to be calibrated."""

    lowest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("lowest", torch.full((12,), float("inf")))
        self.register_buffer("unset", torch.tensor(float("nan")))

    def extra(self, batch: list[Tensor]) -> float:
        self.lowest.copy_(torch.minimum(self.lowest, batch[0].min(0).values))
        return 0.0


def test_buffers_that_are_not_finite() -> None:
    module = local_loops.make(Infinite)
    mask = module.mask.clone()
    trainer = local_loops.fit(module, 1)
    assert torch.equal(module.mask, mask)
    assert module.unset.isnan()
    assert trainer.strategy.last_round.rejected == ()  # type: ignore[attr-defined]
    data, clients = reference_loop.data().tensors[0], reference_loop.partition()
    lowest = [data[torch.tensor(clients.client(c))].min(0).values.double() for c in range(4)]
    expected = sum(size * low for size, low in zip(reference_loop.SIZES, lowest, strict=True)) / 45
    assert torch.allclose(module.lowest.double(), expected, atol=1e-6)  # type: ignore[arg-type]


class SpoiltBuffer(Model):
    """In client 2 a buffer that was finite is so no more."""

    client = -1
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mask", torch.tensor(float("-inf")))

    def extra(self, batch: list[Tensor]) -> float:
        if self.client == 2:
            self.scale /= 0
        return 0.0


def test_a_spoilt_buffer_leaves_the_client_out() -> None:
    module = local_loops.make(SpoiltBuffer)
    with pytest.warns(UserWarning, match=r"left out 1 client\(s\)"):
        trainer = local_loops.fit(module, 2, callbacks=[local_loops.Clients()])
    assert trainer.strategy.last_round.rejected == (2,)  # type: ignore[attr-defined]
    assert float(module.scale) == 1.0
    assert float(module.mask) == float("-inf")
