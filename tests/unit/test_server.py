"""Server optimizers against plain torch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from lightning_fedscale.server import ServerOptimizer, fed_avg, from_torch

CASES: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 1.0}),
    (SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (Adam, {"lr": 0.1, "amsgrad": True}),
    (Adagrad, {"lr": 0.1}),
    (partial(SGD, momentum=0.5), {"lr": 0.1}),
]


def draw(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weight": torch.randn(3, 2, dtype=torch.float64, generator=generator),
        "bias": torch.randn(4, dtype=torch.float64, generator=generator),
    }


@pytest.mark.parametrize(("optimizer", "options"), CASES)
@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_from_torch_equals_plain_torch(
    optimizer: Callable[..., Optimizer], options: dict[str, Any], through_checkpoint: bool
) -> None:
    plain = {name: nn.Parameter(value) for name, value in draw(0).items()}
    reference = optimizer(list(plain.values()), **options)
    rule, params = from_torch(optimizer, **options), draw(0)
    state = rule.init(params)
    for number in range(1, 6):
        delta = draw(number)
        for name, parameter in plain.items():
            parameter.grad = delta[name].clone()
        reference.step()
        step, state = rule.update(delta, state, params)
        params = {name: params[name] - step[name] for name in params}
        if through_checkpoint:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        for name, parameter in plain.items():
            # The step is a difference of weights: subtracting it again rounds once more.
            torch.testing.assert_close(params[name], parameter.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("optimizer", "options"), CASES)
def test_update_is_pure(optimizer: Callable[..., Optimizer], options: dict[str, Any]) -> None:
    rule, params = from_torch(optimizer, **options), draw(0)
    _, state = rule.update(draw(1), rule.init(params), params)
    arguments = (draw(2), state, params)
    kept = copy.deepcopy(arguments)
    first = rule.update(*arguments)
    assert str(arguments) == str(kept)
    assert all(torch.equal(params[name], kept[2][name]) for name in params)
    again = rule.update(*arguments)
    assert all(torch.equal(first[0][name], again[0][name]) for name in params)
    assert str(first[1]) == str(again[1])


def test_from_torch_with_learning_rate_one_is_fed_avg() -> None:
    params, delta = draw(0), draw(1)
    for rule in (from_torch(SGD, lr=1.0), fed_avg()):
        step, _ = rule.update(delta, rule.init(params), params)
        for name in params:
            torch.testing.assert_close(step[name], delta[name], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("lr", [1.0, 0.5, 2])
def test_fed_avg_scales_the_delta(lr: float) -> None:
    params, delta = draw(0), draw(1)
    rule = fed_avg(lr)
    step, state = rule.update(delta, rule.init(params), params)
    assert all(torch.equal(step[name], delta[name] * lr) for name in params)
    assert state == {}
    assert all(torch.equal(delta[name], value) for name, value in draw(1).items())


def test_fed_avg_is_exact_with_learning_rate_one() -> None:
    params, delta = draw(0), draw(1)
    step, _ = fed_avg().update(delta, {}, params)
    assert all(torch.equal(step[name], delta[name]) for name in params)


def test_optimizers_for_matrices_only_are_accepted() -> None:
    muon = getattr(torch.optim, "Muon", SGD)  # not in the oldest torch that we admit
    assert isinstance(from_torch(muon, lr=0.1), ServerOptimizer)


@pytest.mark.parametrize("saved", [fed_avg(), from_torch(Adam)])
def test_state_of_another_optimizer_is_refused(saved: ServerOptimizer) -> None:
    params = draw(0)
    _, state = saved.update(draw(1), saved.init(params), params)
    with pytest.raises(ValueError, match=r"server_optimizer=SGD: the checkpoint has the state of"):
        from_torch(SGD).update(draw(2), state, params)
