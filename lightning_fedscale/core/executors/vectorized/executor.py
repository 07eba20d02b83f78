"""The vectorized executor: the local steps of many clients in one."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, cycle, islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torchmetrics import Metric

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.meter import ClientMeter
from lightning_fedscale.core.executors.sequential import (
    Personal,
    Pipeline,
    RoundContext,
    SequentialExecutor,
    Watcher,
)
from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.batched_step import BatchedStep, Logged, StepResult
from lightning_fedscale.core.executors.vectorized.clipping import clip_of
from lightning_fedscale.core.executors.vectorized.eligibility import Surroundings, explained, reason_not_vectorizable
from lightning_fedscale.core.executors.vectorized.proof import Proofs, difference, is_close, step_alone, tolerance_of
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable, Opened, opened, stacked
from lightning_fedscale.core.executors.vectorized.wave import ClientStart, Wave
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.hooks import listeners
from lightning_fedscale.core.lightning.module_state import in_hook
from lightning_fedscale.core.lightning.snapshots import MetricStates
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.core.user_code.outside import places_of
from lightning_fedscale.core.user_code.state import PythonState
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import free_memory

# Copies of the model per client: its model, gradients and optimizer state, and as much again for temporary tensors.
_COPIES = 6
_SHARE_OF_MEMORY = 0.5
_DRY_RUN_CLIENTS = 3  # clients of a dry run, which has at most one step more


class _Group(NamedTuple):
    """A batch of each of some clients, all with one batch signature."""

    rows: Rows
    batch: Opened  # stacked
    alone: Callable[[int], Any]  # each client's batch as in sequential training
    samples: list[int]
    batch_size: int  # as Lightning would read it off each batch

    def signature(self) -> BatchSignature:
        """Return the batch signature, which all the batches share."""
        return signature_of(self.batch.close(self.batch.tensors)).without_rows().anonymous()

    def weight(self, device: torch.device) -> Tensor | int:
        """Return the samples in each batch; a single number if they are all the same."""
        if len(set(self.samples)) == 1:
            return self.samples[0]
        return torch.tensor(self.samples, dtype=torch.float64).to(device, non_blocking=True)


class _Note(NamedTuple):
    """The values logged for a batch of each of some clients."""

    logged: list[Logged]
    rows: Rows
    batch_idx: int
    batch_size: int


class _Trained(NamedTuple):
    """The results of a wave's clients, besides their models."""

    losses: list[float]
    samples: list[int]
    steps: list[int]
    notes: list[_Note]
    seconds: float
    tallies: list[ClientMeter]
    optimizer_steps: list[int]


class _Attempt(NamedTuple):
    """The outcome of training a wave."""

    trained: _Trained | None
    out_of_memory: bool = False
    reason: str | None = None


