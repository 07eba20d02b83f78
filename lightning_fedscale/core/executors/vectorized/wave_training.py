"""The training of one wave of vectorized clients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.meter import ClientMeter
from lightning_fedscale.core.executors.round_context import Personal, Pipeline, RoundContext, Watcher
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.batched_step import BatchedStep, Logged, StepResult
from lightning_fedscale.core.executors.vectorized.clipping import clip_of
from lightning_fedscale.core.executors.vectorized.eligibility import Surroundings
from lightning_fedscale.core.executors.vectorized.proof import Proofs, difference, is_close, step_alone, tolerance_of
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable
from lightning_fedscale.core.executors.vectorized.wave import ClientStart, Wave
from lightning_fedscale.core.executors.vectorized.wave_batches import StepBatch, WaveBatches
from lightning_fedscale.core.lightning.hooks import is_listened_to
from lightning_fedscale.core.lightning.snapshots import MetricStates
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.types import ClientUpdate


class LoggedStep(NamedTuple):
    """The values that some clients logged in one step."""

    logged: list[Logged]
    rows: Rows
    batch_idx: int
    batch_size: int


class TrainedWave(NamedTuple):
    """The results of a wave's clients, besides their models."""

    losses: list[float]
    samples: list[int]
    steps: list[int]
    logged: list[LoggedStep]
    seconds: float
    tallies: list[ClientMeter]
    optimizer_steps: list[int]


