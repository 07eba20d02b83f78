"""One client after the other, each as Lightning itself would train it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import mul
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.correction import ClientCorrection
from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.exchanged_tensors import Exchange
from lightning_fedscale.core.executors.loops import LocalStep, local_step
from lightning_fedscale.core.executors.meter import ClientMeter, Meter
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.hooks import PER_LOCAL_BATCH
from lightning_fedscale.core.lightning.module_state import call_hook
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.devices.profiling.batches import form_of
from lightning_fedscale.local_rules import Correction
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import randomness

_UNMETERED: AbstractContextManager[Any] = nullcontext()


class Guidance(Protocol):
    """What is particular to each client's training, asked for when the client begins and when it is done."""

    def start(self, client: int) -> Tensor | None:
        """The model that the client starts from, as a vector; None for the global one."""

    def correction(self, client: int) -> Correction | None:
        """What is added to its gradients, the module holding the model that it starts from; None if nothing is."""

    def personal(self, client: int) -> dict[str, Tensor]:
        """What of the module stays with each client, by name, as this one left it; empty if it never took part."""

    def keep_personal(self, client: int, values: dict[str, Tensor]) -> None:
        """Note what the client's training made of it."""


class LargestClient:
    """The buffers of the client with the most samples of this rank; of equal ones, the one with the lower number."""

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self.values: Mapping[str, Tensor | None] = {}

    def offer(self, update: ClientUpdate, values: Callable[[], Mapping[str, Tensor | None]]) -> None:
        """Note a client's buffers, unless there is a larger one or its update is left out.

        Args:
            update: what the client sends.
            values: gives copies of its buffers, by name; None for one that is not there any more.
        """
        key = (update.held, -update.client)
        if update.finite and (self._key is None or key >= self._key):
            self._key, self.values = key, values()


