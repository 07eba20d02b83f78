"""What stays with a client: cursors and optimizers, staged and committed; one optimizer object for all clients."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper

BUILD: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.1),
    "amsgrad": lambda p: AdamW(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: Adagrad(p, lr=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "lbfgs": lambda p: LBFGS(p, lr=0.1, max_iter=3, history_size=2),
}


def parameters(seed: int) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]


def steps(optimizer: Optimizer, target: float, count: int) -> None:
    """Minimise the distance of all parameters to ``target``."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack(
            [((p - target) ** 2 + 1).sqrt().sum() for group in optimizer.param_groups for p in group["params"]]
        ).sum()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)  # type: ignore[arg-type]  # torch takes a tensor too


def values(of: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in of]


def put(into: list[nn.Parameter], what: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(into, what, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_kept_state_equals_an_optimizer_that_was_never_swapped(name: str, through_checkpoint: bool) -> None:
    # Two clients, each with an optimizer of its own ...
    own = [parameters(1), parameters(2)]
    start = [values(p) for p in own]
    mine = [BUILD[name](p) for p in own]
    for _ in range(3):
        for optimizer, target in zip(mine, (0.5, -2.0), strict=True):
            steps(optimizer, target, 2)
    # ... and the same two in turn in one model with one optimizer.
    shared = parameters(3)
    keeper = OptimizerKeeper(BUILD[name](shared))
    kept: list[Any] = [None, None]
    weights = start
    for _ in range(3):
        keeper.open_round()
        for client, target in enumerate((0.5, -2.0)):
            put(shared, weights[client])
            keeper.load(kept[client])
            steps(keeper._optimizer, target, 2)
            weights[client], kept[client] = values(shared), keeper.unload()
        keeper.close_round()
        if through_checkpoint:
            file = io.BytesIO()
            torch.save(kept, file)
            file.seek(0)
            kept = torch.load(file, weights_only=True)
    for client in range(2):
        assert all(torch.equal(a, b) for a, b in zip(weights[client], own[client], strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_reset_equals_a_new_optimizer(name: str) -> None:
    shared = parameters(3)
    keeper = OptimizerKeeper(BUILD[name](shared))
    keeper.open_round()
    put(shared, values(parameters(2)))
    keeper.load(None)
    steps(keeper._optimizer, 0.5, 3)  # another client was here before
    expected = parameters(1)
    steps(BUILD[name](expected), -2.0, 3)
    put(shared, values(parameters(1)))
    keeper.load(None)
    steps(keeper._optimizer, -2.0, 3)
    assert all(torch.equal(a, b) for a, b in zip(shared, expected, strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_unloaded_state_is_out_of_reach_of_later_clients(name: str) -> None:
    shared = parameters(1)
    keeper = OptimizerKeeper(BUILD[name](shared))
    keeper.open_round()
    keeper.load(None)
    steps(keeper._optimizer, 0.5, 2)
    kept = keeper.unload()
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    frozen = torch.load(file)
    for state in (None, kept):
        keeper.load(state)
        steps(keeper._optimizer, 3.0, 3)
    assert _equal(kept, frozen)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


def test_group_options_are_the_servers_again_for_the_next_client_and_after_the_round() -> None:
    shared = parameters(1)
    optimizer = SGD([{"params": shared[:1], "lr": 0.5}, {"params": shared[1:], "lr": torch.tensor(0.25)}], momentum=0.9)
    keeper = OptimizerKeeper(optimizer)
    first, second = optimizer.param_groups
    for base in (1.0, 0.5):  # a schedule of the server between rounds
        first["lr"], second["lr"] = 0.5 * base, torch.tensor(0.25 * base)
        keeper.open_round()
        for _ in range(2):
            keeper.load(None)
            assert (first["lr"], float(second["lr"]), first["momentum"]) == (0.5 * base, 0.25 * base, 0.9)
            # A client lowers its rates, in place where they are tensors, and its momentum.
            first["lr"], first["momentum"] = 0.001, 0.1
            second["lr"] *= 0.1
            steps(optimizer, 0.0, 1)
            keeper.unload()
        keeper.close_round()
        assert (first["lr"], float(second["lr"]), first["momentum"]) == (0.5 * base, 0.25 * base, 0.9)
        assert not optimizer.state


def test_kept_clients_follow_the_servers_learning_rate_and_keep_what_their_optimizer_counts() -> None:
    class Counting(SGD):
        """Keeps a counter in its groups, as some optimizers do."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["counted"] = group.get("counted", 0) + 1
            return super().step(closure)

    shared = parameters(1)
    optimizer = Counting(shared, lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    group = optimizer.param_groups[0]
    keeper.open_round()
    keeper.load(None)
    steps(optimizer, 0.0, 3)
    group["lr"] = 0.7
    kept = keeper.unload()
    keeper.close_round()
    group["lr"] = 0.05
    keeper.open_round()
    keeper.load(kept)
    assert (group["lr"], group["counted"]) == (0.05, 3)


# ClientStore

cursors = st.dictionaries(st.integers(0, 10**6), st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(cursors, cursors, cursors)
def test_store_keeps_committed_cursors_only_and_round_trips(
    first: dict[int, tuple[int, int]], failed: dict[int, tuple[int, int]], second: dict[int, tuple[int, int]]
) -> None:
    store = ClientStore()
    for staged, complete in ((first, True), (failed, False), (second, True)):
        for client, cursor in staged.items():
            store.stage(client, cursor)
        if complete:
            store.commit()
        else:
            store.rollback()
    expected = {**first, **second}
    restored = ClientStore()
    restored.stage(5, (9, 9))
    restored.load_state_dict(store.state_dict(), torch.device("cpu"))
    restored.commit()
    for client in {*first, *failed, *second, 5}:
        assert store.cursor(client) == restored.cursor(client) == expected.get(client, (0, 0))
    assert torch.equal(store.state_dict()["cursors"], restored.state_dict()["cursors"])


def test_store_keeps_committed_optimizers_only() -> None:
    store = ClientStore()

    def states(number: float) -> list[dict[str, Any]]:
        return [{"state": {0: {"momentum_buffer": torch.tensor([number])}}, "options": [{}]}]

    store.stage_optimizers(4, states(1.0))
    assert store.optimizers(4) is None
    store.commit()
    store.stage_optimizers(4, states(2.0))
    store.stage_optimizers(5, states(3.0))
    store.rollback()
    assert _equal(store.optimizers(4), states(1.0))
    assert list(store.keepers()) == [4]
    store.stage_optimizers(4, None)  # its update was not finite: it starts afresh
    store.states.put(6, "optimizers", states(6.0))  # came from another rank
    store.commit()
    assert list(store.keepers()) == [6]

    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    restored = ClientStore()
    restored.load_state_dict(torch.load(file, weights_only=True), torch.device("cpu"))
    assert _equal(restored.optimizers(6), states(6.0))
    restored.states.put(6, "optimizers", None)
    assert list(restored.keepers()) == []
    assert list(store.keepers()) == [6]
