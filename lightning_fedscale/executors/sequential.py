"""One client after the other, each as Lightning itself would train it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from torch import Tensor

from lightning_fedscale import randomness
from lightning_fedscale.clients import ClientStore, OptimizerKeeper
from lightning_fedscale.executors.exchange import Exchange
from lightning_fedscale.executors.loops import ClientLoops
from lightning_fedscale.rounds import LocalWork
from lightning_fedscale.types import ClientUpdate


class RoundContext(NamedTuple):
    """What an executor needs for the clients of one rank in one round.

    Attributes:
        round: index of the round.
        work: the rank's clients and their batches.
        batches: the collated batches of all of them in order, on the CPU but for the first.
        randomness: state of the global generators for the first client, whose first batch is already there.
        exchange: the model's exchanged tensors, which hold the global model.
        server: the global model as a vector.
        training: False runs forward passes only.
    """

    round: int
    work: list[LocalWork]
    batches: Iterator[Any]
    randomness: randomness.GlobalState
    exchange: Exchange
    server: Tensor
    training: bool


class Watcher(Protocol):
    """Told about clients as they train."""

    def client_started(self, client: int) -> None:
        """The model holds the global weights and ``client`` is about to train."""

    def client_stepped(self, done: int, loss: Tensor | None) -> None:
        """A local batch is over; ``done`` clients of this rank are complete."""

    def client_ended(self, update: ClientUpdate) -> None:
        """The model holds the client's weights."""