class VectorizedExecutor:
    """Trains the clients of a rank in waves of vectorized clients.

    In every step of a wave, the clients whose batches have the same signature share one call of ``training_step`` under
    `torch.func.vmap`; clients that have finished are left out. Results equal those of the `SequentialExecutor` up to
    rounding, with the same random numbers.

    Args:
        trainer: the Trainer.
        sequential: trains clients that cannot be vectorized.
        store: client state between rounds.
        keepers: one for each optimizer.
        keep: whether each client keeps its optimizer state.
        watcher: is called as clients train.
        log: collects the values that clients log.
        transfer: brings batches to the device.
        clients_per_wave: most clients in a wave; None for as many as fit into memory.
        verify: whether to compare clients' steps with the same sequential steps now and then during training, not only
            before the first wave.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        sequential: SequentialExecutor,
        *,
        store: ClientStore,
        keepers: list[OptimizerKeeper],
        keep: bool,
        watcher: Watcher,
        log: ClientLog,
        transfer: Transfer,
        clients_per_wave: int | None,
        verify: bool,
    ) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._device = trainer.strategy.root_device
        self._sequential = sequential
        self._store = store
        self._keepers = keepers
        self._keep = keep
        self._watcher = watcher
        self._log = log
        self._transfer = transfer
        self._width = clients_per_wave
        self._wave = Wave(trainer.optimizers[0])
        self._batched_step: BatchedStep | None = None
        self._proofs = Proofs(while_training=verify)
        self._state: PythonState | None = None
        self._seconds_alone = 0.0  # of a wave's time, for the sequential steps of comparisons
        self._captured = 0
        self._prepared = False
        self._step_seconds = 0.0
        self._starts: list[ClientStart] = []
        self._shown = any(hasattr(each, "on_client_end") for each in listeners(trainer))
        self.reason: str | None = None
        self.slots = 0

    # ---- a round

    def order(self, work: Sequence[LocalWork]) -> Iterator[tuple[int, int]]:
        """Yield the batches in the order of use, as (number in ``work``, number of the batch)."""
        left = list(range(len(work)))
        while left:
            wave = self._next_wave([work[number] for number in left])
            numbers = [left[i] for i in wave]
            for batch_idx in range(len(work[numbers[0]].batches)):
                yield from ((number, batch_idx) for number in numbers if batch_idx < len(work[number].batches))
            done = set(numbers)
            left = [number for number in left if number not in done]

    def run(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the clients and yield their updates, wave by wave; the module holds the global weights on return."""
        planned = self._width or len(context.work)
        self._prepare(context)
        if self.reason is not None:
            yield from self.run_sequentially(context.restarted(None))
            return
        if min(planned, len(context.work)) > (self._width or planned):
            context = context.restarted(self.order(context.work))
        self.slots = 0
        positions = dict(
            zip(
                [work.client for work in context.work],
                accumulate((len(work.batches) for work in context.work), initial=0),
                strict=False,
            )
        )
        for client, start in positions.items():
            self._log.place(client, start)
        self._proofs.open_round(context.round)
        while context.work:
            wave = [context.work[i] for i in self._next_wave(context.work)]
            done = {work.client for work in wave}
            if len(wave) == 1:
                self.slots += len(wave[0].batches)
                alone = context._replace(work=wave)
                yield from self.run_sequentially(
                    alone.restarted(None) if self._cuts_itself(context) else alone, positions
                )
            else:
                self._proofs.choose(wave[0].seed % len(wave))
                attempt = self._attempt(context, wave)
                if attempt.out_of_memory:
                    self._width = len(wave) // 2
                    context = context.restarted(self.order(context.work))
                    continue
                if attempt.trained is None:
                    self.reason = attempt.reason
                    yield from self.run_sequentially(context.restarted(None), positions)
                    return
                self._proofs.close_wave()
                if self._batched_step is not None and self._batched_step.captured.made > self._captured:
                    self._captured = self._batched_step.captured.made
                    self._proofs.demand()
                yield from self._updates(context, wave, attempt.trained)
                self._report(attempt.trained.notes, wave, positions)
            rest = [work for work in context.work if work.client not in done]
            context = context._replace(work=rest, randomness=None, first=None)

    def run_sequentially(
        self, context: RoundContext, positions: Mapping[int, int] | None = None
    ) -> Iterator[ClientUpdate]:
        """Train with the sequential executor, and restore the global generators afterwards."""
        outside = randomness.capture(self._device)
        try:
            yield from self._sequential.run(context, positions)
        except Exception:
            randomness.restore(outside, self._device)
            raise
        randomness.restore(outside, self._device)

    def _attempt(self, context: RoundContext, wave: list[LocalWork]) -> _Attempt:
        """Train a wave; on failure, undo everything and return the reason."""
        if self._proofs.due:
            self._state = PythonState(self._module, places_of(self._module))
        metrics, state = MetricStates(self._module), self._state_now()
        step, around = self._batched_step_of(context.shared, state), Surroundings(self._module, self._device)
        if self._proofs.due:  # then large tensors must be equal in every element, too
            state = state.exactly()
        try:
            if state.iterators:
                raise NotVectorizable(
                    f"training_step can reach a {state.iterators[0]}, which cannot be put back to where it was"
                )
            trained = self._train(context, wave, step, around)
            if step.ran_python:
                around.check()
                if (changed := state.difference(state.again())) is not None:
                    raise NotVectorizable(
                        f"training_step changes attributes of the module, or global variables: {changed}"
                    )
            return _Attempt(trained)
        except Exception as error:
            attempt = _Attempt(None, is_oom_error(error) and len(wave) > 1, explained(error))
        context.shared.put_back()
        context.shared.set_trainable()
        context.shared.view.write(context.server)
        context.shared.write_personal(context.own)
        metrics.restore()
        state.restore()
        around.restore()
        # Outside of the handler, where no traceback holds the wave's memory.
        if self._device.type == "cuda" and attempt.out_of_memory:
            torch.cuda.empty_cache()
        return attempt

    def seconds_per_step(self, context: RoundContext, steps: int, longest: float) -> float | None:
        """Return the seconds of a vectorized local batch; None if impossible or useless, see ``reason``.

        The trial has no effects: no updates, no logged values, no random numbers drawn.

        Args:
            context: a round.
            steps: number of batches of each client to try.
            longest: seconds per batch of a single client above which vectorizing gains nothing.
        """
        self._prepare(context)
        if self.reason is None and self._step_seconds > longest:
            self.reason = f"a local batch takes {self._step_seconds:.1f} s, so there is little overhead to share"
        if self.reason is not None:
            return None
        step = self._batched_step_of(context.shared, self._state_now())
        step.captured.capture_at, usual = 1, step.captured.capture_at
        wave = [context.work[i] for i in self._next_wave(context.work)]
        while (first := self._dry_run(context, wave, steps)).out_of_memory:
            self._width = len(wave) // 2
            wave = [context.work[i] for i in self._next_wave(context.work)]
        step.captured.capture_at = usual
        if first.trained is None:
            self.reason = first.reason
            return None
        again = self._dry_run(context, wave, steps).trained
        return None if again is None else again.seconds / sum(again.steps)

    def _prepare(self, context: RoundContext) -> None:
        """Find out, before the first wave, whether clients can be vectorized and how many fit into memory."""
        if self._prepared or len(context.work) < 2:
            return
        self._prepared = True
        self.reason = reason_not_vectorizable(self._trainer)
        if self.reason is not None:
            return
        some = _alike(context.work)[:_DRY_RUN_CLIENTS]
        with self._proofs.of_everything() as saved:
            while (attempt := self._dry_run(context, some, self._dry_run_steps())).out_of_memory:
                some.pop()
        if attempt.trained is None:
            self.reason = attempt.reason
            return
        self._step_seconds = attempt.trained.seconds / sum(attempt.trained.steps)
        if self._width is None:
            model = sum(t.numel() * t.element_size() for t in (*context.shared.trainable, *context.shared.buffers))
            each = _COPIES * model + saved.bytes
            share = _SHARE_OF_MEMORY / (
                1 if self._device.type == "cuda" else getattr(self._trainer.strategy, "num_processes", 1)
            )
            self._width = max(1, int(free_memory(self._device) * share / each))

    def _dry_run_steps(self) -> int:
        """Return a number of steps after which the clients' models differ, within a limit."""
        return min(self._trainer.accumulate_grad_batches, _DRY_RUN_CLIENTS) + 1

    def _dry_run(self, context: RoundContext, wave: list[LocalWork], steps: int) -> _Attempt:
        """Dry-run the first steps of some clients; a client with fewer batches repeats them."""
        wave = [work._replace(batches=list(islice(cycle(work.batches), steps))) for work in wave]
        order = [work.batches[i] for i in range(steps) for work in wave if i < len(work.batches)]
        context = context._replace(work=wave, batches=map(context.fetch, order), randomness=None, first=None)
        metrics, slots = MetricStates(self._module), self.slots
        attempt = self._attempt(context, wave)
        metrics.restore()
        self.slots = slots
        return attempt

    def _next_wave(self, work: Sequence[LocalWork]) -> list[int]:
        """Return the next wave's clients, longest first, so that clients of a wave end at about the same time."""
        longest = sorted(range(len(work)), key=lambda i: -len(work[i].batches))
        width = min(len(work), self._width or len(work))
        waves = -(-len(work) // width)
        return longest[: -(-len(work) // waves)]

    # ---- a wave

    def _train(self, context: RoundContext, wave: list[LocalWork], step: BatchedStep, around: Surroundings) -> _Trained:
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
        weights, samples, steps, notes = [0] * width, [0] * width, [0] * width, list[_Note]()
        optimizer_steps = [0] * width
        meter = context.meter
        tallies = [] if meter is None else [meter.client() for _ in wave]
        for batch_idx in range(lengths[0]):
            active = [row for row in range(width) if batch_idx < lengths[row]]
            for group in self._groups(context, wave, active, batch_idx, streams):
                rows = group.rows
                parameters = self._wave.parameters(rows)
                last = [batch_idx + 1 == lengths[row] for row in rows.indices]
                result = self._step(context, step, group, batch_idx, last, streams, around)
                self._wave.set_buffers(rows, result.buffers)
                due = [r for r in rows.indices if (batch_idx + 1) % every == 0 or batch_idx + 1 == lengths[r]]
                if every > 1:
                    self._wave.accumulate(rows, result.gradients)
                with nullcontext() if meter is None or not due else meter.optimizer_step(len(due)):
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
                    notes.append(_Note(result.logged, rows, batch_idx, group.batch_size))
                if tallies:
                    signature = group.signature()
                    for row, size in zip(rows.indices, group.samples, strict=True):
                        tallies[row].add(signature, size)
            self._watcher.client_stepped(sum(length <= batch_idx for length in lengths), None)
        self.slots += width * lengths[0]
        means = [total / weight if weight else math.nan for total, weight in zip(losses.tolist(), weights, strict=True)]
        seconds = time.perf_counter() - started - self._seconds_alone
        return _Trained(means, samples, steps, notes, seconds, tallies, optimizer_steps)

    def _step(
        self,
        context: RoundContext,
        step: BatchedStep,
        group: _Group,
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
            with streams.copy().of(rows.indices[i]), self._proofs.measuring(), metered:
                alone[i] = step_alone(self._trainer, shared, *own, batch, batch_idx, share)
        step.captured.suspect()
        progress.is_last_batch = together
        expected = MetricStates(self._module)
        before.restore()
        around.note()
        self._seconds_alone += time.perf_counter() - started
        result = step.run(parameters, buffers, group.batch, batch_idx, rows.indices, streams, share=share)
        around.check()
        started, tolerance = time.perf_counter(), tolerance_of(self._trainer, shared)
        for i, each in alone.items():
            if (told := difference(result, i, each, shared.all_names, tolerance)) is not None:
                raise NotVectorizable(f"a step of theirs is not what it is alone: {told}")
        every = len(alone) == len(rows)
        if every and not MetricStates(self._module).agree(expected, partial(is_close, tolerance=tolerance)):
            raise NotVectorizable("a metric is not what it is if they train one after the other")
        self._seconds_alone += time.perf_counter() - started
        return result

    def _start_of(self, client: int) -> Any:
        kept = self._store.optimizers(client) if self._keep else None
        state: dict[Any, Any] = self._keepers[0].fresh if kept is None else kept[0]["state"]
        return state

    def _state_now(self) -> PythonState:
        self._state = PythonState(self._module) if self._state is None else self._state.again()
        return self._state

    def _batched_step_of(self, shared: SharedTensors, state: PythonState) -> BatchedStep:
        """Return the batched step; captured steps are dropped if the Python state that they read has changed."""
        if self._batched_step is None or not self._batched_step.is_of(shared):
            if self._batched_step is not None:
                self._proofs.demand()
            self._batched_step = BatchedStep(self._trainer, shared)
        if self._batched_step.captured.open_wave(state):
            self._proofs.demand()
        return self._batched_step

    def close(self) -> None:
        """Release the captured steps and the module's Python state at the end of the run."""
        self._state = None
        if self._batched_step is not None:
            self._batched_step.captured.close()

    def _cuts_itself(self, context: RoundContext) -> bool:
        """Return whether batches are cut from cached data for many clients at once rather than taken one by one."""
        return context.cache is not None and not self._transfer.has_hooks

    def _groups(
        self, context: RoundContext, wave: list[LocalWork], active: list[int], batch_idx: int, streams: ClientStreams
    ) -> Iterator[_Group]:
        """Yield the clients' batches, grouped by batch signature."""
        if self._cuts_itself(context):
            assert context.cache is not None
            by_size: dict[int, list[int]] = {}
            for row in active:
                by_size.setdefault(len(wave[row].batches[batch_idx]), []).append(row)
            for size, members in by_size.items():
                indices = [wave[row].batches[batch_idx] for row in members]
                convert = self._trainer.precision_plugin.convert_input
                batch = opened(convert(context.cache.stacked(indices)))

                def cut(position: int, cache: DeviceData = context.cache, indices: list[list[int]] = indices) -> Any:
                    return self._trainer.precision_plugin.convert_input(cache.batch(indices[position]))

                yield _Group(self._wave.rows(members), batch, cut, [size] * len(members), size)
            return
        found: dict[Any, tuple[list[int], list[Any], list[Opened]]] = {}
        for row in active:
            with streams.of(row):
                batch = next(context.batches)
                if batch is None:
                    continue
                if batch_idx or wave[row] is not context.first:
                    # The first batch of a round was already transferred, in the Trainer's own loop.
                    batch = self._transfer(batch)
            if self._batched_step is not None:
                self._batched_step.captured.suspect()  # the loader and the transfer hooks are user code
            parts = opened(batch)
            members, batches, each = found.setdefault(parts.signature, ([], [], []))
            members.append(row)
            batches.append(batch)
            each.append(parts)
        for members, batches, each in found.values():
            samples = [len(wave[row].batches[batch_idx]) for row in members]
            size = extract_batch_size(batches[0])
            yield _Group(self._wave.rows(members), stacked(each), batches.__getitem__, samples, size)

    # ---- after a wave

    def _updates(self, context: RoundContext, wave: list[LocalWork], trained: _Trained) -> Iterator[ClientUpdate]:
        shared, server = context.shared, context.server
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
            shared.view.write(server)
            initial.restore()

    def _report(self, notes: list[_Note], wave: list[LocalWork], positions: dict[int, int]) -> None:
        """Forward the logged values as if the clients had trained sequentially."""
        for note in notes:
            rows = note.rows.indices
            places = [positions[wave[row].client] + note.batch_idx for row in rows]
            for name, values, options in note.logged:
                if isinstance(values, Metric):
                    with in_hook(self._module, "training_step"):
                        self._module.log(name, values, **options)
                    continue
                if isinstance(values, Tensor):
                    each = values
                else:
                    each = torch.full((len(rows),), float(values), device=self._device)
                rest = dict(options)
                size = rest.pop("batch_size", None) or note.batch_size
                self._log.add_stacked(name, each, [size] * len(rows), rest, positions=places)


class _Unequal:
    """Stands for ``trainer.is_last_batch`` if it differs between the clients of a step."""

    def __bool__(self) -> bool:
        raise NotVectorizable("training_step asks for trainer.is_last_batch, which differs between clients of one step")


def _start(pipeline: Pipeline, client: int) -> ClientStart:
    return ClientStart(pipeline.start(client), pipeline.personal(client), pipeline.correction(client))


def _alike(work: Sequence[LocalWork]) -> list[LocalWork]:
    """Return the clients whose first batches have the most common size, since only batches of one size share a step."""
    sizes = [len(each.batches[0]) for each in work]
    common = Counter(sizes).most_common(1)[0][0]
    return [each for each, size in zip(work, sizes, strict=True) if size == common]
