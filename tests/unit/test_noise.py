"""Noise estimates against covariances that are known, and noise put back against what it should add."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lightning_fedscale.callbacks.critical_phase.noise_words import noise_in_words
from lightning_fedscale.phases.noise import (
    MAX_ESTIMATES,
    UNKNOWN,
    NoiseEstimate,
    diagonal_init,
    diagonal_noise,
    diagonal_update,
    estimate_from_half_batches,
    estimate_from_members,
    noise_scale,
    reweighted,
    reweighting_strength,
)

WIDTH = 60


class Quadratic:
    """Clients whose gradient at a point, and its noise, are known: ``G_k = G + own direction``, noise of known size."""

    def __init__(self, between: float = 0.0, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.gradient = self.rng.normal(size=WIDTH) / math.sqrt(WIDTH)
        self.deviations = np.exp(0.5 * self.rng.normal(size=WIDTH))
        self.between = between

    @property
    def trace(self) -> float:
        return float((self.deviations**2).sum())

    @property
    def square(self) -> float:
        return float(self.gradient @ self.gradient)

    def client(self) -> np.ndarray:
        return self.gradient + self.rng.normal(size=WIDTH) * math.sqrt(self.between / WIDTH)

    def of_batch(self, centre: np.ndarray, samples: int) -> np.ndarray:
        return centre + self.deviations * self.rng.normal(size=WIDTH) / math.sqrt(samples)

    def halves(self, sizes: list[tuple[int, int]], weights: np.ndarray | None = None) -> NoiseEstimate:
        pairs = [[self.of_batch(centre, n) for n in size] for size in sizes for centre in [self.client()]]
        counts = np.array(sizes)
        means = np.array([(m * a + n * b) / (m + n) for (a, b), (m, n) in zip(pairs, sizes, strict=True)])
        weights = np.full(len(sizes), 1 / len(sizes)) if weights is None else weights
        mean = weights @ means
        differences = np.array([((a - b) ** 2).sum() for a, b in pairs])
        return estimate_from_half_batches(differences, counts, (means**2).sum(1), weights, float(mean @ mean))

    def members(self, sizes: list[int], weights: np.ndarray) -> NoiseEstimate:
        gradients = np.array([self.of_batch(self.client(), n) for n in sizes])
        mean = weights @ gradients
        return estimate_from_members((gradients**2).sum(1), weights, float(mean @ mean), np.array(sizes, float))


def test_halves_are_unbiased_also_for_unequal_weights_and_sizes() -> None:
    problem = Quadratic(between=3.0)
    sizes, weights = [(4, 4), (10, 11), (3, 30)], np.array([0.2, 0.5, 0.3])
    estimates = np.array([problem.halves(sizes, weights) for _ in range(4000)])
    batch = float(weights @ np.array(sizes).sum(1))
    expected = problem.square, 3.0 + problem.trace / batch, batch, problem.trace / batch
    error = estimates.std(0) / math.sqrt(len(estimates)) + 1e-12
    assert (np.abs(estimates.mean(0) - expected) < 4.5 * error).all()


def test_members_are_unbiased_and_cannot_tell_what_is_between() -> None:
    problem = Quadratic(between=2.0)
    sizes = [8] * 6
    weights = np.array([0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    estimates = np.array([problem.members(sizes, weights) for _ in range(4000)])
    error = estimates[:, :2].std(0) / math.sqrt(len(estimates))
    assert (np.abs(estimates[:, :2].mean(0) - (problem.square, 2.0 + problem.trace / 8)) < 4.5 * error).all()
    assert np.isnan(estimates[:, 3]).all()


@pytest.mark.parametrize(("size", "number"), [(8, 40), (64, 10), (64, 100)])
def test_the_interval_covers_the_noise_scale(size: int, number: int) -> None:
    """A 95 % interval holds the truth in about 95 of 100 cases."""
    problem = Quadratic()
    truth, covered, enough = problem.trace / problem.square, 0, 0
    for _ in range(300):
        found = noise_scale([problem.halves([(size // 2, size // 2)]) for _ in range(number)])
        covered += found.low <= truth <= found.high
        enough += found.enough
    assert binomtest(covered, 300, 0.95).pvalue > 1e-3
    if size * number > 1000:
        assert enough > 290


def test_the_split_finds_planted_heterogeneity() -> None:
    problem = Quadratic(between=5.0)
    sizes = [(10, 10)] * 8
    truths = {
        "critical_batch": problem.trace / problem.square,
        "critical_cohort": (5.0 + problem.trace / 20) / problem.square,
    }
    answers: dict[str, list[float]] = {name: [] for name in truths}
    covered = 0
    for _ in range(100):
        found = noise_scale([problem.halves(sizes) for _ in range(40)])
        assert found.enough
        covered += found.low <= 20 * truths["critical_cohort"] <= found.high
        for name, values in answers.items():
            values.append(getattr(found, name))
    for name, truth in truths.items():
        assert np.median(answers[name]) == pytest.approx(truth, rel=0.06)
    assert binomtest(covered, 100, 0.95).pvalue > 1e-3
    # Without unlike clients, there is nothing between.
    alike = Quadratic(between=0.0)
    estimates = [alike.halves(sizes) for _ in range(400)]
    between = np.array([estimate.variance - estimate.within for estimate in estimates])
    assert abs(between.mean()) < 4 * between.std() / 20


def test_little_evidence_is_said() -> None:
    problem = Quadratic()
    problem.gradient *= 0.01
    found = noise_scale([problem.halves([(4, 4)]) for _ in range(20)])
    assert not found.enough
    assert math.isnan(found.scale)
    assert found.high > problem.trace / problem.square or found.high == math.inf
    few = noise_scale([NoiseEstimate(1.0, 1.0, 8.0)] * 4)
    assert not few.enough
    with pytest.warns(DeprecationWarning, match="looks is called estimates"):
        assert few.looks == few.estimates == 4
    assert noise_scale([]) == UNKNOWN


def mostly_enough(estimates: int, clients: int, samples: int) -> bool:
    """Whether in most runs these estimates, from so many clients with so many samples each, give a noise scale."""
    enough = 0
    for seed in range(20):
        problem = Quadratic(seed=seed)
        weights = np.full(clients, 1 / clients)
        enough += noise_scale([problem.members([samples] * clients, weights) for _ in range(estimates)]).enough
    return enough > 10


def test_what_would_be_enough_is() -> None:
    """Sampling alone makes gradients noisy here: what is said to be enough is, and half of the estimates are not."""
    estimates, clients, samples, lacking = 10, 4, 6, []
    for seed in range(20):
        problem = Quadratic(seed=seed)
        weights = np.full(clients, 1 / clients)
        found = noise_scale([problem.members([samples] * clients, weights) for _ in range(estimates)])
        if not found.enough:
            lacking.append((*found.needed, *found.shortfall))
    assert len(lacking) > 15
    needed, at_least, factor, factor_at_least = np.median(np.array(lacking), axis=0)
    assert estimates < at_least < needed < MAX_ESTIMATES
    assert 1 < factor_at_least < factor < 20
    assert not mostly_enough(estimates, clients, samples)
    assert not mostly_enough(math.floor(needed / 2), clients, samples)
    assert mostly_enough(math.ceil(1.2 * needed), clients, samples)
    assert mostly_enough(estimates, math.ceil(clients * factor), samples)
    assert mostly_enough(estimates, clients, math.ceil(samples * factor))


@pytest.mark.parametrize("decay", [0.9, 0.99, 1.0])
def test_the_needed_looks_are_the_first_that_suffice(decay: float) -> None:
    """Looks of two values in turn have the same mean and variance however many there are."""

    def estimates(number: int) -> list[NoiseEstimate]:
        return [NoiseEstimate(1.0 + 1.5 * (-1) ** i, 2.0, 8.0) for i in range(number)]

    found = noise_scale(estimates(10), decay)
    assert not found.enough
    if decay == 0.9:  # which never has more than 19 estimates' worth of evidence
        assert found.needed[0] == math.inf
        assert not noise_scale(estimates(MAX_ESTIMATES), decay).enough
        return
    number = int(found.needed[0])
    assert noise_scale(estimates(math.ceil(1.15 * number)), decay).enough
    assert not noise_scale(estimates(int(0.85 * number)), decay).enough


def test_where_no_gradient_shows_nothing_is_promised() -> None:
    around_zero = noise_scale([NoiseEstimate(0.01 * (-1) ** i - 0.1, 2.0, 8.0) for i in range(20)])
    assert around_zero.needed == around_zero.shortfall == (math.inf, math.inf)
    assert "no sign of a gradient" in noise_in_words(around_zero, "round", "as many clients in each")
    below = noise_scale([NoiseEstimate((-1) ** i - 0.1, 2.0, 8.0) for i in range(20)])
    assert below.needed[0] == below.shortfall[0] == math.inf
    assert below.needed[1] < math.inf
    assert "at least" in noise_in_words(below, "round", "as many clients in each")


def test_the_words_say_interval_and_remedy() -> None:
    little = noise_scale([NoiseEstimate(1.0 + 1.5 * (-1) ** i, 2.0, 8.0) for i in range(10)])
    said = noise_in_words(little, "step", "as large batches")
    assert said.startswith("not enough evidence on the gradient noise scale (")
    assert f"{little.needed[0] / 10:.2g} (at least {little.needed[1] / 10:.2g}) times as many steps" in said
    assert (
        f"{little.shortfall[0]:.2g} (at least {little.shortfall[1]:.2g}) times as large batches, would be enough"
        in said
    )
    few = noise_in_words(noise_scale([NoiseEstimate(1.0, 1.0, 8.0)] * 3), "round", "as many clients in each")
    assert few.endswith("3 of at least 5 estimates: train for more rounds")
    much = noise_scale([NoiseEstimate(1.0, 2.0, 8.0)] * 10)
    assert noise_in_words(much, "round", "") == "gradient noise scale 16 samples (16 to 16)"
    assert all(map(math.isnan, (*much.needed, *much.shortfall)))


def test_agrees_with_adaptdl_on_the_same_gradients() -> None:
    """AdaptDL's formulae, as its documentation and paper (Pollux, OSDI 2021) give them for n replicas."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 30)) + rng.normal(size=30)
    n, batch = len(gradients), 16
    mean_square = float((gradients.mean(0) ** 2).sum())
    local_square = float((gradients**2).sum(1).mean())
    square = (n * mean_square - local_square) / (n - 1)
    variance = (local_square - mean_square) * n / (n - 1)  # of a replica's gradient
    estimate = estimate_from_members((gradients**2).sum(1), np.full(n, 1 / n), mean_square, np.full(n, float(batch)))
    assert estimate.square == pytest.approx(square, rel=1e-12)
    assert estimate.variance == pytest.approx(variance, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_the_noise_scale_has_no_unit_of_the_gradient(factor: float, seed: int) -> None:
    problem = Quadratic(between=1.0, seed=seed)
    estimates = [problem.halves([(8, 8)] * 4) for _ in range(12)]
    scaled = [NoiseEstimate(factor * l.square, factor * l.variance, l.batch, factor * l.within) for l in estimates]  # noqa: E741
    one, other = noise_scale(estimates), noise_scale(scaled)
    for name in ("scale", "low", "high", "critical_batch", "critical_cohort"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6, nan_ok=True)


# ---- noise put back


def test_reweighting_adds_the_covariance_of_a_smaller_batch() -> None:
    """Of unequal clients, over many draws of gradients and of signs, coordinate by coordinate and across them."""
    rng = np.random.default_rng(0)
    sizes = np.array([10, 10, 30, 50])
    weights, batch, target = sizes / sizes.sum(), float(sizes.sum()), 25.0
    factor = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 2.0]])
    covariance = factor @ factor.T  # of a single sample's gradient
    added = []
    for _ in range(20_000):
        gradients = (rng.normal(size=(4, 3)) @ factor.T) / np.sqrt(sizes)[:, None]
        new = reweighted(weights, rng.choice([-1.0, 1.0], size=4), batch, target)
        assert new.sum() == pytest.approx(1.0)
        added.append((new - weights) @ gradients)
    found = np.cov(np.array(added).T, bias=True)
    expected = (1 / target - 1 / batch) * covariance
    assert np.abs(np.mean(added, 0)).max() < 5 * math.sqrt(expected.max() / 20_000)
    assert np.abs(found - expected).max() < 0.05 * expected.max()


