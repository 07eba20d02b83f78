"""DP-FedAvg: noise as deep as it says, clipping that follows the quantile, epsilon as others compute it."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp

from lightning_fedscale.privacy import AdaptiveClipping, Privacy, dp_fed_avg
from lightning_fedscale.privacy.accounting import _loss_distribution, epsilon, noise_multiplier
from lightning_fedscale.types import ClientUpdate, Cohort


def cohort(clients: int, length: int = 1) -> Cohort:
    return Cohort(0, np.arange(clients), 1000, length, 0)


def spent(history: list[tuple[float, float, int]], delta: float, orders: range) -> tuple[float, int]:
    """Epsilon and its order by the sampled Gaussian mechanism's Renyi divergence, as a sum over binomials."""
    found = []
    for order in orders:
        i = np.arange(order + 1)
        total = 0.0
        for q, z, rounds in history:
            if q == 1:
                total += rounds * order / (2 * z**2)
                continue
            binomials = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
            terms = binomials + (order - i) * math.log1p(-q) + i * math.log(q) + (i**2 - i) / (2 * z**2)
            total += rounds * float(logsumexp(terms)) / (order - 1)
        value = total - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)
        found.append((value, order))
    return min(found)


@pytest.mark.parametrize(
    ("history", "orders", "expected"),
    [
        ([(1e-5, 1.0, 10), (1e-4, 3.0, 4)], range(2, 33), (0.3363, 23)),
        ([(0.01, 1.0, 1000)], range(2, 129), (2.1078, 8)),
        ([(1.0, 10.0, 100)], range(2, 129), (4.7527, 5)),
    ],
)
def test_published_values_of_renyi_accounting(
    history: list[tuple[float, float, int]], orders: range, expected: tuple[float, int]
) -> None:
    value, order = spent(history, 1e-5, orders)
    assert (round(value, 4), order) == expected
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant

    ledger = RdpAccountant(list(orders))
    for q, z, rounds in history:
        ledger.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), rounds)
    assert ledger.get_epsilon(1e-5) == pytest.approx(value, rel=1e-6)


# q, noise multiplier, rounds, delta; opacus 1.6.0's RDPAccountant and PRVAccountant (eps_error 0.01).
OPACUS = [
    (0.01, 1.0, 1000, 1e-5, 2.1013652716430564, 1.838371637017295),
    (1.0, 10.0, 100, 1e-5, 4.728507067217623, 4.3874132887923745),
    (0.1, 1.2, 200, 1e-5, 7.944717221402476, 7.223192930814446),
    (0.05, 0.8, 100, 1e-6, 7.662755802358299, 6.741051943878478),
    (0.02, 2.0, 5000, 1e-6, 3.8726237058080244, 3.619376931616419),
]


@pytest.mark.parametrize(("q", "z", "rounds", "delta", "renyi", "tight"), OPACUS)
def test_epsilon_agrees_with_opacus(q: float, z: float, rounds: int, delta: float, renyi: float, tight: float) -> None:
    pytest.importorskip("dp_accounting")
    assert epsilon("rdp", z, rounds, q, delta) == pytest.approx(renyi, rel=0.01)
    assert epsilon("pld", z, rounds, q, delta) == pytest.approx(tight, rel=0.01)
    # With whole orders only, Renyi's epsilon is a bound that is some percent higher at most.
    bound, _ = spent([(q, z, rounds)], delta, range(2, 257))
    assert 0.96 * bound < epsilon("rdp", z, rounds, q, delta) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_target_epsilon_finds_the_least_noise(accountant: Any) -> None:
    pytest.importorskip("dp_accounting")
    private = dp_fed_avg(1.0, delta=1e-5, target_epsilon=0.5, rounds=100, accountant=accountant).calibrated(0.1, 20)
    assert private.noise_multiplier is not None
    assert private.epsilon(100, 0.1) <= 0.5 < epsilon(accountant, private.noise_multiplier * 0.998, 100, 0.1, 1e-5)


def test_target_epsilon_that_little_noise_reaches() -> None:
    pytest.importorskip("dp_accounting")
    least = noise_multiplier("rdp", target_epsilon=50.0, rounds=10, q=0.2, delta=1e-5)
    assert epsilon("rdp", least, 10, 0.2, 1e-5) <= 50 < epsilon("rdp", least * 0.998, 10, 0.2, 1e-5)


