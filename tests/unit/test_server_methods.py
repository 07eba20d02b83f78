"""The server optimizers of the papers, each against numpy written from its paper and, where right, against flwr."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, lr_scheduler

from lightning_fedscale import server
from lightning_fedscale.server import ServerOptimizer

Array = npt.NDArray[np.float64]
Params = Mapping[str, Tensor]


def draw(number: int) -> Params:
    generator = torch.Generator().manual_seed(number)
    return {
        "weight": torch.randn(3, 2, dtype=torch.float64, generator=generator),
        "bias": torch.randn(4, dtype=torch.float64, generator=generator),
    }


def saved(state: Any) -> Any:
    """``state`` as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(rule: ServerOptimizer, deltas: list[Params], *, norms: list[float] | None = None) -> list[Params]:
    """The steps along these deltas, each with the state of a checkpoint."""
    params, steps = draw(0), []
    state = rule.init(params)
    for i, delta in enumerate(deltas):
        step, state = rule.update(delta, saved(state), params, *([norms[i]] if norms else []))
        params = {name: params[name] - step[name] for name in params}
        steps.append(step)
    return steps


# ---- written from the papers, one parameter at a time


def avgm(deltas: list[Array], lr: float, momentum: float, nesterov: bool) -> Iterator[Array]:
    v = np.zeros_like(deltas[0])
    for delta in deltas:
        v = momentum * v + delta
        yield lr * (delta + momentum * v if nesterov else v)


def fed_opt(deltas: list[Array], kind: str, lr: float, beta1: float, beta2: float, tau: float) -> Iterator[Array]:
    """Algorithm 2 of arXiv 2003.00295; its deltas have the other sign, which only turns m around."""
    m, v = np.zeros_like(deltas[0]), np.full_like(deltas[0], tau**2)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        yield lr * m / (np.sqrt(v) + tau)


