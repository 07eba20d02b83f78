"""Longer steps of torch's optimizers, against the same steps at another learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_fedscale.callbacks.critical_phase.update_scaling import UpdateScaling

FACTORS = [1.0, 2.0, 4.0, 1.0, 2.0]


def trained(make: Any, factors: list[float], how: str, scale_weight_decay: bool = False) -> torch.Tensor:
    """Some steps on fixed gradients, factors in UpdateScaling ("ours") or the learning rate ("by hand")."""
    weight = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    optimizer: Optimizer = make([weight])
    rate = optimizer.param_groups[0]["lr"]
    scaling = UpdateScaling(optimizer, scale_weight_decay)
    generator = torch.Generator().manual_seed(0)
    for factor in factors:
        weight.grad = torch.randn(7, generator=generator, dtype=torch.float64)
        if how == "ours":
            scaling.apply(factor)
        else:
            optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.step()
        if how == "ours":
            assert optimizer.param_groups[0]["lr"] == rate
    return weight.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1),
        lambda p: Adam(p, lr=0.1),
        lambda p: AdamW(p, lr=0.1, weight_decay=0.0),
        lambda p: RMSprop(p, lr=0.1),
        lambda p: Adagrad(p, lr=0.1),
        lambda p: NAdam(p, lr=0.1),
    ],
)
def test_equals_another_learning_rate_bit_for_bit(make: Any) -> None:
    assert torch.equal(trained(make, FACTORS, "ours"), trained(make, FACTORS, "by hand"))


def test_momentum_takes_in_scaled_gradients() -> None:
    ours = trained(lambda p: SGD(p, lr=0.1, momentum=0.9), [2.0, 1.0], "ours")
    weight, velocity = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for factor in (2.0, 1.0):
        velocity = 0.9 * velocity + factor * torch.randn(7, generator=generator, dtype=torch.float64)
        weight = weight - 0.1 * velocity
    assert torch.allclose(ours, weight, rtol=1e-14)


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_weight_decay_is_scaled_only_if_asked(make: Callable[..., Optimizer]) -> None:
    decay, rate, factor = 0.3, 0.1, 2.0

    def moved(decay: float, scale_weight_decay: bool) -> torch.Tensor:
        return trained(lambda p: make(p, lr=rate, weight_decay=decay), [factor], "ours", scale_weight_decay)

    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    without = moved(0.0, False)
    assert torch.allclose(moved(decay, False), without - rate * decay * start, rtol=1e-12)
    assert torch.allclose(moved(decay, True), without - factor * rate * decay * start, rtol=1e-12)


def test_what_is_not_stepped_is_restored() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.2)
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    scaling = UpdateScaling(optimizer)
    weight.grad = torch.ones(2)
    scaling.apply(3.0)
    scaling.apply(3.0)  # a step that was skipped must not add up
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    scaling.restore()
    assert {name: value for name, value in optimizer.param_groups[0].items() if name != "params"} == before
    scaling.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_learning_rates_may_be_tensors() -> None:
    rate = torch.tensor(0.1)
    weight = torch.ones(2, requires_grad=True)
    optimizer = Adam([weight], lr=rate)
    scaling = UpdateScaling(optimizer)
    weight.grad = torch.ones(2)
    scaling.apply(2.0)
    optimizer.step()
    assert weight.detach().tolist() == pytest.approx([0.8, 0.8])
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