class RoundContext(NamedTuple):
    """What an executor needs for the clients of one rank in one round.

    Attributes:
        round: index of the round.
        work: the rank's clients and their batches.
        batches: the collated batches of all of them in order; those of ``cache`` on the device, others on the CPU but
            for the first.
        first: the client whose first batch has come through the Trainer's own loop and is on the device.
        randomness: state of the global generators for that client; None where fetching a batch draws nothing.
        cache: the dataset on the device, if it is there.
        exchange: the model's exchanged tensors, which hold the global model.
        server: the global model as a vector.
        training: False runs forward passes only.
        fetch: one batch of these dataset positions, made here and now.
        reopen: the collated batches of given clients anew, in the order given or client by client.
        meter: says what clients' training costs; None if nobody asks.
        guidance: what is particular to each client's training; None if nothing is.
        own: the server's values of what stays with each client, as the module was built with them, by name.
        largest: notes the buffers of the client with the most samples; None if nobody asks for them.
        timed: whether local batches are timed, so that those whose cost is known should not be counted anew.
    """

    round: int
    work: list[LocalWork]
    batches: Iterator[Any]
    first: LocalWork | None
    randomness: randomness.GlobalState | None
    cache: DeviceData | None
    exchange: Exchange
    server: Tensor
    training: bool
    fetch: Callable[[list[int]], Any]
    reopen: Callable[[list[LocalWork], Iterable[tuple[int, int]] | None], Iterator[Any]]
    meter: Meter | None = None
    guidance: Guidance | None = None
    own: Mapping[str, Tensor] = MappingProxyType({})
    largest: LargestClient | None = None
    timed: bool = False

    def restarted(self, order: Iterable[tuple[int, int]] | None) -> RoundContext:
        """The same clients with all their batches still to come.

        Args:
            order: of the batches, as (number in ``work``, number of the batch); None for client by client.
        """
        return self._replace(batches=self.reopen(self.work, order), first=None, randomness=None)


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
        store: client state between rounds.
        keepers: one for each optimizer.
        keep: whether optimizer state lives on with the client.
        watcher: told about clients as they train.
        log: collects what clients log.
        transfer: brings batches to the device.
        corrects: whether something may be added to the gradients.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        *,
        store: ClientStore,
        keepers: list[OptimizerKeeper],
        keep: bool,
        watcher: Watcher,
        log: ClientLog,
        transfer: Transfer,
        corrects: bool = False,
    ) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._device = trainer.strategy.root_device
        self._store = store
        self._keepers = keepers
        self._keep = keep
        self._watcher = watcher
        self._log = log
        self._step: LocalStep | None = None  # chosen in the first round, when all callbacks are in place
        self._correction = ClientCorrection() if corrects else None
        self._transfer = transfer
        self._hooks: set[str]
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

    def run(self, context: RoundContext, positions: Mapping[int, int] | None = None) -> Iterator[ClientUpdate]:
        """Train the clients and yield each one's update while the model still holds its weights.

        On return the model holds the global weights again; if it is left by an exception it need not.

        Args:
            context: the round.
            positions: number of each client's first local batch within the rank's round; None if nobody else trains.
        """
        view, server_origin = context.exchange.view, context.exchange.origin(context.server)
        delta = view.empty()
        self._open_round()
        own = Personal(context)
        position = 0
        for number, work in enumerate(context.work):
            if work is context.first and context.randomness is not None:
                randomness.restore(context.randomness, self._device)
            else:
                randomness.seed_globals(work.seed, self._device)
            self._prepare(work.client)
            origin = self._guide(context, work.client, server_origin)
            own.load(work.client)
            self._watcher.client_started(work.client)
            started = time.perf_counter()
            start = positions[work.client] if positions else position
            self._log.place(work.client, start)
            tally = None if context.meter is None else context.meter.client()
            trained = self._train(context, number, start, tally)
            position += trained.steps
            context.exchange.settle()
            view.subtract_from(origin, out=delta)
            update = ClientUpdate(
                client=work.client,
                delta=delta,
                norm=_norm(delta, context.server, view.trainable) if trained.had_batch else math.nan,
                held=work.held,
                samples=trained.samples,
                steps=trained.steps,
                loss=trained.mean_loss(),
                seconds=time.perf_counter() - started,
                cost=None if tally is None else tally.total(trained.optimizer_steps),
                optimizer_steps=trained.optimizer_steps,
            )
            own.keep(work.client, update)
            if context.largest is not None:
                context.largest.offer(update, context.exchange.copy_largest)
            if self._keep and context.training and trained.had_batch:
                # An update that is not finite has spoilt the optimizer's state too: that client starts afresh.
                states = [keeper.unload() for keeper in self._keepers] if update.finite else None
                self._store.stage_optimizers(work.client, states)
            self._watcher.client_ended(update)
            yield update
            context.exchange.restore()
            view.write(context.server)
            own.restore()
            context.exchange.set_trainable()
        view.forget(delta)
        self.close_round()

    def _guide(self, context: RoundContext, client: int, origin: Tensor) -> Tensor:
        """Put the client's own start and correction in place; returns what its delta is counted from."""
        guidance = context.guidance
        if guidance is not None and (start := guidance.start(client)) is not None:
            context.exchange.view.write(start)
            origin = context.exchange.origin(start)
        if self._correction is not None:
            own = None if guidance is None else guidance.correction(client)
            self._correction.begin(context.exchange, own or Correction())
        return origin

    def _open_round(self) -> None:
        if self._step is None:
            self._step = local_step(self._trainer, self._correction)
            self._hooks = {name for name in PER_LOCAL_BATCH if is_overridden(name, self._module)}
        for keeper in self._keepers:
            keeper.open_round()
        scaler = None if self._scaler is None else self._scaler.state_dict()
        self._round_start = scaler, [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
        self._parameters = list(self._module.parameters())

    def close_round(self) -> None:
        """Optimizers, schedulers and scaler are the server's and no client's; also after a round that failed."""
        for keeper in self._keepers:
            keeper.close_round()
        self._rewind()
        self._round_start = None

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In a checkpoint taken while a client trains, replace what is the client's by what the round began with."""
        if self._round_start is None:
            return  # clients train side by side, in optimizers of their own
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
        for parameter in self._parameters:
            parameter.grad = None

    def _train(self, context: RoundContext, number: int, position: int, tally: ClientMeter | None) -> _Trained:
        """The local batches of a client, of which the first is number ``position`` of the rank's round."""
        assert self._step is not None
        trainer, step, work = self._trainer, self._step, context.work[number]
        progress = trainer.fit_loop.epoch_loop.batch_progress
        trained, last_idx = _Trained(), len(work.batches) - 1
        window, automatic = trainer.accumulate_grad_batches, self._module.automatic_optimization
        for batch_idx, indices in enumerate(work.batches):
            batch = next(context.batches)
            if batch is None:
                continue  # as the Trainer's own loop does
            trained.had_batch = True
            # What the module reads as `trainer.is_last_batch` goes with the client's `batch_idx`.
            progress.is_last_batch = last = batch_idx == last_idx
            if trained.steps or work is not context.first:
                batch = self._transfer(batch)
                self._log.start_batch(batch)
            self._log.position = position + trained.steps
            if self._call("on_train_batch_start", batch, batch_idx) == -1:
                # The user's way to say that this epoch is over: here, the client's.
                for _ in range(batch_idx, last_idx):
                    next(context.batches)
                return trained
            # Before the step, which may change its batch.
            metered = _UNMETERED
            if tally is not None and context.timed:
                tally.add(form_of(batch).anonymous(), len(indices))
            elif tally is not None:
                metered = tally.batch(batch, len(indices), training=context.training)
            with metered:
                outputs = step.step(batch, batch_idx, last=last, training=context.training)
            self._call("on_train_batch_end", outputs, batch, batch_idx)
            loss = outputs.get("loss")
            trained.add(len(indices), loss)
            if automatic and (last or (batch_idx + 1) % window == 0):
                trained.optimizer_steps += 1
            self._watcher.client_stepped(number, loss)
        return trained

    def _call(self, hook: str, *values: Any) -> Any:
        return call_hook(self._trainer, hook, *values) if hook in self._hooks else None


class _Trained:
    """What is known of a client's local training, besides its model."""

    def __init__(self) -> None:
        self.samples = self.steps = self.optimizer_steps = 0
        self.had_batch = False  # that is not None
        self._losses: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, samples: int, loss: Tensor | None) -> None:
        """A local batch is over; its loss is the mean over its samples."""
        self.samples += samples
        self.steps += 1
        if loss is not None:
            self._losses.append(loss)
            self._weights.append(samples)

    def mean_loss(self) -> float:
        """Loss per sample, NaN if there was none."""
        if not self._losses:
            return math.nan
        losses: list[float] = torch.stack(self._losses).flatten().tolist()
        return math.fsum(map(mul, losses, self._weights)) / sum(self._weights)


