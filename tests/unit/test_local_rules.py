"""Local rules against whole federated loops written from their papers, and against where they must end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.heterogeneous import Array, Quadratics, federate, make
from lightning_fedscale import local_rules, schedules
from lightning_fedscale.local_rules import LocalRule, Outcome, fed_dyn, fed_nova, fed_prox, scaffold
from lightning_fedscale.local_rules.fed_nova import way
from lightning_fedscale.samplers import uniform
from tests.unit.test_contracts import example

CLIENTS, ROUNDS, LR = 8, 12, 0.05
EQUAL = make(CLIENTS, 3, (6,) * CLIENTS)
UNEQUAL = make(CLIENTS, 3, tuple(2 + 3 * (k % 4) for k in range(CLIENTS)))
WEIGHTS = np.arange(1.0, CLIENTS + 1)


def cohorts(rounds: int, per_round: int) -> list[list[int]]:
    return [uniform(seed=0, round=r, num_clients=CLIENTS, clients_per_round=per_round).tolist() for r in range(rounds)]


# ---- the papers' algorithms, in their own letters and signs


def paper_scaffold(f: Quadratics, option: str, eta_g: float) -> Array:
    """Algorithm 1 of arXiv 1910.06378."""
    x, c = np.zeros(3), np.zeros(3)
    c_i = [np.zeros(3) for _ in range(CLIENTS)]
    for S in cohorts(ROUNDS, 3):
        dy, dc = [], []
        for i in S:
            y = x.copy()
            for _ in range(f.steps[i]):
                y = y - LR * (f.gradient(i, y) - c_i[i] + c)
            plus = f.gradient(i, x) if option == "I" else c_i[i] - c + (x - y) / (f.steps[i] * LR)
            dy.append(y - x)
            dc.append(plus - c_i[i])
            c_i[i] = plus
        x = x + eta_g * np.mean(dy, axis=0)
        c = c + len(S) / CLIENTS * np.mean(dc, axis=0)
    return x


def paper_fed_dyn(f: Quadratics, alpha: float) -> Array:
    """Algorithm 1 of arXiv 2111.04263, with gradient descent for its argmin."""
    theta, h = np.zeros(3), np.zeros(3)
    grad = [np.zeros(3) for _ in range(CLIENTS)]
    for P in cohorts(ROUNDS, 3):
        locals_ = []
        for k in P:
            y = theta.copy()
            for _ in range(f.steps[k]):
                y = y - LR * (f.gradient(k, y) - grad[k] + alpha * (y - theta))
            grad[k] = grad[k] - alpha * (y - theta)
            locals_.append(y)
        h = h - alpha / CLIENTS * sum((y - theta for y in locals_), np.zeros(3))
        theta = np.mean(locals_, axis=0) - h / alpha
    return theta


def paper_fed_prox(f: Quadratics, mu: float, p: Array) -> Array:
    w = np.zeros(3)
    for S in cohorts(ROUNDS, 3):
        locals_ = []
        for k in S:
            y = w.copy()
            for _ in range(f.steps[k]):
                y = y - LR * (f.gradient(k, y) + mu * (y - w))
            locals_.append(y)
        w = np.average(locals_, axis=0, weights=p[S])
    return w


def paper_fed_nova(f: Quadratics, rho: float, mu: float, p: Array) -> Array:
    """The loop and the counters of the authors' code (JYWa/FedNova), which has either momentum or a proximal term."""
    assert not (rho and mu)
    x = np.zeros(3)
    for S in cohorts(ROUNDS, 3):
        share = p[S] / p[S].sum()
        cums, norms, steps = [], [], []
        for k in S:
            y, v, counter, norm = x.copy(), np.zeros(3), 0.0, 0.0
            for _ in range(f.steps[k]):
                v = rho * v + f.gradient(k, y)
                y = y - LR * (v + mu * (y - x))
                if mu:
                    norm = norm * (1 - LR * mu) + 1
                elif rho:
                    counter = counter * rho + 1
                    norm += counter
                else:
                    norm += 1
            cums.append(x - y)
            norms.append(norm)
            steps.append(f.steps[k])
        tau = share @ (steps if mu else norms)
        x = x - tau * sum(a * cum / norm for a, cum, norm in zip(share, cums, norms, strict=True))
    return x


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("problem", [EQUAL, UNEQUAL])
def test_scaffold_equals_its_paper(option: str, problem: Quadratics) -> None:
    ours = federate(problem, scaffold(option), rounds=ROUNDS, per_round=3, lr=LR, server_lr=0.7)
    np.testing.assert_allclose(ours[-1], paper_scaffold(problem, option, 0.7), rtol=1e-10)