class SequentialExecutor:
    """Trains the clients of a rank one after the other in the user's module, in place.

    Every client starts from the global weights, the round's optimizer options, its own random numbers and its own
    (kept or fresh) optimizer state; what it does in between are Lightning's own loops, so precision plugins, clipping,
    accumulation, manual optimization and hooks work as they always do.

    Args:
        trainer: the Trainer.
        seed: the strategy's seed.
        store: client state between rounds.
        keepers: one for each optimizer.
        keep: whether optimizer state lives on with the client.
        watcher: told about clients as they train.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        *,
        seed: int,
        store: ClientStore,
        keepers: list[OptimizerKeeper],
        keep: bool,
        watcher: Watcher,
    ) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._device = trainer.strategy.root_device
        self._seed = seed
        self._store = store
        self._keepers = keepers
        self._keep = keep
        self._watcher = watcher
        self._loops = ClientLoops(trainer)
        self._round_start: tuple[Any, list[dict[str, Any]]] | None = None
        self._scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        # In manual optimization the user steps the schedulers inside the client; they are the server's all the same.
        self._schedulers: list[Any] = (
            [] if self._module.automatic_optimization else [config.scheduler for config in trainer.lr_scheduler_configs]
        )

    def scaler_state(self) -> tuple[float, float]:
        """Scale and growth counter of the gradient scaler, which the client just trained left; zeros without one."""
        if self._scaler is None:
            return 0.0, 0.0
        state = self._scaler.state_dict()
        return float(state["scale"]), float(state["_growth_tracker"])

    def set_scaler_state(self, scale: float, growth: float) -> None:
        """Start the next round from this scale and growth counter."""
        if self._scaler is not None and scale > 0:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})

    def run(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the clients and yield each one's update while the model still holds its weights.

        On return the model holds the global weights again; if it is left by an exception it need not.
        """
        view, origin = context.exchange.view, context.exchange.origin(context.server)
        delta = view.empty()
        for keeper in self._keepers:
            keeper.open_round()
        scaler = None if self._scaler is None else self._scaler.state_dict()
        self._round_start = scaler, [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
        for number, work in enumerate(context.work):
            if number == 0:
                randomness.restore(context.randomness, self._device)
            else:
                randomness.seed_globals(client_seed(self._seed, context.round, work.client), self._device)
            self._prepare(work.client)
            self._watcher.client_started(work.client)
            started = time.perf_counter()
            losses, weights, sizes = self._train(context, number)
            context.exchange.settle()
            view.subtract_from(origin, out=delta)
            update = ClientUpdate(
                client=work.client,
                delta=delta,
                norm=_norm(delta, context.server, view.trainable),
                held=work.held,
                samples=sum(sizes),
                steps=len(sizes),
                loss=_mean_loss(losses, weights),
                seconds=time.perf_counter() - started,
            )
            if self._keep and context.training:
                # An update that is not finite has spoilt the optimizer's state too: that client starts afresh.
                states = [keeper.unload() for keeper in self._keepers] if update.finite else None
                self._store.stage_optimizers(work.client, states)
            self._watcher.client_ended(update)
            yield update
            view.write(context.server)
            context.exchange.set_trainable()
        view.forget(delta)
        self.close_round()

    def close_round(self) -> None:
        """Optimizers, schedulers and scaler are the server's and no client's; also after a round that failed."""
        for keeper in self._keepers:
            keeper.close_round()
        self._rewind()
        self._round_start = None

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In a checkpoint taken while a client trains, replace what is the client's by what the round began with."""
        assert self._round_start is not None
        scaler, schedulers = self._round_start
        saved = zip(self._keepers, checkpoint["optimizer_states"], strict=True)
        checkpoint["optimizer_states"] = [keeper.at_round_start(state) for keeper, state in saved]
        if self._schedulers:
            checkpoint["lr_schedulers"] = schedulers
        if scaler is not None:
            checkpoint[type(self._trainer.precision_plugin).__qualname__] = scaler

    def _rewind(self) -> None:
        if self._round_start is None:
            return
        scaler, schedulers = self._round_start
        if scaler is not None:
            self._scaler.load_state_dict(scaler)
        for scheduler, state in zip(self._schedulers, schedulers, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))

    def _prepare(self, client: int) -> None:
        kept = self._store.optimizers(client) if self._keep else None
        for i, keeper in enumerate(self._keepers):
            keeper.load(kept[i] if kept else None)
        self._rewind()
        for parameter in self._module.parameters():
            parameter.grad = None

    def _train(self, context: RoundContext, number: int) -> tuple[list[Tensor], list[int], list[int]]:
        """The local batches of a client; returns the losses, the samples that each is the mean of, and all samples."""
        trainer = self._trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress
        batches = context.work[number].batches
        losses: list[Tensor] = []
        weights: list[int] = []
        sizes: list[int] = []
        skipped = 0
        for batch_idx, indices in enumerate(batches):
            batch = next(context.batches)
            if batch is None:
                # Skipped, as the Trainer's own loop does.
                skipped += 1
                continue
            # What the module reads as `trainer.is_last_batch` goes with the client's `batch_idx`.
            progress.is_last_batch = last = batch_idx + 1 == len(batches)
            if number or sizes:
                # The very first batch of a round has come this way already, through the Trainer's own loop.
                batch = trainer.precision_plugin.convert_input(batch)
                batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
                trainer._logger_connector.on_batch_start(batch)
            if call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx) == -1:
                # The user's way to say that this epoch is over: here, the client's.
                for _ in batches[batch_idx + 1 :]:
                    next(context.batches)
                break
            outputs = self._loops.step(batch, batch_idx, last=last, training=context.training)
            call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
            sizes.append(len(indices))
            loss = outputs.get("loss")
            if loss is not None:
                losses.append(loss.detach())
                weights.append(len(indices))
            self._watcher.client_stepped(number, loss)
        if skipped == len(batches):
            raise no_batch_left(context.work[number])
        return losses, weights, sizes


def client_seed(seed: int, round: int, client: int) -> int:
    """The seed of a client's random numbers in a round: dropout, augmentation, whatever its training draws."""
    return randomness.derive(seed, randomness.CLIENT, round, client)


def no_batch_left(work: LocalWork) -> ValueError:
    """The error for a client that cannot train since all its batches are None."""
    return ValueError(
        f"train_dataloader: the collate function returned None for all {len(work.batches)} batches of client"
        f" {work.client}: leave this client out of the partition."
    )


def _norm(delta: Tensor, server: Tensor, trainable: int) -> float:
    moved, carried = delta[:trainable], delta[trainable:]
    # The carried part does not count, but must not be spoilt where the server's is not (see `Exchange.origin`).
    spoilt = (~torch.isfinite(carried) & torch.isfinite(server[trainable:])).any()
    value = float(torch.where(spoilt, math.nan, moved.dot(moved)))
    return math.sqrt(value) if math.isfinite(value) else math.nan


def _mean_loss(losses: list[Tensor], weights: list[int]) -> float:
    if not losses:
        return math.nan
    stacked = torch.stack([loss.reshape(()).double() for loss in losses])
    return float(stacked.dot(torch.tensor(weights, dtype=torch.float64, device=stacked.device)) / sum(weights))