class WaveTraining:
    """Trains waves of vectorized clients and makes their updates.

    Args:
        trainer: the Trainer.
        proofs: decides which steps are compared with sequential ones.
        store: client state between rounds.
        keepers: one for each optimizer.
        keep: whether each client keeps its optimizer state.
        watcher: is called as clients train.
        transfer: brings batches to the device.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        proofs: Proofs,
        *,
        store: ClientStore,
        keepers: list[OptimizerKeeper],
        keep: bool,
        watcher: Watcher,
        transfer: Transfer,
    ) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._device = trainer.strategy.root_device
        self._proofs = proofs
        self._store = store
        self._keepers = keepers
        self._keep = keep
        self._watcher = watcher
        self._wave = Wave(trainer.optimizers[0])
        self._batches = WaveBatches(trainer, transfer, self._wave.rows)
        self._starts: list[ClientStart] = []
        self._seconds_alone = 0.0  # of a wave's time, for the sequential steps of comparisons
        self._shown = is_listened_to(trainer, "on_client_end")

    def release(self) -> None:
        """Free the memory of the waves."""
        self._wave.release()
        self._starts = []

    def are_cut(self, context: RoundContext) -> bool:
        """See `WaveBatches.are_cut`."""
        return self._batches.are_cut(context)

    def train(
        self, context: RoundContext, wave: list[LocalWork], step: BatchedStep, around: Surroundings
    ) -> TrainedWave:
        """Train the clients of a wave; their models stay in its rows.

        Args:
            context: the round.
            wave: the clients, longest first.
            step: runs one batch of several clients.
            around: checks that they change nothing that they share.

        Raises:
            NotVectorizable: if they must train sequentially.
        """
        self._seconds_alone = 0.0
        width = len(wave)
        lengths = [len(work.batches) for work in wave]
        step.ran_python, step.about_to_run_python = False, around.note
        states = [self._start_of(work.client) for work in wave]
        self._starts = [_start(context.pipeline, work.client) for work in wave] if context.pipeline is not None else []
        started = time.perf_counter()  # excludes, in both executors, what rules compute before the first step
        self._wave.begin(context.shared, states, self._starts)
        streams = ClientStreams(lambda row: wave[row].seed, self._device)
        if context.randomness is not None and wave[0] is context.first:
            streams.begin(0, context.randomness)
        clip, every = clip_of(self._trainer), self._trainer.accumulate_grad_batches
        losses = torch.zeros(width, dtype=torch.float64, device=self._device)
        weights, samples, steps, logged = [0] * width, [0] * width, [0] * width, list[LoggedStep]()
        optimizer_steps = [0] * width
        meter = context.meter
        tallies = [] if meter is None else [meter.client() for _ in wave]
        for batch_idx in range(lengths[0]):
            active = [row for row in range(width) if batch_idx < lengths[row]]
            for group in self._batches.of_step(context, wave, active, batch_idx, streams, step.captured.suspect):
                rows = group.rows
                parameters = self._wave.parameters(rows)
                last = [batch_idx + 1 == lengths[row] for row in rows.indices]
                with context.frozen.watching_step(None, batch_idx):
                    result = self._run(context, step, group, batch_idx, last, streams, around)
                self._wave.set_buffers(rows, result.buffers)
                due = [r for r in rows.indices if (batch_idx + 1) % every == 0 or batch_idx + 1 == lengths[r]]
                if every > 1:
                    self._wave.accumulate(rows, result.gradients)
                metered = nullcontext() if meter is None or not due else meter.optimizer_step(len(due))
                with metered, self._proofs.counting_optimizer(len(due)) if due else nullcontext():
                    if every == 1:
                        self._wave.step(rows, parameters, result.gradients, clip)
                    elif due:
                        self._wave.step_accumulated(self._wave.rows(due), clip)
                for row in due:
                    optimizer_steps[row] += 1
                for row, size in zip(rows.indices, group.samples, strict=True):
                    steps[row] += 1
                    samples[row] += size
                    if result.losses is not None:
                        weights[row] += size
                if result.losses is not None:
                    rows.add(losses, result.losses.double() * group.weight(self._device))
                if result.logged:
                    logged.append(LoggedStep(result.logged, rows, batch_idx, group.batch_size))
                if tallies:
                    signature = group.signature()
                    for row, size in zip(rows.indices, group.samples, strict=True):
                        tallies[row].add(signature, size)
            self._watcher.client_stepped(sum(length <= batch_idx for length in lengths), None)
        means = [total / weight if weight else math.nan for total, weight in zip(losses.tolist(), weights, strict=True)]
        seconds = time.perf_counter() - started - self._seconds_alone
        return TrainedWave(means, samples, steps, logged, seconds, tallies, optimizer_steps)

    def _run(
        self,
        context: RoundContext,
        step: BatchedStep,
        group: StepBatch,
        batch_idx: int,
        last: list[bool],
        streams: ClientStreams,
        around: Surroundings,
    ) -> StepResult:
        """Run one local batch of some clients; if a comparison is due, also run it sequentially for some of them.

        Raises:
            NotVectorizable: if the two differ by more than rounding.
        """
        rows, shared, share = group.rows, context.shared, 1.0 / self._trainer.accumulate_grad_batches
        parameters, buffers = self._wave.parameters(rows), self._wave.buffers(rows)
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        progress.is_last_batch = together = last[0] if len(set(last)) == 1 else _Unequal()
        watched = self._proofs.watched(rows.indices, group.batch.signature, batch_idx)
        if not watched and context.meter is not None and context.meter.wants(group.signature(), group.samples[0]):
            watched = [0]  # its cost is measured in a sequential step
        if not watched:
            return step.run(parameters, buffers, group.batch, batch_idx, rows.indices, streams, share=share)
        started, before, alone = time.perf_counter(), MetricStates(self._module), dict[int, StepResult]()
        around.note()
        for i in watched:
            own = [p[i] for p in parameters], [b[i] for b in buffers]
            progress.is_last_batch = last[i]
            batch = group.alone(i)
            metered = nullcontext() if context.meter is None else context.meter.alone(batch, group.samples[i])
            with streams.copy().of(rows.indices[i]), metered:
                alone[i] = step_alone(self._trainer, shared, *own, batch, batch_idx, share, self._proofs.measuring())
        step.captured.suspect()
        progress.is_last_batch = together
        expected = MetricStates(self._module)
        before.restore()
        around.note()
        self._seconds_alone += time.perf_counter() - started
        with self._proofs.counting(len(rows)):
            result = step.run(parameters, buffers, group.batch, batch_idx, rows.indices, streams, share=share)
        around.check()
        started, tolerance = time.perf_counter(), tolerance_of(self._trainer, shared)
        for i, each in alone.items():
            if (differs := difference(result, i, each, shared.all_names, tolerance)) is not None:
                raise NotVectorizable(f"a vectorized step differs from the same sequential step in {differs}")
        every = len(alone) == len(rows)
        if every and not MetricStates(self._module).agree(expected, partial(is_close, tolerance=tolerance)):
            raise NotVectorizable("the state of a metric differs from that after the same sequential steps")
        self._seconds_alone += time.perf_counter() - started
        return result

    def _start_of(self, client: int) -> Any:
        kept = self._store.optimizers(client) if self._keep else None
        state: dict[Any, Any] = self._keepers[0].fresh if kept is None else kept[0]["state"]
        return state

    def updates(self, context: RoundContext, wave: list[LocalWork], trained: TrainedWave) -> Iterator[ClientUpdate]:
        """Yield the updates of a wave's clients, and store what each client keeps.

        Args:
            context: the round.
            wave: the clients.
            trained: the result of `train`.
        """
        shared, server = context.shared, context.server.vector
        cut, row = shared.view.trainable, -1
        initial = Personal(context)
        models = [server if start.model is None else start.model for start in self._starts]
        origins = [shared.origin(server)]
        if any(model is not server for model in models):
            origins = [shared.origin(model) for model in models]
        for deltas in self._wave.deltas(shared, origins):
            norms = torch.linalg.vector_norm(deltas[:, :cut], dim=1)
            spoilt = (~torch.isfinite(deltas[:, cut:]) & torch.isfinite(server[cut:])).any(dim=1)
            for delta, norm in zip(deltas, torch.where(spoilt, math.nan, norms).tolist(), strict=True):
                row += 1
                work, trained_any = wave[row], trained.steps[row] > 0  # false if all its batches were None
                update = ClientUpdate(
                    client=work.client,
                    delta=delta,
                    norm=norm if trained_any and math.isfinite(norm) else math.nan,
                    num_samples=work.num_samples,
                    samples=trained.samples[row],
                    steps=trained.steps[row],
                    loss=trained.losses[row],
                    seconds=trained.seconds * trained.steps[row] / (sum(trained.steps) or 1),
                    cost=trained.tallies[row].total(trained.optimizer_steps[row]) if trained.tallies else None,
                    optimizer_steps=trained.optimizer_steps[row],
                )
                if context.pipeline is not None and shared.personal and update.finite:
                    context.pipeline.keep_personal(work.client, self._wave.of_client(shared, shared.personal, row))
                if context.largest is not None:
                    context.largest.offer(update, partial(self._wave.of_client, shared, shared.largest, row))
                if self._keep and trained_any:
                    state = {
                        "state": self._wave.optimizer_state(row),
                        "options": [{} for _ in self._trainer.optimizers[0].param_groups],
                    }
                    # After an update that is not finite the optimizer's state is invalid too: the client starts afresh.
                    self._store.stage_optimizers(work.client, [state] if update.finite else None)
                if self._shown:
                    self._wave.write_to(shared, row)
                    self._watcher.client_ended(update)
                yield update
        if self._shown:
            shared.view.write_copy(context.server)
            initial.restore()


class _Unequal:
    """Stands for ``trainer.is_last_batch`` if it differs between the clients of a step."""

    def __bool__(self) -> bool:
        raise NotVectorizable("training_step reads trainer.is_last_batch, which differs between the clients of a step")


def _start(pipeline: Pipeline, client: int) -> ClientStart:
    return ClientStart(pipeline.start(client), pipeline.personal(client), pipeline.correction(client))