class Personal:
    """What of the module stays with each client; the server's own, as it was built, is back after each of them."""

    def __init__(self, context: RoundContext) -> None:
        self._guidance = context.guidance
        self._exchange = context.exchange
        self._servers = context.own

    def load(self, client: int) -> None:
        """Show what is this client's in the module."""
        if self._guidance is not None:
            self._exchange.write_personal(self._guidance.personal(client))

    def keep(self, client: int, update: ClientUpdate) -> None:
        """Note what its training made of it, unless that is spoilt."""
        if self._guidance is not None and update.finite and (values := self._exchange.copy_personal()):
            self._guidance.keep_personal(client, values)

    def restore(self) -> None:
        """Show the server's own again."""
        self._exchange.write_personal(self._servers)


def _norm(delta: Tensor, server: Tensor, trainable: int) -> float:
    if trainable == delta.numel():
        square = float(delta.dot(delta))
    else:
        moved, carried = delta[:trainable], delta[trainable:]
        square, total = torch.stack([moved.dot(moved), carried.sum()]).tolist()
        # The carried part does not count, but must not be spoilt where the server's is not (see `Exchange.origin`). If
        # its sum is finite, so is all of it, and finding out takes no memory.
        if not math.isfinite(total) and (~carried.isfinite() & server[trainable:].isfinite()).any():
            return math.nan
    return math.sqrt(square) if math.isfinite(square) else math.nan