def test_the_strength_is_that_of_equal_clients() -> None:
    """``sigma_w^2 = b / (K - 1) (1 / target - 1 / B)`` for K clients of b samples."""
    clients, each, target = 8, 16, 40.0
    strength = reweighting_strength(np.full(clients, 1 / clients), clients * each, target)
    assert (strength / clients) ** 2 == pytest.approx(each / (clients - 1) * (1 / target - 1 / (clients * each)))
    assert reweighting_strength(np.full(clients, 1 / clients), 128.0, 128.0) == 0.0


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_diagonal_learns_the_variance(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([0.1, 1.0, 3.0])
    found = []
    for _ in range(300):
        state = diagonal_init([torch.zeros(3)])
        for _ in range(60):
            state = diagonal_update(state, [5.0 + deviations * torch.randn(3, generator=generator)], decay)
        found.append(state.variance[0])
    mean = torch.stack(found).mean(0)
    assert torch.allclose(mean, deviations**2, rtol=0.06)


def test_diagonal_noise_has_the_variance_of_a_smaller_batch() -> None:
    state = diagonal_init([torch.zeros(2)])._replace(variance=[torch.tensor([1.0, 4.0])], seen=10)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([diagonal_noise(state, 256, 32, generator)[0] for _ in range(20_000)])
    assert torch.allclose(noise.var(0), torch.tensor([7.0, 28.0]), rtol=0.05)
    assert noise.mean(0).abs().max() < 0.15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_from_members(np.ones(1), np.ones(1), 1.0, np.ones(1)), "weights="),
        (lambda: reweighting_strength(np.ones(1), 8, 4), "weights="),
        (lambda: reweighting_strength(np.full(2, 0.5), 8, 16), "target_batch=16: .*8"),
        (lambda: noise_scale([], decay=0), "decay=0"),
        (lambda: noise_scale([], confidence=95), "confidence=95"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_old_name_of_its_argument_is_read() -> None:
    estimates = [NoiseEstimate(1.0 + 0.1 * (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)]
    with pytest.warns(DeprecationWarning, match="noise_scale: looks is estimates now"):
        assert noise_scale(looks=estimates) == noise_scale(estimates)
