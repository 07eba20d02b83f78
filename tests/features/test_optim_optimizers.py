"""Every torch optimizer, fresh in each round or kept by its client, against a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fedscale import server
from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference


class Counting(Optimizer):
    """SGD with 1/sqrt(k) steps that counts in its group, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] / group["k"] ** 0.5)
        return loss


class Eager(Optimizer):
    """Builds its state, which is not zero, before the first step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"velocity": torch.full_like(parameter, 0.1), "step": torch.tensor(1.0)}

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["velocity"].mul_(0.9).add_(parameter.grad)
            state["step"] += 1
            parameter.data.add_(state["velocity"] / state["step"], alpha=-self.param_groups[0]["lr"])
        return loss


BUILDERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True, foreach=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=1.0),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1, t0=2),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "eager": lambda m: Eager(m.parameters(), lr=0.1),
    "counting": lambda m: Counting(m.parameters(), lr=0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=4),
    "lbfgs_line_search": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "groups": lambda m: torch.optim.Adam(
        [
            {"params": [p for n, p in m.named_parameters() if "weight" in n], "weight_decay": 0.1},
            {"params": [p for n, p in m.named_parameters() if "bias" in n], "lr": 0.1, "betas": (0.5, 0.9)},
        ],
        lr=0.01,
    ),
}


class Module(reference.Classifier):
    def __init__(self, build: Callable[[nn.Module], Optimizer]) -> None:
        super().__init__(dropout=0.0)
        self.build = build

    def configure_optimizers(self) -> Optimizer:
        return self.build(self)


def by_closure(module: Any, batches: Batches, optimizer: Optimizer) -> None:
    """As torch's documentation has it for optimizers that evaluate the model several times."""
    for batch in batches:

        def closure(batch: list[Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = local_loops.loss_of(module, batch)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.parametrize("name", BUILDERS)
def test_optimizer(name: str, client_optimizer: str) -> None:
    """Two of four clients a round: kept state goes on where this client, not the one before it, left off."""
    build = BUILDERS[name]
    expected_module = local_loops.make(Module, build=build)
    kept: dict[int, Any] = {}

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = build(expected_module)
        if client in kept:
            optimizer.load_state_dict(kept[client])
        by_closure(expected_module, batches, optimizer)
        if client_optimizer == "keep":
            kept[client] = optimizer.state_dict()

    expected = local_loops.rounds(expected_module, local, 5, per_round=2)[-1]
    module = local_loops.make(Module, build=build)
    trainer = local_loops.fit(module, 5, strategy={"clients_per_round": 2, "client_optimizer": client_optimizer})
    assert trainer.global_step == 5
    assert reference.difference(module.state_dict(), expected) == 0.0
    if client_optimizer == "keep":
        assert len(kept) > 2


def test_keeping_is_not_resetting() -> None:
    """The comparison above could tell the two apart."""
    results = []
    for client_optimizer in ("reset", "keep"):
        module = local_loops.make(Module, build=BUILDERS["adam"])
        local_loops.fit(module, 5, strategy={"clients_per_round": 2, "client_optimizer": client_optimizer})
        results.append(module.state_dict())
    assert reference.difference(*results) > 1e-3


class Spoilt(Module):
    """Client 2 finds NaN in round 1."""

    client = -1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if (self.client, self.trainer.global_step) == (2, 1) else loss


def test_a_kept_optimizer_that_saw_nan_is_dropped_and_its_update_left_out() -> None:
    expected_module = local_loops.make(Module, build=BUILDERS["adam"])
    kept: dict[int, Any] = {}

    def local(round: int, client: int, batches: Batches) -> bool:
        if (client, round) == (2, 1):
            kept.pop(client)
            return False
        optimizer = BUILDERS["adam"](expected_module)
        if client in kept:
            optimizer.load_state_dict(kept[client])
        by_closure(expected_module, batches, optimizer)
        kept[client] = optimizer.state_dict()
        return True

    expected = local_loops.rounds(expected_module, local, 4)
    module = local_loops.make(Spoilt, build=BUILDERS["adam"])
    snapshots = reference_loop.Snapshots()
    with pytest.warns(UserWarning, match=r"round 1: left out 1 client\(s\).*: 2\."):
        local_loops.fit(module, 4, strategy={"client_optimizer": "keep"}, callbacks=[local_loops.Clients(), snapshots])
    for got, right in zip(snapshots.after_round, expected[1:], strict=True):
        assert reference.difference(got, right) == 0.0


def test_diloco() -> None:
    """Outer SGD(lr=0.7, momentum=0.9, nesterov) on the mean delta, inner AdamW that lives on (arXiv 2311.08105)."""
    build = BUILDERS["amsgrad"]
    expected_module = local_loops.make(Module, build=build).double()
    kept: dict[int, Any] = {}
    velocity: dict[str, Tensor] = {}

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = build(expected_module)
        if client in kept:
            optimizer.load_state_dict(kept[client])
        by_closure(expected_module, batches, optimizer)
        kept[client] = optimizer.state_dict()

    def outer(model: reference_loop.State, delta: reference_loop.State) -> reference_loop.State:
        moved = {}
        for name, value in model.items():
            velocity[name] = 0.9 * velocity.get(name, torch.zeros_like(value)) + delta[name]
            moved[name] = value - 0.7 * (delta[name] + 0.9 * velocity[name])
        return moved

    options: dict[str, Any] = {"per_round": 3, "convert": Tensor.double}
    expected = local_loops.rounds(expected_module, local, 6, server=outer, **options)[-1]
    module = local_loops.make(Module, build=build)
    strategy = {
        "clients_per_round": 3,
        "client_optimizer": "keep",
        "server_optimizer": server.from_torch(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    }
    local_loops.fit(module, 6, strategy=strategy, precision="64-true")
    assert reference.difference(module.state_dict(), expected) < 1e-13


def test_uniform_weights() -> None:
    def loop_with(weigh: Callable[[int], float]) -> reference_loop.State:
        module = local_loops.make(Module, build=BUILDERS["sgd"])

        def local(round: int, client: int, batches: Batches) -> None:
            by_closure(module, batches, BUILDERS["sgd"](module))

        return local_loops.rounds(module, local, 3, weigh=weigh)[-1]

    module = local_loops.make(Module, build=BUILDERS["sgd"])
    trainer = local_loops.fit(module, 3, strategy={"aggregator": "uniform"})
    assert reference.difference(module.state_dict(), loop_with(lambda held: 1.0)) == 0.0
    assert reference.difference(module.state_dict(), loop_with(float)) > 1e-3
    assert trainer.strategy.last_round.weights.tolist() == [0.25] * 4  # type: ignore[attr-defined]


def test_optimizer_is_empty_between_rounds() -> None:
    """What the Trainer's checkpoint calls the optimizer's state is the server's: no client's moments."""
    states: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            states.append(len(trainer.optimizers[0].state))

    local_loops.fit(local_loops.make(Module, build=BUILDERS["adam"]), 3, callbacks=[Watch()])
    assert states == [0, 0, 0]
