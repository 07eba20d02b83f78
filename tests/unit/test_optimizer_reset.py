"""A client's optimizer made fresh in the same memory takes the steps of a new one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lightning_fedscale.core.client_state import OptimizerKeeper

WAYS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}]
FUSED: list[dict[str, Any]] = [*WAYS, {"fused": True}]
DECAY: list[dict[str, Any]] = [{}, {"weight_decay": 0.1}]
MAXIMIZE: list[dict[str, Any]] = [{}, {"maximize": True}]


def product(*choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{}]
    for choice in choices:
        made = [{**one, **other} for one in made for other in choice]
    return made


Case = tuple[Callable[..., Optimizer], dict[str, Any]]
"""The class of an optimizer and its arguments, besides those of every one."""

AMSGRAD: list[dict[str, Any]] = [{}, {"amsgrad": True}]
KNOWN: list[Case] = [
    *((Adam, options) for options in product(FUSED, AMSGRAD, DECAY, MAXIMIZE)),
    *((AdamW, options) for options in product(FUSED, AMSGRAD, MAXIMIZE)),
    *((RAdam, options) for options in product(WAYS, DECAY, [{}, {"decoupled_weight_decay": True}], MAXIMIZE)),
    *((NAdam, options) for options in product(WAYS, DECAY, [{}, {"decoupled_weight_decay": True}], MAXIMIZE)),
    *((Adamax, options) for options in product(WAYS, DECAY, MAXIMIZE)),
    *((Adadelta, options) for options in product(WAYS, DECAY, MAXIMIZE)),
    *(
        (RMSprop, options)
        for options in product(WAYS, DECAY, MAXIMIZE, [{}, {"momentum": 0.9}], [{}, {"centered": True}])
    ),
]
NOT_KNOWN: list[Case] = [
    *((SGD, {"momentum": 0.9, **options}) for options in (*WAYS, {"nesterov": True}, {"dampening": 0.5})),
    (Adagrad, {"initial_accumulator_value": 0.1}),
    (Rprop, {}),
    (type("Derived", (Adam,), {}), {}),
]


def name_of(case: Any) -> str:
    return f"{case[0].__name__}-{','.join(f'{k}={v}' for k, v in case[1].items())}"


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (4,), ())]
    with torch.no_grad():
        made[0][0] = torch.tensor([0.0, -0.0, 1.0])
    return made


def train(optimizer: Optimizer, seed: int, spoilt: bool = False) -> None:
    """Three steps; the last parameter gets no gradient in the first of them, and some gradients are signed zeros."""
    generator = torch.Generator().manual_seed(seed)
    mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(3):
        for parameter in mine:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        mine[0].grad[0] = torch.tensor([-0.0, -0.0, 0.0])
        if spoilt:
            mine[0].grad[1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        if step == 0:
            mine[-1].grad = None
        optimizer.step()


def bits(of: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone().reshape(-1).view(torch.uint8) for parameter in of]


def put(into: list[nn.Parameter], what: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter, value in zip(into, what, strict=True):
            parameter.copy_(value)


def memory(optimizer: Optimizer) -> list[int]:
    return [
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]


def switched(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """The second of two clients that share an optimizer; also whether it found its state in the first one's memory."""
    kind, options = case
    shared = parameters(dtype)
    optimizer = kind(shared, lr=0.1, **options)
    keeper = OptimizerKeeper(optimizer)
    keeper.open_round()
    keeper.load(None)
    train(optimizer, seed=1, spoilt=True)
    before = memory(optimizer)
    put(shared, parameters(dtype))
    keeper.load(None)
    reused = bool(before) and memory(optimizer) == before
    train(optimizer, seed=2)
    return bits(shared), reused


def alone(case: Case, dtype: torch.dtype) -> list[Tensor]:
    own = parameters(dtype)
    train(case[0](own, lr=0.1, **case[1]), seed=2)
    return bits(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", KNOWN, ids=name_of)
def test_refilled_state_takes_the_steps_of_a_new_optimizer(case: Case, dtype: torch.dtype) -> None:
    got, reused = switched(case, dtype)
    assert reused
    assert all(map(torch.equal, got, alone(case, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", NOT_KNOWN, ids=name_of)
def test_where_it_is_not_known_how_the_state_is_made_anew(case: Case, dtype: torch.dtype) -> None:
    got, reused = switched(case, dtype)
    assert not reused
    assert all(map(torch.equal, got, alone(case, dtype)))


def _amsgrad(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["amsgrad"] = True


def _differentiable(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["differentiable"] = True


def _own_key(optimizer: Optimizer) -> None:
    optimizer.state["mine"] = 3  # type: ignore[index]


def _own_state(optimizer: Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["mine"] = torch.ones(2)


def _own_option(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["mine"] = 3


def _less(optimizer: Optimizer) -> None:
    del optimizer.param_groups[0]["maximize"]


@pytest.mark.parametrize("change", [_amsgrad, _differentiable, _own_key, _own_state, _own_option, _less])
def test_a_client_that_meddles_with_its_optimizer_leaves_the_next_one_a_new_state(
    change: Callable[[Optimizer], None],
) -> None:
    shared = parameters()
    optimizer = Adam(shared, lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    keeper.load(None)
    train(optimizer, seed=1)
    change(optimizer)
    keeper.load(None)
    assert dict(optimizer.state) == {}
    assert set(optimizer.param_groups[0]) == {"params", *optimizer.defaults}
    put(shared, parameters())
    train(optimizer, seed=2)
    assert all(map(torch.equal, bits(shared), alone((Adam, {}), torch.float32)))


def test_a_client_that_lowers_its_learning_rate_does_so_for_itself() -> None:
    shared = parameters()
    optimizer = Adam(shared, lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    keeper.load(None)
    train(optimizer, seed=1)
    optimizer.param_groups[0]["lr"] = 0.01
    before = memory(optimizer)
    keeper.load(None)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert memory(optimizer) == before


def test_states_that_were_kept_or_loaded_are_never_written_over() -> None:
    shared = parameters()
    optimizer = Adam(shared, lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    keeper.load(None)
    train(optimizer, seed=1)
    kept = keeper.unload()
    steps = [float(state["step"]) for state in kept["state"].values()]
    moments = [state["exp_avg"].clone() for state in kept["state"].values()]
    for load in (None, kept, None, kept):
        keeper.load(load)
        assert not set(memory(optimizer)) & {state["exp_avg"].data_ptr() for state in kept["state"].values()}
        train(optimizer, seed=2)
    keeper.close_round()
    assert dict(optimizer.state) == {}
    assert [float(state["step"]) for state in kept["state"].values()] == steps == [3.0, 3.0, 2.0]
    assert all(torch.equal(state["exp_avg"], then) for state, then in zip(kept["state"].values(), moments, strict=True))


def test_the_first_client_of_a_round_finds_nothing_of_a_checkpoint() -> None:
    """A checkpoint of another strategy brings moments; they are no client's."""
    shared = parameters()
    optimizer = Adam(shared, lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    other = Adam(parameters(), lr=0.1)
    train(other, seed=5)
    optimizer.load_state_dict(other.state_dict())
    keeper.open_round()
    keeper.load(None)
    assert dict(optimizer.state) == {}
