"""Robust rules: equal to their papers written out in numpy and to flwr, in any order, and bounded under attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from lightning_fedscale.aggregators import (
    FACTORIES,
    Aggregator,
    aggregate,
    by_name,
    centered_clipping,
    geometric_median,
    krum,
    mean,
    median,
    multi_krum,
    norm_clipped,
    trimmed_mean,
)
from lightning_fedscale.aggregators.rows import fold, norm_of
from lightning_fedscale.types import ClientUpdate, Cohort

Array = npt.NDArray[np.float64]
quick = settings(max_examples=40)

RULES: dict[str, Aggregator] = {
    "mean": mean(),
    "median": median(),
    "trimmed_mean": trimmed_mean(2),
    "krum": krum(2),
    "multi_krum": multi_krum(2, keep=3),
    "geometric_median": geometric_median(),
    "norm_clipped": norm_clipped(1.0),
    "centered_clipping": centered_clipping(4.0, iterations=2),
}


def normal(seed: int, clients: int = 9, length: int = 5) -> Array:
    return np.random.default_rng(seed).normal(size=(clients, length))


def applied(rule: Aggregator, rows: Array, **options: Any) -> Array:
    return aggregate(rule, torch.from_numpy(rows), **options).numpy()


def krum_scores(rows: Array, attackers: int) -> list[float]:
    """Blanchard et al. 2017, section 4: over the n - f - 2 vectors closest to each, by a loop."""
    found = []
    for i, row in enumerate(rows):
        squares = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        found.append(sum(squares[: len(rows) - attackers - 2]))
    return found


def test_every_rule_is_registered_and_tested() -> None:
    assert set(RULES) == set(FACTORIES)


@quick
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_median_equals_numpy(seed: int, clients: int) -> None:
    rows = normal(seed, clients)
    np.testing.assert_allclose(applied(median(), rows), np.median(rows, axis=0), rtol=1e-15)


@quick
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.49]))
def test_trimmed_mean_equals_numpy(seed: int, clients: int, share: float) -> None:
    rows = normal(seed, clients)
    cut = int(share * clients)
    expected = np.sort(rows, axis=0)[cut : clients - cut].mean(axis=0)
    np.testing.assert_allclose(applied(trimmed_mean(share), rows), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(applied(trimmed_mean(cut), rows), expected, rtol=1e-12, atol=1e-15)


def test_a_share_is_not_lost_to_rounding() -> None:
    assert 0.29 * 100 < 29  # in floating point
    rows = np.zeros((100, 1))
    rows[:29] = 1e6
    assert applied(trimmed_mean(0.29), rows) == 0


@quick
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 4))
def test_krum_equals_the_paper(seed: int, attackers: int, keep: int) -> None:
    rows = normal(seed)
    best = np.argsort(krum_scores(rows, attackers))
    assert (applied(krum(attackers), rows) == rows[best[0]]).all()
    np.testing.assert_allclose(
        applied(multi_krum(attackers, keep), rows), rows[best[:keep]].mean(axis=0), rtol=1e-12, atol=1e-15
    )


@quick
@given(st.integers(0, 10**6), st.integers(3, 10), st.sampled_from(["uniform", "samples"]))
def test_geometric_median_has_the_least_sum_of_distances(seed: int, clients: int, weighting: str) -> None:
    rows, held = normal(seed, clients, 3), np.random.default_rng(seed).integers(1, 50, clients)
    weights = held if weighting == "samples" else np.ones(clients)

    def cost(point: Array) -> float:
        return float(weights @ np.linalg.norm(rows - point, axis=1))

    rule = geometric_median(weighting, tolerance=1e-12, iterations=10_000)
    found = applied(rule, rows, num_samples=held.tolist())
    starts = [rows.mean(axis=0), *rows]
    least = min(cost(minimize(cost, start, method="Nelder-Mead", tol=1e-12).x) for start in starts)
    assert cost(found) <= least * (1 + 1e-6)
    # As it comes, it is a little less exact.
    assert cost(applied(geometric_median(weighting), rows, num_samples=held.tolist())) <= least * (1 + 1e-4)


def test_geometric_median_is_not_held_by_an_update_at_the_coordinate_wise_median() -> None:
    rows = np.array([[0.0, 0.0, 0.0], [1.0, -0.1, 9.0], [-0.1, 1.0, 9.0], [2.0, -0.1, 0.0], [-0.1, 2.0, 0.0]])
    rows[:, 2] = [0.0, 1.0, 1.0, -1.0, 0.0]
    assert (np.median(rows, axis=0) == rows[0]).all()

    def cost(point: Array) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    least = minimize(cost, rows.mean(axis=0), method="Nelder-Mead", tol=1e-12)
    assert cost(applied(geometric_median(), rows)) < least.fun * (1 + 1e-4) < cost(rows[0])


@quick
@given(st.integers(0, 10**6), st.floats(0.1, 5.0))
def test_norm_clipped_equals_numpy(seed: int, longest: float) -> None:
    rows = normal(seed)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    expected = (rows * np.minimum(1, longest / norms)).mean(axis=0)
    np.testing.assert_allclose(applied(norm_clipped(longest), rows), expected, rtol=1e-12, atol=1e-15)
    inside = applied(norm_clipped(longest, inner=median()), rows)
    np.testing.assert_allclose(inside, np.median(rows * np.minimum(1, longest / norms), axis=0), atol=1e-15)


def test_norm_clipped_leaves_the_update_to_others_as_it_was() -> None:
    rule, cohort = norm_clipped(1.0), Cohort(0, np.arange(1), 1, 2, 0)
    delta = torch.tensor([3.0, 4.0, 7.0], dtype=torch.float64)
    update = ClientUpdate(0, delta, 5.0, 1, 1, 1, 0.0, 0.0)
    total = rule.accumulate(rule.init(delta, cohort), update, 1.0, cohort)
    assert delta.tolist() == [3.0, 4.0, 7.0]
    assert rule.finish_with(total, cohort, None)[0].tolist() == pytest.approx([0.6, 0.8, 7.0])


def clipped_around(center: Array, rows: Array, radius: float) -> Array:
    """Karimireddy et al. 2021, equation CC: ``v + 1/n sum_i (x_i - v) min(1, tau / |x_i - v|)``, by a loop."""
    total = np.zeros_like(center)
    for row in rows:
        away = row - center
        norm = np.linalg.norm(away)
        total += away if norm <= radius else away * radius / norm
    return center + total / len(rows)


@quick
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.1, 5.0), st.integers(1, 3))
def test_centered_clipping_equals_the_paper_round_after_round(
    seed: int, clients: int, radius: float, iterations: int
) -> None:
    rule, center = centered_clipping(radius, iterations), np.zeros(5)
    cohort = Cohort(0, np.arange(clients), clients, 5, 0)
    state = rule.fresh_state(torch.zeros(5, dtype=torch.float64), cohort)
    for round in range(4):
        rows = normal(seed + round, clients)
        updates = [
            ClientUpdate(i, torch.from_numpy(row), float(np.linalg.norm(row)), 1, 1, 1, 0.0, 0.0)
            for i, row in enumerate(rows)
        ]
        found, state = fold(rule, updates, torch.zeros(5, dtype=torch.float64), cohort, state)
        for _ in range(iterations):
            center = clipped_around(center, rows, radius)
        np.testing.assert_allclose(found.numpy(), center, rtol=1e-12, atol=1e-14)


def test_centered_clipping_passes_where_no_distance_is_zero_or_finite() -> None:
    at_center, far = np.zeros((1, 3)), np.full((3, 3), 1e200)
    np.testing.assert_allclose(applied(centered_clipping(3.0), np.vstack([at_center, far])), 0.0, atol=3.0)
    # Buffers take the mean of those that count in full; the others' factors are as good as nothing.
    rows = np.array([[0.5, 8.0], [-0.5, 4.0], [1e300, 1e6]])
    assert applied(centered_clipping(1.0), rows, trainable=1)[1] == pytest.approx(6.0)


# ---- flwr, and what it gives for these rows, so that the comparison also runs without it

ROWS = np.array(
    [
        [0.5, -1.25, 2.0],
        [0.75, -1.0, 1.5],
        [0.25, -1.5, 2.25],
        [0.625, -1.125, 1.75],
        [-8.0, 16.0, -4.0],
        [0.5, -0.875, 2.5],
        [9.0, 7.0, 12.0],
    ]
)
FLWR: dict[str, tuple[Aggregator, list[float]]] = {
    "median": (median(), [0.5, -1.0, 2.0]),
    "trimmed": (trimmed_mean(0.2), [0.525, 0.55, 2.0]),
    "krum": (krum(2), [0.5, -1.25, 2.0]),
    "multi_krum": (multi_krum(2, keep=3), [0.4583333333333333, -1.2916666666666667, 2.0]),
}


@pytest.mark.parametrize("name", FLWR)
def test_equals_what_flwr_gave(name: str) -> None:
    rule, expected = FLWR[name]
    np.testing.assert_allclose(applied(rule, ROWS), expected, rtol=1e-15)


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_equals_flwr(seed: int | None) -> None:
    theirs = pytest.importorskip("flwr.server.strategy.aggregate")
    rows = ROWS if seed is None else normal(seed, clients=7 + seed % 5)
    results = [([row], 1) for row in rows]
    expected = {
        "median": theirs.aggregate_median(results),
        "trimmed": theirs.aggregate_trimmed_avg(results, 0.2),
        "krum": theirs.aggregate_krum(results, 2, 0),
        "multi_krum": theirs.aggregate_krum(results, 2, 3),
    }
    for name, (rule, _) in FLWR.items():
        np.testing.assert_allclose(applied(rule, rows), expected[name][0], rtol=1e-12, atol=1e-15, err_msg=name)


# ---- what must hold for all of them


@pytest.mark.parametrize("name", RULES)
@quick
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_of_clients_and_number_of_ranks_change_nothing(name: str, seed: int, random: Any, ranks: int) -> None:
    rule, rows = RULES[name], torch.from_numpy(normal(seed))
    cohort = Cohort(0, np.arange(9), 9, 4, 0)
    updates = [ClientUpdate(i, row, norm_of(row, cohort), 1 + i, 1, 1, 0.0, 0.0) for i, row in enumerate(rows)]
    expected = finished(rule, folded(rule, updates, cohort), cohort)
    random.shuffle(updates)
    shares = [folded(rule, updates[rank::ranks], cohort) for rank in range(ranks)]
    # Rows that other ranks leave zero give the very bits; sums are rounded.
    torch.testing.assert_close(finished(rule, torch.stack(shares).sum(0), cohort), expected, rtol=1e-12, atol=1e-14)

    # Whoever is called client 0 counts no more than others.
    renamed = rows[torch.tensor(random.sample(range(9), 9))]
    uniform = aggregate(rule, rows, trainable=4)
    torch.testing.assert_close(aggregate(rule, renamed, trainable=4), uniform, rtol=1e-6, atol=1e-9)


def finished(rule: Aggregator, total: Tensor, cohort: Cohort) -> Tensor:
    state = rule.fresh_state(torch.zeros(5, dtype=torch.float64), cohort)
    return rule.finish_with(total, cohort, state)[0]


def folded(rule: Aggregator, updates: list[ClientUpdate], cohort: Cohort) -> Tensor:
    total = rule.init(updates[0].delta if updates else torch.zeros(5, dtype=torch.float64), cohort)
    for update in updates:
        total = rule.accumulate(total, update, rule.weigh(update), cohort)
    return total


@pytest.mark.parametrize("name", RULES)
def test_one_client_and_equal_clients_pass_through(name: str) -> None:
    row = torch.tensor([0.25, -0.5, 0.125], dtype=torch.float64)
    torch.testing.assert_close(aggregate(RULES[name], row.repeat(9, 1)), row, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mean", "median", "trimmed_mean"}))
def test_buffers_neither_count_in_distances_nor_get_lost(name: str) -> None:
    rows = normal(3)
    marked = np.hstack([rows, 1e6 * np.arange(9)[:, None]])
    found = applied(RULES[name], marked, trainable=5)
    np.testing.assert_allclose(found[:5], applied(RULES[name], rows), rtol=1e-12)
    if name == "krum":
        assert found[5] == 1e6 * np.argmin(krum_scores(rows, 2))
    assert 0 <= found[5] <= 8e6


attacks = st.one_of(
    st.floats(-1e30, 1e30).map(lambda x: np.full((4, 5), x)),
    st.integers(0, 10**6).map(lambda seed: 10.0 ** np.random.default_rng(seed).uniform(-3, 30) * normal(seed, 4)),
    st.integers(0, 10**6).map(lambda seed: normal(seed, 1).repeat(4, axis=0) * 3),
)


@pytest.mark.parametrize(
    ("rule", "bears"),
    [(median(), 4), (trimmed_mean(4), 4), (trimmed_mean(0.45), 4), (trimmed_mean(2), 2)],
    ids=["median", "trimmed by number", "trimmed by share", "trimmed less"],
)
@quick
@given(st.integers(0, 10**6), attacks)
def test_coordinates_stay_between_honest_clients(rule: Aggregator, bears: int, seed: int, attack: Array) -> None:
    honest = normal(seed, 9 - bears)
    found = applied(rule, np.vstack([honest, attack[:bears]]))
    slack = 1e-12
    assert (found >= honest.min(axis=0) - slack).all()
    assert (found <= honest.max(axis=0) + slack).all()


@quick
@given(st.integers(0, 10**6), attacks)
def test_geometric_median_is_bounded_below_half_of_the_weight(seed: int, attack: Array) -> None:
    honest = normal(seed, 5)
    found = applied(geometric_median(), np.vstack([honest, attack]))
    # Lopuhaa and Rousseeuw 1991: with a share a of attackers the norm is at most 2 (1 - a) / (1 - 2 a) of the honest.
    longest = 2 * (1 - 4 / 9) / (1 - 8 / 9) * np.linalg.norm(honest, axis=1).max()
    assert np.linalg.norm(found) <= longest * (1 + 1e-6)


@quick
@given(st.integers(0, 10**6), attacks)
def test_krum_stays_near_honest_clients(seed: int, attack: Array) -> None:
    honest = normal(seed, 7)
    rows = np.vstack([honest, attack[:2]])
    found = applied(krum(2), rows)
    # An attacker wins only with a score below the best honest one's, so it is closer to some honest client than that.
    nearest = min(((found - row) ** 2).sum() for row in honest)
    assert nearest <= min(krum_scores(honest, 0)) + 1e-9


@quick
@given(st.integers(0, 10**6), attacks, st.integers(1, 3))
def test_centered_clipping_bounds_the_harm(seed: int, attack: Array, iterations: int) -> None:
    honest = normal(seed, 5)
    found = applied(centered_clipping(0.5, iterations), np.vstack([honest, attack]))
    still = np.zeros(5)
    for _ in range(iterations):  # attackers that agree with the center do not move it
        still += (clipped_around(still, honest, 0.5) - still) * 5 / 9
    assert np.linalg.norm(found - still) <= iterations * 0.5 * 4 / 9 + 1e-12


@quick
@given(st.integers(0, 10**6), attacks)
def test_norm_clipped_bounds_the_harm(seed: int, attack: Array) -> None:
    honest = normal(seed, 5)
    found = applied(norm_clipped(1.0), np.vstack([honest, attack]))
    without = applied(norm_clipped(1.0), honest)
    assert np.linalg.norm(found - without * 5 / 9) <= 4 / 9 + 1e-12


def test_the_mean_bears_none() -> None:
    assert abs(applied(mean(), np.vstack([normal(0), np.full((1, 5), 1e30)]))).min() > 1e28


@pytest.mark.parametrize("name", RULES)
def test_updates_that_are_not_finite_are_left_out(name: str) -> None:
    rows = normal(1)
    broken = rows.copy()
    broken[4, 2] = np.nan
    found = applied(RULES[name], broken)
    if name in ("krum", "multi_krum"):
        best = np.argsort(krum_scores(np.delete(rows, 4, 0), 2))[: 3 if name == "multi_krum" else 1]
        expected = np.delete(rows, 4, 0)[best].mean(axis=0)
    else:
        expected = applied(RULES[name], np.delete(rows, 4, 0))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_one_finite_update_is_left(name: str) -> None:
    rows = np.full((9, 2), np.nan)
    rows[5] = [0.5, 0.25]
    np.testing.assert_allclose(applied(RULES[name], rows), rows[5], rtol=1e-15)


# ---- arguments


@pytest.mark.parametrize(
    ("rule", "clients", "message"),
    [
        (krum(2), 6, r"aggregator=krum\(attackers=2\): .*at least 7 clients .* round 0 has 6: raise"),
        (multi_krum(1, keep=9), 9, r"multi_krum\(attackers=1, keep=9\): .*at least 10 clients"),
        (trimmed_mean(2), 4, r"trimmed_mean\(trim=2\): .*at least 5 clients"),
    ],
)
def test_a_cohort_that_is_too_small_is_refused(rule: Aggregator, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        applied(rule, normal(0, clients))
    applied(rule, normal(0, 10))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: trimmed_mean(0.5), ValueError, r"trim=0.5: pass a share of the clients in \[0, 0.5\)"),
        (lambda: trimmed_mean(float("nan")), ValueError, "trim=nan: pass a share"),
        (lambda: trimmed_mean(-1), ValueError, "trim=-1: pass the number"),
        (lambda: trimmed_mean(True), TypeError, "trim=True: pass a number"),
        (lambda: trimmed_mean("2"), TypeError, "trim='2': pass a number"),  # type: ignore[arg-type]
        (lambda: krum(-1), ValueError, "attackers=-1: pass"),
        (lambda: krum(0.2), TypeError, "attackers=0.2: pass"),  # type: ignore[arg-type]
        (lambda: multi_krum(1, keep=0), ValueError, "keep=0: pass"),
        (lambda: multi_krum(1, keep=2.0), TypeError, "keep=2.0: pass"),  # type: ignore[arg-type]
        (lambda: norm_clipped(0), ValueError, "max_norm=0: pass the largest norm"),
        (lambda: norm_clipped("1"), TypeError, "max_norm='1': pass the largest norm"),  # type: ignore[arg-type]
        (lambda: centered_clipping(0.0), ValueError, "radius=0.0"),
        (lambda: centered_clipping("1"), TypeError, "radius='1'"),  # type: ignore[arg-type]
        (lambda: centered_clipping(1.0, 0), ValueError, "iterations=0"),
        (lambda: norm_clipped(1.0, "median"), TypeError, "inner='median': pass an aggregators.Aggregator"),  # type: ignore[arg-type]
        (lambda: geometric_median(tolerance="a"), TypeError, "tolerance='a': pass a finite number"),  # type: ignore[arg-type]
        (lambda: norm_clipped(float("nan")), ValueError, "max_norm=nan: pass"),
        (lambda: geometric_median("steps"), ValueError, "weighting='steps': pass one of"),
        (
            lambda: geometric_median(smoothing=0),
            ValueError,
            "smoothing=0: pass a finite number above 0",
        ),
        (lambda: geometric_median(iterations=0), ValueError, "iterations=0: pass"),
        (
            lambda: by_name("krum"),
            ValueError,
            r"aggregator='krum' needs attackers: pass an object, krum\(attackers=...\)",
        ),
        (lambda: by_name("medain"), ValueError, "Did you mean 'median'"),
    ],
)
def test_wrong_arguments(make: Callable[[], Aggregator], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ["median", "geometric_median"])
def test_by_name(name: str) -> None:
    rows = normal(2)
    assert (applied(by_name(name), rows) == applied(FACTORIES[name](), rows)).all()