def test_a_budget_ends_training_before_it_is_exceeded() -> None:
    pytest.importorskip("dp_accounting")
    private = dp_fed_avg(1.0, 1.0, delta=1e-5, accountant="rdp", max_epsilon=3.0).calibrated(0.1, 10)
    rounds = 0
    while private.affordable(rounds, 0.1):
        rounds += 1
    assert 1 < rounds < 200
    assert private.epsilon(rounds, 0.1) <= 3.0 < private.epsilon(rounds + 1, 0.1)
    assert not private.affordable(0, 0.1, max_epsilon=1e-3)
    assert dp_fed_avg(1.0, 1.0, delta=1e-5).affordable(10**9, 1.0)  # no budget, nothing to compute


def test_no_rounds_cost_nothing_and_no_noise_everything() -> None:
    assert epsilon("pld", 1.0, 0, 0.1, 1e-5) == 0
    assert epsilon("pld", 0.0, 1, 0.1, 1e-5) == math.inf


@pytest.mark.parametrize("z", [0.6, 0.35])
def test_a_coarser_grid_for_little_noise_stays_above_the_fine_one_and_close_to_it(z: float) -> None:
    losses = _loss_distribution(z, 0.05)
    fine = privacy_loss_distribution.from_gaussian_mechanism(z, sampling_prob=0.05, use_connect_dots=True)
    truth = fine.self_compose(10).get_epsilon_for_delta(1e-5)
    assert truth <= losses.self_compose(10).get_epsilon_for_delta(1e-5) <= truth * (1 + 1e-6)


@pytest.mark.parametrize("z", [1.0, 0.3, 0.05, 0.01])
def test_the_grid_does_not_grow_as_noise_gets_less(z: float) -> None:
    assert _loss_distribution(z, 0.05)._pmf_remove.size < 300_000


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(
        ImportError,
        match=r"the package dp-accounting is not installed: pip .*'lightning-fedscale\[privacy",
    ):
        epsilon("rdp", 1.0, 7, 0.123, 1e-5)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 4.0), st.integers(1, 6))
def test_without_noise_it_is_the_clipped_sum_over_a_fixed_denominator(seed: int, longest: float, clients: int) -> None:
    private = dp_fed_avg(longest, 0.0, delta=1e-5, weight_cap=20)
    rows, held = np.random.default_rng(seed).normal(size=(clients, 3)), [5 * (1 + i) for i in range(clients)]
    state, total, within = private.init(), torch.zeros(3, dtype=torch.float64), 0
    for row, size in zip(rows, held, strict=True):
        delta = torch.from_numpy(row.copy())
        within += private.clip(delta, state)
        weight = private.weigh(ClientUpdate(0, delta, 0.0, size, 0, 0, 0.0, 0.0))
        assert weight == min(size / 20, 1)
        total += weight * delta
    mean, state = private.finish(total, within, state, cohort(clients, 3), 2.5, np.random.default_rng(0))
    norms = np.linalg.norm(rows, axis=1)
    shortened = rows * np.minimum(1, longest / norms)[:, None]
    expected = (np.minimum(np.array(held) / 20, 1)[:, None] * shortened).sum(0) / 2.5
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-14)
    assert within == (norms <= longest).sum()
    assert state == {"clip_norm": longest, "rounds": 1}


