"""Which hook is called when: the module's for every local batch, the callbacks' for every round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fedscale import Partition
from lightning_fedscale.types import ClientUpdate, RoundRecord
from tests.laws import reference
from tests.strategies import sequential

Log = list[tuple[Any, ...]]


def recorder(owner: str, name: str, log: Log, inner: Callable[..., Any], skip: int) -> Callable[..., Any]:
    """Wraps a hook: notes its name and those of its arguments that are plain integers."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        numbers = [value for value in args[skip:] if isinstance(value, int)]
        log.append((f"{owner}.{name}", *numbers))
        return inner(*args, **kwargs)

    return hook


MODULE_HOOKS = [
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "on_train_batch_end",
    "lr_scheduler_step",
    "on_train_epoch_end",
    "on_train_end",
]
CALLBACK_HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
]


class Spied(reference.Classifier):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log_of_calls = log

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def spied(log: Log) -> tuple[pl.LightningModule, pl.Callback]:
    """A module and a callback whose classes override every hook in question."""

    def overriding(owner: str, base: type, names: list[str], skip: int) -> type:
        return type(owner, (base,), {n: recorder(owner, n, log, getattr(base, n), skip) for n in names})

    torch.manual_seed(0)
    module = overriding("module", Spied, MODULE_HOOKS, 1)(log)
    return module, overriding("callback", Events, CALLBACK_HOOKS, 3)(log)


class Events(pl.Callback):
    """The events of rounds and clients, with all that they are told."""

    def __init__(self, log: Log) -> None:
        self.log_of_calls = log
        self.at: dict[str, list[Any]] = {"start": [], "client": [], "end": []}
        self.outputs: list[Any] = []

    def on_round_start(self, trainer: pl.Trainer, module: pl.LightningModule, round: int, cohort: Any) -> None:
        self.log_of_calls.append(("callback.on_round_start", round, cohort.tolist()))
        self.at["start"].append([p.detach().clone() for p in module.parameters()])

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, client: int) -> None:
        self.log_of_calls.append(("callback.on_client_start", client))
        for now, before in zip(module.parameters(), self.at["start"][-1], strict=True):
            assert torch.equal(now, before), "a client starts from the global model"

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: ClientUpdate) -> None:
        self.log_of_calls.append(
            ("callback.on_client_end", update.client, update.steps, update.samples, update.num_samples)
        )
        delta = torch.cat(
            [
                (before.double() - now.detach().double()).flatten()
                for before, now in zip(self.at["start"][-1], module.parameters(), strict=True)
            ]
        )
        assert torch.equal(update.delta, delta), "the module holds the client's model, the update its difference"
        assert update.norm == pytest.approx(float(delta.norm()), rel=1e-12)
        self.at["client"].append(delta)

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
        self.log_of_calls.append(("callback.on_round_end", record.round))
        assert trainer.strategy.last_round is record  # type: ignore[attr-defined]
        self.at["end"].append([p.detach().clone() for p in module.parameters()])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(outputs)


TRANSFER = ["module.on_before_batch_transfer", "module.transfer_batch_to_device", "module.on_after_batch_transfer"]


def local_batch(index: int) -> Log:
    return [
        ("module.on_train_batch_start", index),
        ("module.training_step", index),
        ("callback.on_before_zero_grad",),
        ("module.on_before_zero_grad",),
        ("callback.on_before_backward",),
        ("module.on_before_backward",),
        ("module.backward",),
        ("callback.on_after_backward",),
        ("module.on_after_backward",),
        ("callback.on_before_optimizer_step",),
        ("module.on_before_optimizer_step",),
        ("module.configure_gradient_clipping",),
        ("module.on_train_batch_end", index),
    ]


def round_of_two(number: int, batch_idx: int) -> Log:
    """Client 0 with batches of 4 and 4 samples, client 1 with 4 and 2."""
    transfer: Log = [(TRANSFER[0], 0), (TRANSFER[1], 0), (TRANSFER[2], 0)]
    return [
        *transfer,
        ("callback.on_train_batch_start", batch_idx),
        ("callback.on_round_start", number, [0, 1]),
        ("callback.on_client_start", 0),
        *local_batch(0),
        *transfer,
        *local_batch(1),
        ("callback.on_client_end", 0, 2, 8, 8),
        ("callback.on_client_start", 1),
        *transfer,
        *local_batch(0),
        *transfer,
        *local_batch(1),
        ("callback.on_client_end", 1, 2, 6, 6),
    ]


def test_order_of_hooks() -> None:
    log: Log = []
    module, callback = spied(log)
    strategy = sequential(partitioner=Partition.from_lists([range(8), range(8, 14)]), rounds_per_epoch=2)
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2, callbacks=[callback])
    trainer.fit(module, DataLoader(reference.dataset(14), batch_size=4))
    expected: Log = [("callback.on_train_start",), ("module.on_train_start",)]
    for epoch in (0, 1):
        expected += [("callback.on_train_epoch_start",), ("module.on_train_epoch_start",)]
        expected += round_of_two(2 * epoch, 0)
        expected += [("callback.on_round_end", 2 * epoch), ("callback.on_train_batch_end", 0)]
        expected += [*round_of_two(2 * epoch + 1, 1), ("module.lr_scheduler_step",)]
        expected += [("callback.on_round_end", 2 * epoch + 1), ("callback.on_train_batch_end", 1)]
        expected += [("callback.on_train_epoch_end",), ("module.on_train_epoch_end",)]
    expected += [("callback.on_train_end",), ("module.on_train_end",)]
    assert log == expected
    # Outside of clients the module's own hooks are back.
    assert "on_train_batch_start" not in vars(module)


def test_callbacks_get_the_rounds_loss_and_the_global_model() -> None:
    log: Log = []
    module, callback = spied(log)
    assert isinstance(callback, Events)
    strategy = sequential(partitioner=Partition.from_lists([range(8), range(8, 14)]))
    losses: list[float] = []

    class Watch(pl.Callback):
        def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
            losses.append(record.loss)

    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=3, callbacks=[callback, Watch()])
    trainer.fit(module, DataLoader(reference.dataset(14), batch_size=4))
    assert [float(outputs["loss"]) for outputs in callback.outputs] == pytest.approx(losses, rel=1e-6)
    for round, (start, end) in enumerate(zip(callback.at["start"], callback.at["end"], strict=True)):
        first, second = callback.at["client"][2 * round : 2 * round + 2]
        mean = (8 * first + 6 * second) / 14
        before, after = (torch.cat([p.flatten() for p in parameters]) for parameters in (start, end))
        assert torch.equal((before.double() - mean).to(torch.float32), after)
        if round:
            assert all(torch.equal(a, b) for a, b in zip(callback.at["end"][round - 1], start, strict=True))


class Plain(reference.Classifier):
    pass


def test_callbacks_without_the_events_are_left_alone() -> None:
    """Also a callback that has some of them only."""

    class Some(pl.Callback):
        clients: list[int] = []  # noqa: RUF012

        def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, client: int) -> None:
            self.clients.append(client)

    trainer = reference.quiet_trainer(
        strategy=sequential(num_clients=3), max_epochs=2, callbacks=[pl.Callback(), Some()]
    )
    trainer.fit(Plain(), DataLoader(reference.dataset(14), batch_size=4))
    assert Some.clients == [0, 1, 2, 0, 1, 2]
