"""Compressors that remember: error feedback, the choice by gain, the choice by phase."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.compressors import (
    Compressor,
    adaptive,
    error_feedback,
    identity,
    phase_driven,
    power_sgd,
    qsgd,
    random_k,
    sign,
    top_k,
    uniform_quantization,
)

RULES = [
    top_k(0.1),
    random_k(0.3, unbiased=False),
    sign(),
    sign(per_tensor=True),
    power_sgd(1),
    uniform_quantization(256)._replace(contractive=True),
    qsgd(1000)._replace(contractive=True),
    adaptive(lowest=2, window=3),
    phase_driven(SimpleNamespace(critical=False), critical=identity(), otherwise=top_k(0.1)),
]


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": scale * torch.randn(12, 9, dtype=torch.float64, generator=generator),
        "bias": scale * torch.randn(7, dtype=torch.float64, generator=generator),
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.1, 1.0, 10.0])), min_size=1, max_size=8))
def test_error_feedback_loses_nothing(rule: Compressor, updates: list[tuple[int, float]]) -> None:
    rule = error_feedback(rule)
    state: Any = rule.init(update(0))
    generator = np.random.default_rng(0)
    sent, wanted = {name: 0.0 * value for name, value in update(0).items()}, update(0, scale=0.0)
    for seed, scale in updates:
        delta = update(seed, scale)
        encoded, state = rule.encode(delta, state, generator)
        for name in delta:
            sent[name] += encoded.seen[name]
            wanted[name] += delta[name]
    for name, value in wanted.items():
        assert (sent[name] + state["error"][name]).numpy() == pytest.approx(value.numpy(), rel=0, abs=1e-10)


@pytest.mark.parametrize("rule", [top_k(0.1), sign(), power_sgd(1), random_k(0.1, unbiased=False)])
def test_with_feedback_everything_arrives_in_the_end(rule: Compressor) -> None:
    def arrived(rule: Compressor) -> float:
        delta, state, generator = update(5), rule.init(update(5)), np.random.default_rng(0)
        total = torch.zeros_like(delta["matrix"])
        for _ in range(400):
            encoded, state = rule.encode(delta, state, generator)
            total += encoded.seen["matrix"]
        return float((total / 400 - delta["matrix"]).norm() / delta["matrix"].norm())

    assert arrived(error_feedback(rule)) < 0.08
    assert arrived(rule) > 0.4


def test_feedback_of_unbiased_noise_would_explode() -> None:
    """Why it is refused: after some messages the residual is many times as long as an update."""
    rule = error_feedback(random_k(0.1)._replace(contractive=True))
    state: Any = rule.init(update(0))
    generator = np.random.default_rng(0)
    for seed in range(20):
        _, state = rule.encode(update(seed), state, generator)
    assert state["error"]["matrix"].norm() > 1e6


# ---- by gain


def factor_of(payload: bytes) -> float:
    return struct.unpack("<f", payload[:4])[0]


class GraVAC:
    """The rule once more, with lists of everything that was seen in the window."""

    def __init__(self, threshold: float, lowest: float, highest: float, growth: float, window: int, smoothing: float):
        self.threshold, self.highest, self.growth, self.window = threshold, highest, growth, window
        self.smoothing, self.low, self.high = smoothing, lowest, min(growth * lowest, highest)
        self.seen: list[tuple[float, float, float]] = []

    def __call__(self, values: Any) -> float:
        squares = np.sort(np.square(values.astype(np.float32).astype(np.float64)))[::-1]
        kept = [squares[: max(1, round(len(squares) / factor))].sum() for factor in (self.low, self.high)]
        self.seen.append((np.square(values).sum(), *kept))
        weights = [(1 - self.smoothing) ** age for age in range(len(self.seen))][::-1]
        whole, low, high = (np.average(column, weights=weights) for column in zip(*self.seen, strict=True))
        used = self.high if high / whole >= self.threshold else self.low if low / whole >= self.threshold else 1.0
        if len(self.seen) == self.window:
            if abs(low - high) <= 0.01 * low:
                self.low = self.high
            self.high = min(self.highest, self.growth * (self.high if high / whole >= self.threshold else self.low))
            self.seen = []
        return used


def heavy(power: float) -> Callable[[np.random.Generator], Any]:
    """Updates whose magnitudes fall off as a power: the larger it is, the more can be compressed."""
    return lambda generator: generator.permutation(np.arange(1.0, 1001.0) ** -power) * generator.choice([-1, 1], 1000)


@pytest.mark.parametrize("power", [0.0, 0.5, 0.8, 1.5, 3.0])
def test_adaptive_follows_the_rule(power: float) -> None:
    options = {"threshold": 0.7, "lowest": 4.0, "highest": 512.0, "growth": 2.0, "window": 5, "smoothing": 0.25}
    rule, reference = adaptive(**options), GraVAC(**options)  # type: ignore[arg-type]
    state: Any = rule.init({"w": torch.zeros(1000)})
    generator, used = np.random.default_rng(0), []
    for message in range(140):
        values = heavy(power if message < 40 else generator.uniform(0.2, 1.2))(generator)
        encoded, state = rule.encode({"w": torch.from_numpy(values)}, state, generator)
        used.append(factor_of(encoded.payload()))
        assert used[-1] == reference(values), message
    expected = {0.0: 1.0, 3.0: 512.0}  # all alike: never compressed; one element is nearly all: as far as it goes
    if power in expected:
        assert used[39] == expected[power]


def test_adaptive_sends_less_where_little_is_lost() -> None:
    bits = []
    for power in (0.0, 1.0, 3.0):
        rule = error_feedback(adaptive(window=3))
        state: Any = rule.init({"w": torch.zeros(1000)})
        generator, total = np.random.default_rng(0), 0
        for _ in range(30):
            encoded, state = rule.encode({"w": torch.from_numpy(heavy(power)(generator))}, state, generator)
            total += encoded.bits
        bits.append(total)
    assert bits[0] == 30 * (32 * 1000 + 32)
    assert bits[0] > 2 * bits[1] > 4 * bits[2]


def test_uncompressed_updates_clear_the_residual() -> None:
    rule, values = error_feedback(adaptive()), np.random.default_rng(0).standard_normal(1000)
    state: Any = rule.init({"w": torch.zeros(1000)})
    encoded, state = rule.encode({"w": torch.from_numpy(values)}, state, np.random.default_rng(0))
    assert factor_of(encoded.payload()) == 1
    assert state["error"]["w"].abs().max() < 1e-6


# ---- by phase


def test_phase_is_looked_at_in_every_message() -> None:
    phase = SimpleNamespace(critical=True)
    rule = error_feedback(phase_driven(phase, critical=top_k(k=20), otherwise=top_k(k=2)))
    state: Any = rule.init(update(0))
    counts = []
    for message, phase.critical in enumerate([True, False, False, True]):
        encoded, state = rule.encode(update(message), state, np.random.default_rng(0))
        counts.append(sum(int(value.count_nonzero()) for value in encoded.seen.values()))
    assert counts == [20, 2, 2, 20]


def test_messages_of_both_phases_are_read_in_either() -> None:
    phase, delta = SimpleNamespace(critical=True), update(0)
    rule = phase_driven(phase, critical=top_k(0.5), otherwise=sign())
    first, _ = rule.encode(delta, None, np.random.default_rng(0))
    phase.critical = False
    second, _ = rule.encode(delta, None, np.random.default_rng(0))
    for encoded in (first, second):
        decoded = rule.decode(encoded.payload(), delta)
        assert all(torch.equal(decoded[name], encoded.seen[name]) for name in delta)


def test_state_of_the_other_phase_waits() -> None:
    phase = SimpleNamespace(critical=True)
    rule = phase_driven(phase, critical=power_sgd(2), otherwise=power_sgd(1))
    first = rule.init(update(0))
    _, second = rule.encode(update(0), first, np.random.default_rng(0))
    phase.critical = False
    _, third = rule.encode(update(1), second, np.random.default_rng(0))
    assert second[1] is first[1]
    assert third[0] is second[0]
    assert not torch.equal(third[1]["matrix"], first[1]["matrix"])


def test_critical_phase_callback_fits() -> None:
    rule = phase_driven(CriticalPhase(), critical=top_k(k=50), otherwise=top_k(k=1))
    encoded, _ = rule.encode(update(0), None, np.random.default_rng(0))
    assert encoded.payload()[0] == 0  # before anything was observed, training is in a critical phase
