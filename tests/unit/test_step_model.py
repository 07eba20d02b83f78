"""The model of a step's time: what it counts, and in which direction each count moves the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_fedscale.core.executors.machine import BUILT_IN, Machine
from lightning_fedscale.core.executors.step_model import WEIGHTS, Counts, Forecast, StepCounts, StepModel

CPU = BUILT_IN["cpu"]
ONLY_CALLS, ONLY_FLOPS, ONLY_BYTES = Machine(1.0, 0.0, 0.0), Machine(1e-30, 1.0, 0.0), Machine(1e-30, 0.0, 1.0)


def counted(module: nn.Module, inputs: torch.Tensor) -> Counts:
    counts = StepCounts()
    with counts.of_client():
        module(inputs).sum().backward()
    return counts.alone


def step(**given: Any) -> StepCounts:
    """A small perceptron's step; the vectorized one was counted with three clients."""
    counts = StepCounts()
    counts.alone = Counts(calls=20, flops=4e5, moved=2e5)
    counts.joint, counts.joint_clients = Counts(calls=45, views=44, flops=12e5, moved=6e5), 3
    counts.optimizer, counts.optimizer_clients = Counts(calls=6, moved=3e5), 3
    for name, value in given.items():
        setattr(counts, name, value)
    return counts


def test_a_linear_layer_is_counted() -> None:
    found = counted(nn.Linear(8, 4, bias=False), torch.ones(2, 8))
    assert found.flops == 2 * 2 * 8 * 4 * 2  # forward, and the gradient of the weight
    assert found.layers == found.layer_flops == 0
    assert found.calls >= 3
    assert found.views >= 1
    assert found.moved >= 4 * (2 * 8 + 8 * 4 + 2 * 4) * 2


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3), nn.Sequential(nn.Flatten(0, 1), nn.LSTM(5, 4), nn.Identity())])
def test_layers_with_kernels_of_their_own_are_counted_apart(layer: nn.Module) -> None:
    class First(nn.Module):
        def forward(self, inputs: torch.Tensor) -> Any:
            result = layer(inputs)
            return result[0] if isinstance(result, tuple) else result

    found = counted(First(), torch.ones(1, 2, 5, 5))
    assert found.layers == 2
    assert found.layer_flops > 0
    assert found.flops == 0


def test_only_the_first_step_of_each_kind_is_counted() -> None:
    counts = StepCounts()
    for size in (2, 3):
        with counts.of_client(), counts.of_clients(size), counts.of_optimizer(size):
            torch.ones(size, size) @ torch.ones(size, size)
    assert counts.alone.flops == counts.joint.flops == counts.optimizer.flops == 2 * 2**3
    assert counts.joint_clients == counts.optimizer_clients == 2


def test_counting_changes_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    gradients = []
    for count in (False, True):
        torch.manual_seed(1)
        module.zero_grad()
        if count:
            counted(module, torch.ones(4, 8))
        else:
            module(torch.ones(4, 8)).sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_calls_are_shared_by_clients_and_work_is_not() -> None:
    for machine, shared in ((ONLY_CALLS, True), (ONLY_FLOPS, False), (ONLY_BYTES, False)):
        model = StepModel(step(), machine, weights=WEIGHTS._replace(client=0.0))
        few, many = model.vectorized(2), model.vectorized(20)
        assert few / many == pytest.approx(10.0 if shared else 1.0)


def test_more_clients_gain_more_and_more_work_less() -> None:
    gains = [Forecast(StepModel(step(), CPU), clients, True, 0.0).gain for clients in (1, 2, 5, 10, 100)]
    assert gains == sorted(gains)
    assert gains[0] < 1.0 < gains[-1]
    wide = step(alone=Counts(20, flops=4e9, moved=2e5), joint=Counts(45, 44, flops=12e9, moved=6e5))
    assert Forecast(StepModel(wide, CPU), 100, True, 0.0).gain < 1.1


def test_steps_that_cannot_be_captured_gain_less() -> None:
    captured = Forecast(StepModel(step(), CPU), 10, True, 0.0)
    assert captured._replace(captured=False).gain < captured.gain / 1.5


def test_accumulation_spreads_the_step_of_the_optimizer() -> None:
    one, four = (StepModel(step(), ONLY_CALLS, accumulation) for accumulation in (1, 4))
    assert one.sequential() - four.sequential() == pytest.approx(WEIGHTS.optimizer * 6 * 3 / 4)


@pytest.mark.parametrize("clients", [1, 3, 100, 10_000])
def test_the_bound_bounds(clients: int) -> None:
    """What cannot gain even if calls took no time is not tried."""
    for calls, flops in ((20, 4e5), (20, 4e8), (400, 4e6)):
        counts = step(alone=Counts(calls, flops=flops, moved=2e5), joint=Counts(2 * calls, flops=3 * flops, moved=6e5))
        model = StepModel(counts, CPU)
        assert model.sequential() / model.vectorized(clients) <= model.most()


def test_a_step_is_described() -> None:
    assert StepModel(step(), CPU).described() == "20 operators, 0.4 MFLOP and 0.2 MB a local batch"
