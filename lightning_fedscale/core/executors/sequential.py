"""The sequential executor, which trains one client at a time as Lightning itself would."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import mul
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.client_delta import Deltas
from lightning_fedscale.core.executors.correction import ClientCorrection
from lightning_fedscale.core.executors.local_step import LocalStep, local_step
from lightning_fedscale.core.executors.meter import ClientMeter
from lightning_fedscale.core.executors.round_context import Personal, RoundContext, Watcher
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.hooks import PER_LOCAL_BATCH, is_listened_to
from lightning_fedscale.core.lightning.module_state import call_hook
from lightning_fedscale.devices.profiling.batches import signature_of
from lightning_fedscale.local_rules import Correction
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import randomness

_UNMETERED: AbstractContextManager[Any] = nullcontext()


class SequentialExecutor:
    """Trains the clients of a rank sequentially in the user's module, in place.

    Every client starts from the global weights, the round's optimizer options, its own random numbers and its own
    (kept or fresh) optimizer state. It then trains in Lightning's own loops, so precision plugins, clipping,
    accumulation, manual optimization and hooks work as usual.

    Args:
        trainer: the Trainer.
        store: client state between rounds.
        keepers: one for each optimizer.
        keep: whether each client keeps its optimizer state.
        watcher: is called as clients train.
        log: collects the values that clients log.
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
        self._scales: list[Tensor] = []  # at the client's start and after each of its steps
        # In manual optimization the user steps the schedulers inside the client, but they belong to the server.
        self._schedulers: list[Any] = (
            [] if self._module.automatic_optimization else [config.scheduler for config in trainer.lr_scheduler_configs]
        )

    def scaler_state(self) -> tuple[float, float]:
        """Return the gradient scaler's scale and growth counter after the last client; zeros without a scaler."""
        if self._scaler is None:
            return 0.0, 0.0
        state = self._scaler.state_dict()
        return float(state["scale"]), float(state["_growth_tracker"])

    def set_scaler_state(self, scale: float, growth: float) -> None:
        """Start the next round from this scale and growth counter."""
        if self._scaler is not None and scale > 0:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})

    def run(self, context: RoundContext, positions: Mapping[int, int] | None = None) -> Iterator[ClientUpdate]:
        """Train the clients and yield each client's update while the model still holds its weights.

        On return the model holds the global weights again; after an exception it may not.

        Args:
            context: the round.
            positions: number of each client's first local batch within the rank's round; None if these are all clients.
        """
        view, deltas = context.shared.view, Deltas(context.shared, context.server)
        is_watched = is_listened_to(self._trainer, "on_client_end")
        self._open_round()
        own = Personal(context)
        position = 0
        for number, work in enumerate(context.work):
            if work is context.first and context.randomness is not None:
                randomness.restore(context.randomness, self._device)
            else:
                randomness.seed_globals(work.seed, self._device)
            self._prepare(work.client)
            start_model = self._begin_client(context, work.client)
            own.load(work.client)
            self._watcher.client_started(work.client)
            started = time.perf_counter()
            start = positions[work.client] if positions else position
            self._log.place(work.client, start)
            tally = None if context.meter is None else context.meter.client()
            trained = self._train(context, number, start, tally)
            trained.optimizer_steps -= self._skipped()
            position += trained.steps
            context.frozen.check(work.client)
            context.shared.rebind()
            delta = deltas.of(start_model)
            update = ClientUpdate(
                client=work.client,
                delta=delta,
                norm=delta.norm() if trained.had_batch else math.nan,
                num_samples=work.num_samples,
                samples=trained.samples,
                steps=trained.steps,
                loss=trained.mean_loss(),
                seconds=time.perf_counter() - started,
                cost=None if tally is None else tally.total(trained.optimizer_steps),
                optimizer_steps=trained.optimizer_steps,
            )
            own.keep(work.client, update)
            if context.largest is not None:
                context.largest.offer(update, context.shared.copy_largest)
            if self._keep and context.training and trained.had_batch:
                # After an update that is not finite the optimizer's state is invalid too: the client starts afresh.
                states = [keeper.unload() for keeper in self._keepers] if update.finite else None
                self._store.stage_optimizers(work.client, states)
            if is_watched:
                delta.vector()  # now, since a callback may change the module's weights
            self._watcher.client_ended(update)
            if context.frozen.whole_round:
                context.frozen.check(work.client)
            yield update
            context.shared.irregular.restore()
            view.write_copy(context.server)
            own.restore()
            context.shared.set_trainable()
        self.close_round()

    def _begin_client(self, context: RoundContext, client: int) -> Tensor | None:
        """Set the client's start and correction; return the model from which it starts, None for the global one."""
        pipeline = context.pipeline
        start = None if pipeline is None else pipeline.start(client)
        if start is not None:
            context.shared.view.write(start)
            context.shared.view.forget(start)  # the view would keep every client's model in memory until the round ends
        if self._correction is not None:
            own = None if pipeline is None else pipeline.correction(client)
            self._correction.begin(context.shared, own or Correction())
        return start

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
        """Restore the server's optimizers, schedulers and scaler; also after a failed round."""
        for keeper in self._keepers:
            keeper.close_round()
        self._rewind()
        self._round_start = None

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the client's state in a checkpoint taken while it trains by the state from the start of the round."""
        if self._round_start is None:
            return  # vectorized clients have their own optimizers
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
            self._store.states.with_room(partial(keeper.load, kept[i] if kept else None))
        self._rewind()
        self._scales = []
        self._note_scale()
        for parameter in self._parameters:
            parameter.grad = None

    def _train(self, context: RoundContext, number: int, position: int, tally: ClientMeter | None) -> _Trained:
        """Train the local batches of a client; the first is number ``position`` of the rank's round."""
        assert self._step is not None
        trainer, step, work = self._trainer, self._step, context.work[number]
        progress = trainer.fit_loop.epoch_loop.batch_progress
        trained, last_idx = _Trained(), len(work.batches) - 1
        window, automatic = trainer.accumulate_grad_batches, self._module.automatic_optimization
        for batch_idx, indices in enumerate(work.batches):
            with context.frozen.watching_step(work.client, batch_idx, first=number == 0 and batch_idx < window):
                batch = next(context.batches)
                if batch is None:
                    continue  # as the Trainer's own loop does
                trained.had_batch = True
                # `trainer.is_last_batch` must match the client's `batch_idx`.
                progress.is_last_batch = last = batch_idx == last_idx
                if trained.steps or work is not context.first:
                    batch = self._transfer(batch)
                    self._log.start_batch(batch)
                self._log.position = position + trained.steps
                if self._call("on_train_batch_start", batch, batch_idx) == -1:
                    # With -1 the user ends the epoch, which here is the client's.
                    for _ in range(batch_idx, last_idx):
                        next(context.batches)
                    return trained
                # Before the step, which may change its batch.
                metered = _UNMETERED
                if tally is not None and context.timed:
                    tally.add(signature_of(batch).anonymous(), len(indices))
                elif tally is not None:
                    metered = tally.batch(batch, len(indices), training=context.training)
                with metered:
                    outputs = step.step(batch, batch_idx, last=last, training=context.training)
                self._call("on_train_batch_end", outputs, batch, batch_idx)
                loss = outputs.get("loss")
                trained.add(len(indices), loss)
                if automatic and (last or (batch_idx + 1) % window == 0):
                    trained.optimizer_steps += 1
                    self._note_scale()
                self._watcher.client_stepped(number, loss)
        return trained

    def _note_scale(self) -> None:
        """Note the gradient scaler's scale without waiting for the device, which reading it as a number would do."""
        if self._scaler is not None:
            self._scales.append(self._scaler.scale(torch.ones((), device=self._device)))

    def _skipped(self) -> int:
        """Return how many of the client's steps the gradient scaler has skipped: its scale falls then."""
        if len(self._scales) < 2:
            return 0
        scales = torch.stack(self._scales)
        return int((scales[1:] < scales[:-1]).sum())

    def _call(self, hook: str, *values: Any) -> Any:
        return call_hook(self._trainer, hook, *values) if hook in self._hooks else None


class _Trained:
    """The results of a client's local training, besides its model."""

    def __init__(self) -> None:
        self.samples = self.steps = self.optimizer_steps = 0
        self.had_batch = False  # other than None
        self._losses: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, samples: int, loss: Tensor | None) -> None:
        """Add a local batch; its loss is the mean over its samples."""
        self.samples += samples
        self.steps += 1
        if loss is not None:
            self._losses.append(loss)
            self._weights.append(samples)

    def mean_loss(self) -> float:
        """Return the loss per sample; NaN if there was none."""
        if not self._losses:
            return math.nan
        losses: list[float] = torch.stack(self._losses).flatten().tolist()
        return math.fsum(map(mul, losses, self._weights)) / sum(self._weights)
