"""FedAvg around any local training, for what `reference_loop` does not know: other optimizers, servers, tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fedscale.core.plan import client_seed
from tests.features import reference_loop
from tests.features.reference_loop import State
from tests.laws import reference
from tests.strategies import sequential

Batches = list[list[Tensor]]
Local = Callable[[int, int, Batches], "bool | None"]
"""``(round, client, batches)``: trains the module in place; False for an update that the server must not use."""
Server = Callable[[State, State], State]
"""``(global model, aggregated delta) -> global model``"""


def make(kind: Callable[..., Any], **options: object) -> Any:
    torch.manual_seed(0)
    return kind(**options)


def loss_of(module: Any, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1])


def train(
    module: Any,
    batches: Batches,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    clip: Callable[[nn.Module], object] | None = None,
) -> None:
    """One pass: zero, backward, clip, step."""
    for index, batch in enumerate(batches):
        if index % accumulate == 0:
            optimizer.zero_grad()
        (loss_of(module, batch) / accumulate).backward()
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            if clip is not None:
                clip(module)
            optimizer.step()


def rounds(
    module: Any,
    local: Local,
    number: int,
    *,
    per_round: int | None = None,
    weigh: Callable[[int], float] = float,
    server: Server | None = None,
    convert: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> list[State]:
    """The global model before the first round, after it, after the next one, ...

    Clients, data and batches are those of `reference_loop`, not shuffled.
    """
    clients, data = reference_loop.partition(), reference_loop.data()
    cut = reference_loop.passes(clients, shuffle=False)
    module.train()
    models = [reference_loop.state_of(module)]
    for round in range(number):
        updates = []
        for client in reference_loop.cohort(round, clients, per_round):
            module.load_state_dict(models[-1])
            torch.manual_seed(client_seed(0, round, client))
            batches = [[convert(data.tensors[0][b]), data.tensors[1][b]] for b in cut(client, round)]
            if local(round, client, batches) is not False:
                held = len(clients.client(client))
                updates.append((held, weigh(held), reference_loop.state_of(module)))
        models.append(_merged(models[-1], updates, server))
    return models


def _merged(start: State, updates: list[tuple[int, float, State]], server: Server | None) -> State:
    total = sum(weight for _, weight, _ in updates)
    base = {name: _wide(value) for name, value in start.items()}
    delta: State = {
        name: sum(weight * (base[name] - _wide(state[name])) for _, weight, state in updates) / total  # type: ignore[misc]
        for name in start
    }
    moved = {name: base[name] - delta[name] for name in start} if server is None else server(base, delta)
    unmoved = {name for name in start if all(torch.equal(state[name], start[name]) for _, _, state in updates)}
    largest = max(updates, key=lambda update: update[0])[2]
    averaged = {name: start[name] if name in unmoved else _narrow(value, start[name]) for name, value in moved.items()}
    return {name: value if _is_quantity(name, value) else largest[name] for name, value in averaged.items()}


def _is_quantity(name: str, value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex() or name.endswith("num_batches_tracked")


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _narrow(value: Tensor, like: Tensor) -> Tensor:
    exact = like.is_floating_point() or like.is_complex()
    return (value if exact else value.round()).to(like.dtype)


def fit(
    module: pl.LightningModule,
    number: int,
    *,
    rounds_per_epoch: int = 1,
    strategy: dict[str, object] | None = None,
    val: object = None,
    **options: object,
) -> pl.Trainer:
    """Train for ``number`` epochs of rounds with the same clients, data and batches as `rounds`."""
    federated = sequential(
        partitioner=reference_loop.partition(),
        rounds_per_epoch=rounds_per_epoch,
        **(strategy or {}),
    )
    trainer = reference.quiet_trainer(strategy=federated, max_epochs=number, **options)
    trainer.fit(module, reference.loader(reference_loop.data(), shuffle=False), val)
    return trainer


class Clients(pl.Callback):
    """Tells the module which client it is training, and keeps every update."""

    def __init__(self) -> None:
        self.deltas: list[dict[int, Tensor]] = []

    def on_round_start(self, trainer: pl.Trainer, module: Any, round: int, cohort: Any) -> None:
        self.deltas.append({})

    def on_client_start(self, trainer: pl.Trainer, module: Any, client: int) -> None:
        module.client = client

    def on_client_end(self, trainer: pl.Trainer, module: Any, update: Any) -> None:
        self.deltas[-1][update.client] = update.delta.clone()


class Model(reference.Classifier):
    """A classifier that also does ``extra`` with every batch, in Lightning's loop and in the hand-written one."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def extra(self, batch: list[Tensor]) -> Tensor | float:
        """Returns what is added to the loss."""
        return 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.extra(batch)


def check(kind: type[Model], number: int = 4) -> tuple[State, State, pl.Trainer]:
    """Train both ways with two of four clients a round; returns the state before and after, and the Trainer."""
    by_loop = make(kind)

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = by_loop.configure_optimizers()
        for batch in batches:
            optimizer.zero_grad()
            (loss_of(by_loop, batch) + by_loop.extra(batch)).backward()
            optimizer.step()

    expected = rounds(by_loop, local, number, per_round=2)
    module, snapshots = make(kind), reference_loop.Snapshots()
    before = reference_loop.state_of(module)
    trainer = fit(module, number, strategy={"clients_per_round": 2}, callbacks=[snapshots])
    for got, right in zip(snapshots.after_round, expected[1:], strict=True):
        for name, value in right.items():
            assert got[name].dtype == value.dtype == before[name].dtype, name
            assert torch.equal(got[name], value), name
    return before, reference_loop.state_of(module), trainer


def parameters(state: State) -> int:
    return sum(value.numel() for name, value in state.items() if name.startswith("net."))
