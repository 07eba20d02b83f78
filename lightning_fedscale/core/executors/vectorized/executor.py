"""The vectorized executor: the local steps of many clients in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, cycle, islice, zip_longest
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fedscale.core.client_state import ClientStore, OptimizerKeeper
from lightning_fedscale.core.executors.machine import machine_of
from lightning_fedscale.core.executors.round_context import RoundContext, Watcher
from lightning_fedscale.core.executors.sequential import SequentialExecutor
from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.step_model import Forecast, StepCounts, StepModel
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.batched_step import BatchedStep
from lightning_fedscale.core.executors.vectorized.eligibility import Surroundings, explained, reason_not_vectorizable
from lightning_fedscale.core.executors.vectorized.proof import Proofs
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable
from lightning_fedscale.core.executors.vectorized.wave_training import LoggedStep, TrainedWave, WaveTraining
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.module_state import in_hook
from lightning_fedscale.core.lightning.snapshots import MetricStates
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.core.user_code.outside import places_of
from lightning_fedscale.core.user_code.state import PythonState
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import free_memory, is_out_of_memory

# Copies of the model per client: its model, gradients and optimizer state, and as much again for temporary tensors.
_COPIES = 6
_SHARE_OF_MEMORY = 0.5
_DRY_RUN_CLIENTS = 3  # clients of a dry run, which has at most one step more


class _Attempt(NamedTuple):
    """The outcome of training a wave."""

    trained: TrainedWave | None
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

    Attributes:
        reason: why clients cannot be vectorized; None if they can.
        slots: the number of local steps for which there was room in the last round.
        kept_width: clients in a wave as memory allows, for checkpoints; None if unknown or given.
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
        self._log = log
        self._width = clients_per_wave
        self.kept_width: int | None = None
        self._batched_step: BatchedStep | None = None
        self._proofs = Proofs(while_training=verify)
        self._waves = WaveTraining(
            trainer, self._proofs, store=store, keepers=keepers, keep=keep, watcher=watcher, transfer=transfer
        )
        self._state: PythonState | None = None
        self._captured = 0
        self._prepared = False
        self._step_seconds = 0.0
        self._counts: StepCounts | None = None
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
        self.slots = 0
        self._prepare(context)
        if self.reason is not None:
            self.close()
            self.slots = sum(len(work.batches) for work in context.work)
            yield from self.run_sequentially(context.restarted(None))
            return
        if min(planned, len(context.work)) > (self._width or planned):
            context = context.restarted(self.order(context.work))
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
                    alone.restarted(None) if self._waves.are_cut(context) else alone, positions
                )
            else:
                self._proofs.choose(wave[0].seed % len(wave))
                attempt = self._attempt(context, wave)
                if attempt.out_of_memory:
                    self._halve(wave)
                    context = context.restarted(self.order(context.work))
                    continue
                if attempt.trained is None:
                    self.reason = attempt.reason
                    self.slots += sum(len(work.batches) for work in context.work)
                    self.close()
                    yield from self.run_sequentially(context.restarted(None), positions)
                    return
                self._proofs.close_wave()
                self.slots += len(wave) * len(wave[0].batches)
                if self._batched_step is not None and self._batched_step.captured.made > self._captured:
                    self._captured = self._batched_step.captured.made
                    self._proofs.demand()
                yield from self._waves.updates(context, wave, attempt.trained)
                self._log_values(attempt.trained.logged, wave, positions)
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
                    f"training_step can reach a {state.iterators[0]}, whose position cannot be restored"
                )
            trained = self._waves.train(context, wave, step, around)
            if step.ran_python:
                around.check()
                if (changed := state.difference(state.again())) is not None:
                    raise NotVectorizable(
                        f"training_step changes attributes of the module or global variables: {changed}"
                    )
                if context.frozen.changed():
                    raise NotVectorizable("training_step writes to frozen parameters, which all clients share")
            return _Attempt(trained)
        except Exception as error:
            lacking = is_out_of_memory(error) and len(wave) > 1
            attempt = _Attempt(None, lacking, explained(error))
        context.frozen.undo()
        context.shared.put_back()
        context.shared.set_trainable()
        context.shared.view.write_copy(context.server)
        context.shared.write_personal(context.own)
        metrics.restore()
        state.restore()
        around.restore()
        # Outside of the handler, where no traceback holds the wave's memory.
        if attempt.out_of_memory:
            self.release_wave()
        return attempt

    def forecast(self, context: RoundContext, least: float) -> Forecast | None:
        """Predict the times of a local batch in this round; None if clients cannot be vectorized, see ``reason``.

        The dry runs that this takes have no effects: no updates, no logged values, no random numbers drawn.

        Args:
            context: a round.
            least: how many times as fast vectorized steps must be to be of use.
        """
        self._prepare(context, least)
        if self.reason is not None:
            return None
        clients = self._clients_per_step(context.work)
        forecast = Forecast(self._model(), clients, captured=True, trial=self._step_seconds)
        if forecast.gain <= least or forecast._replace(captured=False).gain > least:
            return forecast
        # It is of use only if steps can be captured.
        step = self._batched_step_of(context.shared, self._state_now())
        with step.captured.at_once():
            wave = [context.work[i] for i in self._next_wave(context.work)]
            while (attempt := self._dry_run(context, _alike(wave), 1)).out_of_memory:
                self._halve(wave)
                wave = [context.work[i] for i in self._next_wave(context.work)]
        self.reason = attempt.reason
        return forecast._replace(captured=len(step.captured) > 0) if attempt.trained is not None else None

    def _clients_per_step(self, work: Sequence[LocalWork]) -> float:
        """Return how many clients' local batches a vectorized step has on average: those of one size in a wave."""
        left, batches, steps = list(work), 0, 0
        while left:
            chosen = set(self._next_wave(left))
            sizes = [list(map(len, left[i].batches)) for i in chosen]
            batches += sum(map(len, sizes))
            steps += sum(len({each for each in step if each is not None}) for step in zip_longest(*sizes))
            left = [each for i, each in enumerate(left) if i not in chosen]
        return batches / max(1, steps)

    def _model(self) -> StepModel:
        assert self._counts is not None
        return StepModel(self._counts, machine_of(self._device), self._trainer.accumulate_grad_batches)

    def _useless(self, least: float) -> str | None:
        """Return why vectorizing gains too little, however fast its calls are; None if it may gain more."""
        if (most := (model := self._model()).most()) > least:
            return None
        return f"vectorized steps should be at most {most:.2f} times as fast as sequential ones ({model.described()})"

    def _prepare(self, context: RoundContext, least: float | None = None) -> None:
        """Find out, before the first wave, whether clients can be vectorized and how many fit into memory.

        Args:
            context: a round.
            least: how many times as fast vectorized steps must be to be of use; None if they are wanted in any case.
        """
        if self._prepared or len(context.work) < 2:
            return
        self._prepared = True
        self.reason = reason_not_vectorizable(self._trainer)
        if self.reason is not None:
            return
        some = _alike(context.work)[:_DRY_RUN_CLIENTS]
        self._counts, useless = (None, None) if least is None else (StepCounts(), partial(self._useless, least))
        with self._proofs.of_everything(self._counts, useless) as saved:
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
            fitting = max(1, int(free_memory(self._device) * share / each))
            # A resumed run keeps its width, on which the order of sums depends, unless it certainly does not fit.
            kept = self.kept_width
            self._width = self.kept_width = kept if kept is not None and kept * share <= fitting else fitting

    def _dry_run_steps(self) -> int:
        """Return a number of steps after which the clients' models differ, within a limit."""
        return min(self._trainer.accumulate_grad_batches, _DRY_RUN_CLIENTS) + 1

    def _dry_run(self, context: RoundContext, wave: list[LocalWork], steps: int) -> _Attempt:
        """Dry-run the first steps of some clients; a client with fewer batches repeats them."""
        wave = [work._replace(batches=list(islice(cycle(work.batches), steps))) for work in wave]
        order = [work.batches[i] for i in range(steps) for work in wave if i < len(work.batches)]
        context = context._replace(work=wave, batches=map(context.fetch, order), randomness=None, first=None)
        metrics = MetricStates(self._module)
        attempt = self._attempt(context, wave)
        metrics.restore()
        return attempt

    def _next_wave(self, work: Sequence[LocalWork]) -> list[int]:
        """Return the next wave's clients, longest first, so that clients of a wave end at about the same time."""
        longest = sorted(range(len(work)), key=lambda i: -len(work[i].batches))
        width = min(len(work), self._width or len(work))
        waves = -(-len(work) // width)
        return longest[: -(-len(work) // waves)]

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

    def _halve(self, wave: Sequence[LocalWork]) -> None:
        self._width = len(wave) // 2
        if self.kept_width is not None:
            self.kept_width = self._width

    def release_wave(self) -> None:
        """Release the memory of the last wave, which the next one allocates again."""
        self._waves.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release captured steps, the module's Python state and the memory of waves, when no more waves are to come."""
        self._state = None
        if self._batched_step is not None:
            self._batched_step.captured.close()
        self.release_wave()

    def _log_values(self, steps: list[LoggedStep], wave: list[LocalWork], positions: dict[int, int]) -> None:
        """Forward the logged values as if the clients had trained sequentially."""
        for step in steps:
            rows = step.rows.indices
            places = [positions[wave[row].client] + step.batch_idx for row in rows]
            for name, values, options in step.logged:
                if isinstance(values, Metric):
                    with in_hook(self._module, "training_step"):
                        self._module.log(name, values, **options)
                    continue
                if isinstance(values, Tensor):
                    each = values
                else:
                    each = torch.full((len(rows),), float(values), device=self._device)
                rest = dict(options)
                size = rest.pop("batch_size", None) or step.batch_size
                self._log.add_stacked(name, each, [size] * len(rows), rest, positions=places)


def _alike(work: Sequence[LocalWork]) -> list[LocalWork]:
    """Return the clients whose first batches have the most common size, since only batches of one size share a step."""
    sizes = [len(each.batches[0]) for each in work]
    common = Counter(sizes).most_common(1)[0][0]
    return [each for each, size in zip(work, sizes, strict=True) if size == common]