@pytest.mark.parametrize("problem", [EQUAL, UNEQUAL])
def test_fed_dyn_equals_its_paper(problem: Quadratics) -> None:
    ours = federate(problem, fed_dyn(alpha=0.5), rounds=ROUNDS, per_round=3, lr=LR)
    np.testing.assert_allclose(ours[-1], paper_fed_dyn(problem, 0.5), rtol=1e-10)


@pytest.mark.parametrize("mu", [0.1, 2.0])
def test_fed_prox_equals_its_paper(mu: float) -> None:
    ours = federate(UNEQUAL, fed_prox(mu), rounds=ROUNDS, per_round=3, lr=LR, weights=WEIGHTS)
    np.testing.assert_allclose(ours[-1], paper_fed_prox(UNEQUAL, mu, WEIGHTS), rtol=1e-10)


@pytest.mark.parametrize(("rho", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5)])
def test_fed_nova_equals_its_authors_code(rho: float, mu: float) -> None:
    ours = federate(UNEQUAL, fed_nova(mu), rounds=ROUNDS, per_round=3, lr=LR, momentum=rho, weights=WEIGHTS)
    np.testing.assert_allclose(ours[-1], paper_fed_nova(UNEQUAL, rho, mu, WEIGHTS), rtol=1e-10)