PAPERS: dict[str, tuple[ServerOptimizer, Callable[[list[Array]], Iterator[Array]]]] = {
    "fed_avgm": (server.fed_avgm(0.5, 0.8), lambda d: avgm(d, 0.5, 0.8, False)),
    "fed_avgm, nesterov": (server.fed_avgm(0.5, 0.8, nesterov=True), lambda d: avgm(d, 0.5, 0.8, True)),
    "nesterov": (server.nesterov(), lambda d: avgm(d, 0.7, 0.9, True)),
    "fed_adagrad": (server.fed_adagrad(0.1), lambda d: fed_opt(d, "adagrad", 0.1, 0.0, 0.0, 1e-3)),
    "fed_adagrad, momentum": (
        server.fed_adagrad(0.1, beta1=0.9, tau=0.1),
        lambda d: fed_opt(d, "adagrad", 0.1, 0.9, 0.0, 0.1),
    ),
    "fed_adam": (server.fed_adam(0.1), lambda d: fed_opt(d, "adam", 0.1, 0.9, 0.99, 1e-3)),
    "fed_yogi": (server.fed_yogi(0.1), lambda d: fed_opt(d, "yogi", 0.1, 0.9, 0.99, 1e-3)),
    "fed_yogi, others": (
        server.fed_yogi(0.3, beta1=0.5, beta2=0.7, tau=0.2),
        lambda d: fed_opt(d, "yogi", 0.3, 0.5, 0.7, 0.2),
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_each_equals_its_paper(name: str) -> None:
    rule, paper = PAPERS[name]
    deltas = [draw(number) for number in range(1, 9)]
    steps = run(rule, deltas)
    for parameter in ("weight", "bias"):
        reference = paper([delta[parameter].numpy() for delta in deltas])
        for step, expected in zip(steps, reference, strict=True):
            np.testing.assert_allclose(step[parameter].numpy(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs(nesterov: bool) -> None:
    deltas = [draw(number) for number in range(1, 6)]
    ours = run(server.fed_avgm(0.7, 0.9, nesterov), deltas)
    theirs = run(server.from_torch(SGD, lr=0.7, momentum=0.9, nesterov=nesterov), deltas)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["weight"], b["weight"], rtol=1e-13, atol=1e-13)


def test_yogi_forgets_large_deltas_more_slowly_than_adam() -> None:
    big, small = {"w": torch.full((1,), 10.0).double()}, {"w": torch.full((1,), 0.1).double()}
    adam, yogi = (run_one(rule, [big, *[small] * 50]) for rule in (server.scale_by_adam(), server.scale_by_yogi()))
    assert yogi < 0.9 * adam


def run_one(rule: ServerOptimizer, deltas: list[Params]) -> float:
    state = rule.init({"w": torch.zeros(1, dtype=torch.float64)})
    for delta in deltas:
        step, state = rule.update(delta, state, {"w": torch.zeros(1, dtype=torch.float64)})
    return float(step["w"])


# ---- flwr 1.42, whose second moment starts at 0 unless it is set, and whose FedAdam corrects the bias

START = [1.0, -2.0, 0.5]
DELTAS = [[0.5, -0.25, 2.0], [-0.125, 0.5, 0.0], [0.25, 0.25, -1.0]]


def adams_correction(step: int) -> float:
    """flwr's, in which the first round counts as the second step."""
    return float(np.sqrt(1 - 0.99 ** (step + 2)) / (1 - 0.9 ** (step + 2)))


FLWR: dict[str, tuple[ServerOptimizer, dict[str, float], list[list[float]]]] = {
    "FedAvgM": (
        server.fed_avgm(0.5),
        {"server_learning_rate": 0.5, "server_momentum": 0.9},
        [[0.75, -1.875, -0.5], [0.5875, -2.0125, -1.4], [0.31625, -2.26125, -1.71]],
    ),
    "FedAdagrad": (
        server.fed_adagrad(0.1),
        {"eta": 0.1, "tau": 1e-3},
        [
            [0.9001998000002, -1.9003992000032, 0.40004998750000076],
            [0.9244063493340255, -1.9896820622114275, 0.40004998750000076],
            [0.8808388952585683, -2.030440279024216, 0.4447513515221323],
        ],
    ),
    "FedAdam": (
        server.scheduled(server.fed_adam(0.1), lr_scheduler.LambdaLR, lr_lambda=adams_correction),
        {"eta": 0.1, "tau": 1e-3},
        [
            [0.9272239503835329, -1.9286639393885463, 0.4261243137966302],
            [0.8877096580338142, -1.9594237570850037, 0.36888968598266253],
            [0.8335717697671776, -2.0057864318917664, 0.3528287195352902],
        ],
    ),
    "FedYogi": (
        server.fed_yogi(0.1),
        {"eta": 0.1, "tau": 1e-3},
        [
            [0.9019800019996002, -1.9039200319744256, 0.40049875000781243],
            [0.8401324000400572, -1.9522413978091258, 0.31094762501484363],
            [0.7470647386338691, -2.0321669724106917, 0.28334410482280337],
        ],
    ),
}


@pytest.mark.parametrize("name", FLWR)
def test_each_gives_flwrs_numbers(name: str) -> None:
    rule, _, expected = FLWR[name]
    params = {"w": torch.tensor(START, dtype=torch.float64)}
    state = rule.init(params)
    for delta, weights in zip(DELTAS, expected, strict=True):
        step, state = rule.update({"w": torch.tensor(delta, dtype=torch.float64)}, state, params)
        params = {"w": params["w"] - step["w"]}
        np.testing.assert_allclose(params["w"].numpy(), weights, rtol=1e-12)


@pytest.mark.parametrize("name", FLWR)
def test_flwrs_numbers_are_flwrs(name: str) -> None:
    strategies = pytest.importorskip("flwr.server.strategy")
    common = pytest.importorskip("flwr.common")
    _, options, expected = FLWR[name]
    weights = np.array(START)
    strategy = getattr(strategies, name)(initial_parameters=common.ndarrays_to_parameters([weights]), **options)
    strategy.v_t = [np.full(3, options.get("tau", 0.0) ** 2)]
    for round, (delta, after) in enumerate(zip(DELTAS, expected, strict=True), start=1):
        sent = common.ndarrays_to_parameters([weights - delta])
        answer = common.FitRes(common.Status(common.Code.OK, ""), sent, 1, {})
        weights = common.parameters_to_ndarrays(strategy.aggregate_fit(round, [(None, answer)], [])[0])[0]
        np.testing.assert_allclose(weights, after, rtol=1e-12)


# ---- FedExP


def test_fed_exp_steps_further_where_clients_disagree() -> None:
    """The step of arXiv 2301.09604, with weights p_k in the place of 1/M."""
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    clients = [[{"w": torch.from_numpy(rng.normal(0.2, size=(2, 2)))} for _ in p] for _ in range(4)]
    deltas, norms, expected = [], [], []
    for updates in clients:
        stack = np.stack([update["w"].numpy().ravel() for update in updates])
        mean = p @ stack
        norms.append(float(p @ (stack**2).sum(1)))
        deltas.append({"w": torch.from_numpy(mean.reshape(2, 2))})
        expected.append(max(1.0, norms[-1] / (2 * (mean @ mean + 0.01))) * mean)
    assert any(np.linalg.norm(e) > 1.2 * d["w"].norm() for e, d in zip(expected, deltas, strict=True))
    rule = server.fed_exp(epsilon=0.01)
    assert rule.reads_norms
    for delta, norm, step in zip(deltas, norms, expected, strict=True):
        moved, _ = rule.update(delta, rule.init(delta), delta, norm)
        np.testing.assert_allclose(moved["w"].numpy().ravel(), step, rtol=1e-13)


def test_fed_exp_never_steps_less_than_fed_avg() -> None:
    delta = draw(1)
    agreeing = sum(float(value.square().sum()) for value in delta.values())
    (step,) = run(server.fed_exp(), [delta], norms=[agreeing])
    assert all(torch.equal(step[name], delta[name]) for name in delta)


def test_fed_exp_bears_a_mean_of_zero() -> None:
    zero = {name: torch.zeros_like(value) for name, value in draw(0).items()}
    (step,) = run(server.fed_exp(), [zero], norms=[4.0])
    assert all((value == 0).all() for value in step.values())


# ---- compositions


def test_what_reads_norms_hands_them_through_chains_and_schedules() -> None:
    built = server.scheduled(server.chain(server.fed_exp(0.5), server.scale(0.5)), lr_scheduler.ConstantLR, factor=0.5)
    assert built.reads_norms
    delta = {"w": torch.tensor([1.0], dtype=torch.float64)}
    step, _ = built.update(delta, built.init(delta), delta, 9.0)
    assert step["w"].item() == 3.0 * 0.5 * 0.5  # 9 / (2 * (1 + 0.5)) = 3


def test_chain_is_one_after_the_other() -> None:
    deltas = [draw(number) for number in range(1, 5)]
    chained = run(server.chain(server.trace(0.5), server.scale_by_adam(), server.scale(0.3)), deltas)
    smooth = run(server.trace(0.5), deltas)
    adam = run(server.scale_by_adam(), smooth)
    for ours, theirs in zip(chained, adam, strict=True):
        assert torch.equal(ours["weight"], 0.3 * theirs["weight"])


def test_only_the_first_of_a_chain_may_read_norms() -> None:
    with pytest.raises(ValueError, match="argument 1 reads the norms of the clients' deltas"):
        server.chain(server.scale(0.5), server.fed_exp())


SCHEDULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "StepLR": (lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.1}),
    "MultiStepLR": (lr_scheduler.MultiStepLR, {"milestones": [2, 5]}),
    "CosineAnnealingLR": (lr_scheduler.CosineAnnealingLR, {"T_max": 10, "eta_min": 0.1}),
    "OneCycleLR": (lr_scheduler.OneCycleLR, {"max_lr": 1.0, "total_steps": 12}),
    "CyclicLR": (lr_scheduler.CyclicLR, {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3}),
    "LambdaLR": (lr_scheduler.LambdaLR, {"lr_lambda": adams_correction}),
    "SequentialLR": (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[4],
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_torch_scheduler_multiplies_the_step(name: str) -> None:
    scheduler, options = SCHEDULES[name]
    rule = server.scheduled(server.fed_avgm(1.0, 0.5), scheduler, **options)
    deltas = [draw(number) for number in range(1, 11)]
    weight = torch.nn.Parameter(torch.ones(1))
    plain = SGD([weight], lr=1.0, momentum=0.5)
    schedule = scheduler(plain, **options)
    bare = run(server.fed_avgm(1.0, 0.5), deltas)
    for step, unscaled in zip(run(rule, deltas), bare, strict=True):
        rate = plain.param_groups[0]["lr"]
        torch.testing.assert_close(step["bias"], rate * unscaled["bias"], rtol=1e-14, atol=0)
        plain.step()
        schedule.step()


def test_a_schedule_resumes_in_another_process() -> None:
    """A fresh rule with the state of a checkpoint goes on to the same bits, and so does one that was pickled."""
    build = lambda: server.scheduled(server.fed_adam(0.1), lr_scheduler.CosineAnnealingLR, T_max=10)  # noqa: E731
    whole, params = build(), draw(0)
    state = whole.init(params)
    for number in range(1, 6):
        _, state = whole.update(draw(number), state, params)
    expected = whole.update(draw(6), state, params)
    for rule in (build(), pickle.loads(pickle.dumps(whole))):
        step, after = rule.update(draw(6), saved(state), params)
        assert all(torch.equal(step[name], expected[0][name]) for name in params)
        assert str(after) == str(expected[1])


STATEFUL = [
    server.fed_avgm(),
    server.fed_adam(),
    server.fed_yogi(),
    server.fed_adagrad(),
    server.scheduled(server.nesterov(), lr_scheduler.StepLR, step_size=1),
]


@pytest.mark.parametrize("rule", STATEFUL)
def test_the_state_follows_the_parameters_by_name(rule: ServerOptimizer) -> None:
    """A layer that is frozen leaves, one that is unfrozen starts afresh, the others go on regardless."""
    both, weight_only = draw(0), {"weight": draw(0)["weight"]}
    state = rule.init(both)
    alone = rule.init(weight_only)
    for number, names in enumerate([["weight", "bias"], ["weight"], ["bias", "weight"]], start=1):
        delta = {name: draw(number)[name] for name in names}
        step, state = rule.update(delta, state, {name: both[name] for name in names})
        expected, alone = rule.update({"weight": delta["weight"]}, alone, weight_only)
        assert list(step) == names
        assert torch.equal(step["weight"], expected["weight"])
    if state["optimizer"] != "scheduled":
        afresh, _ = rule.update({"bias": delta["bias"]}, rule.init({"bias": both["bias"]}), {"bias": both["bias"]})
        assert torch.equal(step["bias"], afresh["bias"])


@given(factor=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_adaptive_steps_hardly_follow_scale_and_linear_ones_do(factor: float, seed: int) -> None:
    delta = {"w": torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1}
    larger = {"w": factor * delta["w"]}
    for rule, power in ((server.fed_avgm(), 1), (server.fed_adagrad(tau=1e-9), 0), (server.fed_adam(tau=1e-9), 0)):
        (a, _), (b, _) = (rule.update(d, rule.init(delta), delta) for d in (delta, larger))
        torch.testing.assert_close(b["w"], factor**power * a["w"], rtol=1e-5, atol=0)


def test_follows_scale_knows_them_apart() -> None:
    assert [server.follows_scale(server.by_name(name)) for name in ("fed_avgm", "nesterov", "fed_exp")] == [True] * 3
    assert [server.follows_scale(server.by_name(name)) for name in ("fed_adam", "fed_yogi")] == [False] * 2


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: server.fed_avgm(lr=-1.0), ValueError, "lr=-1.0: pass a finite number above 0"),
        (lambda: server.fed_avgm(momentum=1.0), ValueError, r"momentum=1.0: pass a number in \[0, 1\)"),
        (lambda: server.nesterov(momentum="0.9"), TypeError, "momentum='0.9': pass a number"),  # type: ignore[arg-type]
        (lambda: server.fed_adam(beta1=1.0), ValueError, "beta1=1.0: pass"),
        (lambda: server.fed_yogi(beta2=-0.1), ValueError, "beta2=-0.1: pass"),
        (lambda: server.fed_adagrad(tau=0), ValueError, "tau=0: pass a finite number above 0"),
        (lambda: server.fed_exp(epsilon=0.0), ValueError, "epsilon=0.0: pass a finite number above 0"),
        (lambda: server.scale(float("nan")), ValueError, "factor=nan: pass a finite number above 0"),
        (lambda: server.chain(), ValueError, "at least one"),
        (lambda: server.chain(server.fed_adam), TypeError, "argument 0 is <function fed_adam"),  # type: ignore[arg-type]
        (lambda: server.scheduled(SGD, lr_scheduler.StepLR), TypeError, "scheduled: rule=.*: pass a server optimizer"),  # type: ignore[arg-type]
        (
            lambda: server.scheduled(server.fed_avg(), lr_scheduler.StepLR),
            TypeError,
            r"StepLR\(\) .*missing.*step_size",
        ),
        (
            lambda: server.scheduled(server.fed_avg(), lr_scheduler.ReduceLROnPlateau),
            TypeError,
            "ReduceLROnPlateau follows a metric",
        ),
        (lambda: server.by_name("fedadam"), ValueError, "Did you mean 'fed_adam'"),
        (lambda: server.by_name("from_torch"), ValueError, r"needs optimizer: pass an object, from_torch"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()