@pytest.mark.parametrize("noise", ["server", "client"])
@pytest.mark.parametrize("adaptive", [None, AdaptiveClipping()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("clients", [100, 3, 0])
def test_noise_has_its_standard_deviation(noise: Any, adaptive: AdaptiveClipping | None, clients: int) -> None:
    length, z, longest, expected = 40_000, 1.5, 0.5, 50.0
    private = dp_fed_avg(longest, z, delta=1e-5, noise=noise, adaptive=adaptive)
    total = torch.zeros(length, dtype=torch.float64)
    mean, _ = private.finish(
        total, 0, private.init(), cohort(clients, length), expected, np.random.default_rng(clients)
    )
    multiplier = z if adaptive is None else (z**-2 - (2 * expected / 20) ** -2) ** -0.5
    std = multiplier * longest / expected
    assert mean.std() == pytest.approx(std, rel=0.02)  # more than five standard errors
    assert abs(mean.mean()) < 6 * std / length**0.5


def run_adaptive(private: Privacy, norms: np.ndarray[Any, Any], rounds: int, seed: int) -> float:
    generator, state = np.random.default_rng(seed), private.init()
    late = []
    for number in range(rounds):
        drawn = generator.choice(norms, size=100)
        within = float((drawn <= state["clip_norm"]).sum())
        _, state = private.finish(torch.zeros(1, dtype=torch.float64), within, state, cohort(100), 100.0, generator)
        if number >= rounds // 2:
            late.append(state["clip_norm"])
    return float(np.mean(late))


@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_adaptive_clipping_converges_to_the_quantile(quantile: float, start: float) -> None:
    norms = np.random.default_rng(0).lognormal(0.3, 0.6, 1000)
    private = dp_fed_avg(start, 1.0, delta=1e-5, adaptive=AdaptiveClipping(quantile))
    assert run_adaptive(private, norms, 300, seed=1) == pytest.approx(np.quantile(norms, quantile), rel=0.05)


def test_one_step_of_adaptive_clipping_is_the_papers() -> None:
    private = dp_fed_avg(2.0, 0.0, delta=1e-5, adaptive=AdaptiveClipping(0.5, 0.2, count_noise=1e-12))
    for within, clients in [(7, 10), (0, 10), (10, 10)]:
        _, state = private.finish(
            torch.zeros(1, dtype=torch.float64), within, private.init(), cohort(clients), 10.0, np.random.default_rng(0)
        )
        assert state["clip_norm"] == pytest.approx(2.0 * math.exp(-0.2 * (within / 10 - 0.5)), rel=1e-9)


def test_state_is_primitives() -> None:
    private = dp_fed_avg(2.0, 1.0, delta=1e-5, adaptive=AdaptiveClipping())
    total = torch.zeros(1, dtype=torch.float64)
    _, state = private.finish(total, 50, private.init(), cohort(100), 100.0, np.random.default_rng(0))
    assert {type(value) for value in state.values()} == {float, int}


def test_adaptive_clipping_needs_clients() -> None:
    private = dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=AdaptiveClipping())
    with pytest.raises(ValueError, match=r"adaptive: with count_noise=0.5 .*at least 11 clients per round"):
        private.calibrated(0.1, clients=10)
    assert private.calibrated(0.1, clients=11) == private


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_norm": 0}, ValueError, "clip_norm=0: pass a finite number above 0"),
        ({"clip_norm": "1"}, TypeError, "clip_norm='1': pass a finite number above 0"),
        ({"delta": "1e-5"}, TypeError, "delta='1e-5': pass a probability"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier='1': pass a number of at least 0"),
        ({"delta": 1}, ValueError, r"delta=1: pass a probability in \(0, 1\)"),
        ({"noise_multiplier": None}, ValueError, "noise_multiplier=None and target_epsilon=None: pass exactly one"),
        ({"target_epsilon": 2.0, "rounds": 3}, ValueError, "pass exactly one of them"),
        ({"noise_multiplier": None, "target_epsilon": 2.0}, ValueError, "rounds=None: pass both"),
        ({"rounds": 5}, ValueError, "target_epsilon=None and rounds=5: pass both"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier=-1.0: pass a number of at least 0"),
        ({"max_epsilon": 0.0}, ValueError, "max_epsilon=0.0: pass a finite number above 0"),
        ({"adaptive": True}, TypeError, "adaptive=True: pass privacy.AdaptiveClipping"),
        ({"adaptive": AdaptiveClipping(1.5)}, ValueError, "quantile=1.5: pass a share"),
        ({"adaptive": AdaptiveClipping(), "weight_cap": 9}, ValueError, "weight_cap=9 with adaptive="),
        ({"noise": "both"}, ValueError, "noise='both': pass one of"),
        ({"accountant": "moments"}, ValueError, "accountant='moments': pass one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dp_fed_avg(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, **options})