@given(
    steps=st.integers(1, 12),
    lr=st.floats(0.01, 0.3),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    mu=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_way_is_the_sum_of_a_clients_gradient_weights(steps: int, lr: float, momentum: float, mu: float) -> None:
    """``a_j`` by torch's own SGD: what a gradient of 1 in step j alone adds to ``(x - y) / lr``."""

    def weight_of(j: int) -> float:
        y = torch.zeros(1, dtype=torch.float64)
        sgd = torch.optim.SGD([y], lr=lr, momentum=momentum)
        for step in range(steps):
            y.grad = mu * y + (1.0 if step == j else 0.0)
            sgd.step()
        return -y.item() / lr

    expected = sum(weight_of(j) for j in range(steps))
    assert way(steps, lr=lr, momentum=momentum, mu=mu) == pytest.approx(expected, rel=1e-10)


# ---- where they end


def gap(problem: Quadratics, rule: LocalRule | None, **options: Any) -> float:
    """Distance of the last model to the optimum of the clients' plain mean, relative to that of the start."""
    optimum = problem.optimum()
    path = federate(problem, rule, **{"rounds": 600, "per_round": CLIENTS, "lr": LR, **options})
    return float(np.linalg.norm(path[-1] - optimum) / np.linalg.norm(optimum))


def test_fed_avg_rests_elsewhere() -> None:
    """Provably: it comes to rest where its deltas cancel, known in closed form, and that is not the optimum."""
    for problem in (EQUAL, UNEQUAL):
        rest, optimum = problem.rest_of_fed_avg(LR), problem.optimum()
        path = federate(problem, None, rounds=600, per_round=CLIENTS, lr=LR)
        np.testing.assert_allclose(path[-1], rest, rtol=1e-8)
        assert np.linalg.norm(rest - optimum) > 0.05 * np.linalg.norm(optimum)


@pytest.mark.parametrize("rule", [scaffold("I"), scaffold("II"), fed_dyn(alpha=1.0)], ids=["I", "II", "dyn"])
@pytest.mark.parametrize("per_round", [3, CLIENTS])
@pytest.mark.parametrize("problem", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_these_reach_the_optimum(rule: LocalRule, per_round: int, problem: Quadratics) -> None:
    assert gap(problem, rule, per_round=per_round) < 1e-9
    assert gap(problem, None, per_round=per_round) > 0.05


@pytest.mark.parametrize("rule", [scaffold("II"), fed_dyn(alpha=1.0)])
def test_these_reach_it_whatever_the_aggregator_weighs(rule: LocalRule) -> None:
    """Since the server sums messages, not deltas."""
    assert gap(EQUAL, rule, weights=WEIGHTS) < 1e-9


def test_fed_nova_goes_to_the_optimum_as_the_learning_rate_falls_and_fed_avg_does_not() -> None:
    nova = [gap(UNEQUAL, fed_nova(), lr=lr, rounds=int(10 / lr)) for lr in (0.02, 0.01, 0.005)]
    plain = [gap(UNEQUAL, None, lr=lr, rounds=int(10 / lr)) for lr in (0.02, 0.01, 0.005)]
    for larger, smaller in pairwise(nova):
        assert smaller == pytest.approx(larger / 2, rel=0.15)  # drift, in proportion to the learning rate
    # FedAvg goes to the optimum in which clients count as many times as they take steps.
    surrogate = UNEQUAL.optimum(np.array(UNEQUAL.steps, dtype=float))
    inconsistency = np.linalg.norm(surrogate - UNEQUAL.optimum()) / np.linalg.norm(UNEQUAL.optimum())
    assert plain[-1] == pytest.approx(inconsistency, rel=0.1)
    assert inconsistency > 10 * nova[-1]


def test_fed_nova_with_equal_steps_is_fed_avg() -> None:
    ours = federate(EQUAL, fed_nova(), rounds=ROUNDS, per_round=3, lr=LR, weights=WEIGHTS)
    plain = federate(EQUAL, None, rounds=ROUNDS, per_round=3, lr=LR, weights=WEIGHTS)
    np.testing.assert_allclose(ours, plain, rtol=1e-12, atol=1e-15)


def test_scaffold_with_one_step_of_all_clients_is_synchronous_sgd() -> None:
    problem = make(CLIENTS, 3, (1,) * CLIENTS)
    ours = federate(problem, scaffold(), rounds=ROUNDS, per_round=CLIENTS, lr=LR)
    plain = federate(problem, None, rounds=ROUNDS, per_round=CLIENTS, lr=LR)
    np.testing.assert_allclose(ours, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", [scaffold(), fed_dyn(0.1)], ids=["scaffold", "fed_dyn"])
def test_states_are_no_views_of_the_scratch_buffer(rule: LocalRule) -> None:
    delta = torch.ones(3, dtype=torch.float64)
    server = rule.init(delta)
    report = rule.finish(Outcome(delta, 2, 0.1, 0.0), None, server)
    kept = str(report)
    delta.fill_(7.0)
    shift = rule.begin(None, server).shift
    if shift is not None:
        shift.fill_(7.0)
    assert str(report) == kept
    assert all((value == 0).all() for value in server.values())


def test_schedules_of_local_steps() -> None:
    assert [schedules.post_local(3, 8)(round) for round in range(5)] == [1, 1, 1, 8, 8]
    with pytest.raises(ValueError, match=r"until=0: pass an integer of at least 1"):
        schedules.post_local(0, 8)
    with pytest.raises(ValueError, match=r"stages=\{5: 1\}: "):
        schedules.in_stages({5: 1})


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: fed_prox(0), ValueError, "mu=0: pass a finite number above 0"),
        (lambda: fed_dyn("0.1"), TypeError, "alpha='0.1': pass a finite number above 0"),  # type: ignore[arg-type]
        (lambda: fed_nova(-1.0), ValueError, "proximal=-1.0: pass a finite number above 0"),
        (lambda: scaffold("III"), ValueError, "option='III': pass one of 'I', 'II'"),
        (lambda: local_rules.by_name("scafold"), ValueError, "Did you mean 'scaffold'"),
        (lambda: local_rules.by_name("fed_prox"), ValueError, r"needs mu: pass an object, fed_prox\(mu=...\)"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize("name", local_rules.FACTORIES)
def test_a_client_whose_steps_were_all_skipped_teaches_nothing(name: str) -> None:
    """A gradient scaler skips steps until its scale is small enough."""
    rule = example("local_rules", name)
    server, kept = rule.init(torch.zeros(3)), None
    for steps in (2, 0):
        delta = torch.full((3,), 0.5 * steps)
        before = kept
        report = rule.finish(
            Outcome(delta, steps, 0.1, 0.0, torch.ones(3) if rule.needs_gradient else None), kept, server
        )
        kept = report.state
    assert delta.tolist() == [0.0] * 3
    if rule.sends_message and not rule.needs_gradient:
        assert report.message is not None
        assert report.message.tolist() == [0.0] * 3
    if rule.keeps_state and not rule.needs_gradient:
        assert before is not None
        assert {name: value.tolist() for name, value in kept.items()} == {n: v.tolist() for n, v in before.items()}
