"""The server's step into the module, and which numbers may stop it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale.aggregators import mean
from lightning_fedscale.core.executors import client_delta, shared_tensors_of
from lightning_fedscale.core.executors.client_delta import Deltas
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.round.server_step import GlobalModel
from lightning_fedscale.server import ServerOptimizer, fed_avg
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils import flat_view
from lightning_fedscale.utils.buffers import BufferPolicies
from lightning_fedscale.utils.flat_view import FlatView

HUGE = 1.5e308  # the sum of two is infinite


class Model(nn.Module):
    """Trainable weights, a frozen one, a mask and a counter."""

    mask: Tensor
    counter: Tensor

    def __init__(self, weight: float = 1.0, frozen: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), weight, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), frozen, dtype=torch.float64), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("counter", torch.tensor(5))


def moved(model: Model, delta: list[float], rule: ServerOptimizer | None = None, training: bool = True) -> Tensor:
    """Move by the delta of a single client; returns the aggregate."""
    shared = shared_tensors_of(model, policies=BufferPolicies((("counter", "mean"),)))
    server = shared.view.copy()
    kept = [tensor.clone() for tensor in server.tensors]
    plan = RoundPlan(4, np.array([0]), np.array([0]))
    table, aggregator = RoundTable(plan, 1), mean()
    update = ClientUpdate(0, torch.tensor(delta, dtype=torch.float64), 1.0, 2, 2, 1, 0.5, 0.1)
    table.clients.add(update, 2.0, (0, 0), (0.0, 0.0))
    cohort = Cohort(4, plan.cohort, 1, shared.view.trainable, 0)
    total = aggregator.accumulate(aggregator.init(shared.view.zeros(), cohort), update, 2.0, cohort)
    model_of_server = GlobalModel(AlgorithmOptions(None, None, None, aggregator, ()), rule or fed_avg())
    aggregate = model_of_server.aggregate(server, total, table, cohort)
    model_of_server.move(shared, server, aggregate, cohort, training=training)
    assert all(torch.equal(now, then) for now, then in zip(server.tensors, kept, strict=True))
    return aggregate


# In the vector's order: weight, mask, counter, frozen. Where the mask is not finite, deltas count from zero.
DELTA = [0.5, 0.25, -1.0, 0.125, math.inf, -1.4, 1.0, 0.0]


def test_parameters_take_the_step_and_the_rest_the_mean() -> None:
    model = Model()
    assert moved(model, DELTA, fed_avg(lr=0.5)).tolist() == DELTA
    assert model.weight.tolist() == [0.75, 0.875, 1.5]
    assert model.mask.tolist() == [-0.125, -math.inf]
    assert model.counter.item() == 6  # 6.4
    assert model.frozen.tolist() == [1.0, 2.0]


def test_without_training_only_the_rest_moves() -> None:
    model = Model()
    moved(model, DELTA, training=False)
    assert model.weight.tolist() == [1.0, 1.0, 1.0]
    assert model.counter.item() == 6
    assert model.frozen.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("training", [True, False])
def test_finite_numbers_whose_sum_is_not_are_no_error(training: bool) -> None:
    model = Model(weight=HUGE, frozen=HUGE)
    moved(model, [0.0] * 4 + [math.inf] + [0.0] * 3, training=training)
    assert model.weight.tolist() == [HUGE] * 3
    assert model.frozen.tolist() == [HUGE] * 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [1.0, HUGE])
def test_a_step_that_is_not_finite_stops_training(wrong: float, weight: float) -> None:
    def update(delta: Any, state: Any, params: Any) -> Any:
        return {"weight": torch.tensor([0.0, wrong, 0.0], dtype=torch.float64)}, state

    with pytest.raises(RuntimeError, match="server_optimizer: its step in round 4 has NaN or infinite values"):
        moved(Model(weight), DELTA, ServerOptimizer(lambda params: {}, update))


def test_what_a_server_optimizer_keeps_of_its_arguments_stays_what_it_was() -> None:
    seen: list[Any] = []

    def update(delta: Any, state: Any, params: Any) -> Any:
        seen.append((delta["weight"], params["weight"]))
        return delta, state

    moved(Model(), DELTA, ServerOptimizer(lambda params: {}, update))
    assert [tensor.tolist() for tensor in seen[0]] == [DELTA[:3], [1.0] * 3]


def test_deltas_count_from_zero_where_the_global_model_is_not_finite() -> None:
    shared = shared_tensors_of(Model(frozen=HUGE))
    server = shared.view.read()
    assert shared.origin(server).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 5.0, HUGE, HUGE]
    assert server[4] == -math.inf
    finite = Model(frozen=HUGE)
    finite.mask.zero_()
    shared = shared_tensors_of(finite)
    server = shared.view.read()
    assert shared.origin(server) is server


@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_deltas_are_the_same_in_pieces(most: int) -> None:
    module = Model(frozen=2.0)
    module.register_buffer("wide", torch.arange(30, dtype=torch.bfloat16).view(5, 6).t())
    shared = shared_tensors_of(module)
    server, before = shared.view.copy(), shared.origin(shared.view.read())
    for tensor in shared.view.tensors:
        tensor.add_(3)
    with mock.patch.object(client_delta, "elements_at_once", return_value=most):
        assert torch.equal(Deltas(shared, server).of(None).vector(), before - shared.view.read())


def norm_of(moved: list[float], carried: list[float], server: list[float]) -> float:
    """The norm of the delta with these elements, in parts of every size."""
    found = []
    for most in (1, 3, 1000):
        with mock.patch.multiple(flat_view, ONE_PART=0, elements_at_once=lambda device, most=most: most):
            view = FlatView([torch.full((2,), 9.0, dtype=torch.float64)], [torch.tensor(server, dtype=torch.float64)])
            shared: Any = SimpleNamespace(view=view, origin=lambda vector: vector)
            deltas, origin = Deltas(shared, view.copy()), view.read()
        view.write(origin.nan_to_num(0.0, 0.0, 0.0) - torch.tensor([*moved, *carried], dtype=torch.float64))
        found.append(deltas.of(None).norm())
    assert all(each == found[0] or math.isnan(found[0]) for each in found)
    return found[-1]


@pytest.mark.parametrize(
    ("carried", "server", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 5.0),
        ([HUGE, HUGE], [0.0, 0.0], 5.0),
        ([math.inf, 1.0], [-math.inf, 0.0], 5.0),
        ([math.inf, 1.0], [0.0, -math.inf], math.nan),
        ([math.nan, 1.0], [0.0, 0.0], math.nan),
        ([], [], 5.0),
    ],
)
def test_norm_of_an_update(carried: list[float], server: list[float], expected: float) -> None:
    found = norm_of([3.0, 4.0], carried, server)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_norm_of_an_update_that_is_not_finite(wrong: float) -> None:
    assert math.isnan(norm_of([3.0, wrong], [], []))
