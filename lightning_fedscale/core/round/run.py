"""One communication round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_fedscale.core.executors import ExecutorTiming, FrozenWritten, LargestClient, RoundContext
from lightning_fedscale.core.lightning.snapshots import MetricStates
from lightning_fedscale.core.round.accumulator import RoundAccumulator
from lightning_fedscale.core.round.client_pipeline import ClientPipeline, Contribution, PersonalPipeline
from lightning_fedscale.core.round.costs import corrected, model_bytes, operations
from lightning_fedscale.core.round.fit import Fit
from lightning_fedscale.core.round.opening import OpenRound
from lightning_fedscale.core.user_code.outside import places_of
from lightning_fedscale.core.user_code.state import PythonState
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.types import ClientCost, ClientUpdate, RoundRecord
from lightning_fedscale.utils import randomness

_MOST_COPIED = 1 << 24  # bytes of a tensor outside the module's own that is copied in case the round starts again


class RoundRunner:
    """Trains the cohort, merges the ranks, and moves the global model.

    Args:
        fit: the parts that outlive the round.
        opened: the round, its first batch on the device.
        batch: that batch.
        training: False when nothing may learn; then only buffers are averaged.

    Raises:
        ValueError: if clients or server keep states for other parameters than those that are trainable now.
    """

    def __init__(self, fit: Fit, opened: OpenRound, batch: Any, *, training: bool) -> None:
        assert fit.data is not None
        self._fit = fit
        self._data = fit.data
        self._plan = opened.plan
        self._started = opened.started
        self._is_again = opened.is_again
        self._training = training
        self._shared = shared = fit.tensors.shared()
        fit.tensors.check_trained(shared)
        self._server = shared.view.copy()  # the global model
        self._cohort = fit.cohort(opened.plan, shared)
        self._table = fit.table(opened.plan, shared)
        self._cursors = {item.client: item.cursor for item in opened.work}
        self._largest = LargestClient()
        states = fit.server.open_round(shared.view)
        needs_pipeline = fit.options.algorithm.needs_pipeline or opened.plan.buffered is not None
        self._pipeline = self._make_pipeline(opened, states) if training and needs_pipeline else None
        self._context = RoundContext(
            round=opened.plan.round,
            work=opened.work,
            batches=opened.all_batches(batch),
            first=opened.first,
            randomness=None if opened.first is None else opened.inside,
            cache=fit.data.loader.cache,
            shared=shared,
            server=self._server,
            training=training,
            fetch=fit.data.loader.fetch,
            reopen=partial(fit.batches.stream, opened.plan.round),
            meter=fit.meter,
            pipeline=self._pipeline,
            own={name: tensor.detach().clone() for name, tensor in shared.personal.items()},
            largest=self._largest,
            frozen=fit.tensors.guard(shared, opened.plan.round),
        )

    def run(self) -> RoundRecord:
        """Run one communication round: local training, one collective, one server step.

        Returns:
            The round in numbers, the same on every rank.

        Raises:
            RuntimeError: if no client's update, or not the server's step, is finite. The module then holds the last
                good global model.
            FrozenWritten: on all ranks, if clients of any rank wrote to frozen parameters that are not exchanged.
                Everything is then as before the round.
        """
        fit, context = self._fit, self._context
        fit.clients.fetch(self._plan)
        fit.notifier.expect_clients(len(context.work))
        with self._undone_on_failure(), self._repeatable():
            total, messages = self._train_and_merge()
            largest = self._buffers_of_largest()
            delta = fit.server.aggregate(self._server, total, self._table, self._cohort, messages)
            record = self._record(delta)
            if self._training:
                fit.notifier.aggregated(record, self._shared.named(delta))
            record = self._step_server(delta, record)
            self._shared.write_largest(largest)
        self._shared.set_trainable(self._table.trainable())
        if self._training:
            self._commit(record)
        return record

    # ---- local training

    def _train_and_merge(self) -> tuple[Tensor, Tensor | None]:
        """Train this rank's clients and add up the ranks; an exception on one rank is raised on all."""
        fit, table = self._fit, self._table
        like = self._shared.view.zeros()
        accumulator = RoundAccumulator(fit.options.algorithm, like, self._cohort, table, fit.world_size)
        failure: Exception | None = None
        written: list[str] = []
        try:
            if not self._is_again:
                fit.notifier.round_started(self._plan.round, self._plan.cohort)
            self._context.frozen.open()
            with fit.scope.entered(self._context, draws=fit.executor.draws_from_globals), fit.log.collecting():
                self._train_clients(accumulator)
            if fit.world_size > 1:
                table.set_logged(fit.log.joint.pack(fit.log.last_clients()))
        except FrozenWritten as error:
            written = error.names
        except Exception as error:
            # The other ranks wait for this one in the collective, where they learn of it.
            failure = error
        self._finish_rank(failed=failure is not None, again=bool(written))
        total, messages = accumulator.merge()  # *** the ranks meet here, once in a round ***
        fit.requeue.agreed = table.preempted()
        if failure is not None:
            raise failure
        if failed := table.failed_ranks():
            raise RuntimeError(
                f"round {self._plan.round}: rank {', '.join(map(str, failed))} raised an exception (see its traceback),"
                " so the global model stays as it was before this round."
            )
        if table.again():
            raise FrozenWritten(fit.tensors.written_on_any_rank(written))
        if fit.world_size > 1:
            fit.log.joint.merge(table.logged)
        return total, messages

    def _train_clients(self, accumulator: RoundAccumulator) -> None:
        """Train the clients, and add each update to the accumulator."""
        frozen = self._context.frozen
        with frozen.watching(wanted=frozen.whole_round):
            for update in self._fit.executor.run(self._context):
                contribution = self._contribution_of(update)
                update = contribution.update
                if not update.without_batches:
                    self._table.add_trainable(self._shared.trainable_now())
                if update.finite:
                    self._shared.strip(update)
                    accumulator.add(update, contribution.weight, contribution.message)
            if (ditto := self._fit.options.algorithm.ditto) is not None and self._training:
                self._train_personal(ditto)
        frozen.check()

    def _contribution_of(self, update: ClientUpdate) -> Contribution:
        """Return what the server receives of an update, and note it in the round's table."""
        algorithm, pipeline, cost = self._fit.options.algorithm, self._pipeline, update.cost or ClientCost()
        if pipeline is None:
            contribution = Contribution(update, None, algorithm.weigh(update), float(self._shared.message_bytes))
        else:
            contribution = pipeline.send(update)
            if update.cost is not None:
                cost = cost.plus(pipeline.cost(update))
        sent = 0.0 if contribution.update.without_batches else contribution.bytes
        self._table.clients.add(
            contribution.update,
            contribution.weight,
            self._cursors[update.client],
            self._fit.executor.scaler_state(),
            cost,
            (sent, contribution.normalizer, contribution.within),
        )
        return contribution

    def _train_personal(self, ditto: Ditto) -> None:
        """Train each client's personal model; nothing of it is logged, reported to callbacks or sent."""
        fit, shared = self._fit, self._shared
        pipeline = PersonalPipeline(ditto, fit.clients.store, shared, self._server.vector)
        with fit.notifier.silenced():
            for update in fit.executor.run_again(self._context._replace(pipeline=pipeline, largest=None)):
                if update.cost is not None:
                    pulled = pipeline.correction(update.client).operations
                    cost = update.cost.plus(corrected(pulled, update, shared))
                    self._table.clients.add_cost(update.client, cost)
                pipeline.keep(update)

    def _finish_rank(self, *, failed: bool, again: bool) -> None:
        """Note in the table what the other ranks need to know of this one."""
        fit, table = self._fit, self._table
        seconds = time.perf_counter() - self._started
        irregular = fit.tensors.has_irregular_buffers(self._shared, self._largest)
        table.finish_rank(
            fit.rank,
            seconds,
            failed=failed,
            preempted=fit.requeue.requested,
            irregular_buffers=irregular,
            again=again,
        )
        table.add_executor(fit.executor.slots, fit.executor.timing)
        if fit.meter is not None:
            table.add_side(fit.meter.side())

    def _make_pipeline(self, opened: OpenRound, states: dict[str, Any]) -> ClientPipeline:
        fit, shared = self._fit, self._shared
        work = {item.client: item for item in opened.work}
        return ClientPipeline(
            fit.options.algorithm,
            fit.clients.store,
            shared,
            self._cohort,
            fit.trainer.optimizers[0],
            states,
            starts=fit.stale.starts(opened.plan),
            scales=fit.stale.scales(opened.plan),
            gradient_of=lambda client, tally: fit.batches.gradient(work[client], shared, tally),
            meter=fit.meter,
        )

    # ---- the server's part, the same on every rank

    def _buffers_of_largest(self) -> Mapping[str, Tensor | None]:
        rank = self._table.clients.rank_of_largest(self._data.num_samples_of(self._plan.cohort))
        return self._fit.tensors.of_largest(
            self._shared, self._largest, rank, irregular=self._table.irregular_buffers()
        )

    def _record(self, delta: Tensor) -> RoundRecord:
        fit, fleet = self._fit, self._data.fleet
        return self._table.record(
            float(torch.linalg.vector_norm(delta[: self._shared.view.trainable])),
            model_bytes(fit.options.algorithm, self._shared),
            fit.totals.simulated,
            fit.totals.epsilon(self._plan.round + 1),
            None if fleet is None else fleet.batch_sizes_of(self._cohort.clients),
        )

    def _step_server(self, delta: Tensor, record: RoundRecord) -> RoundRecord:
        """Move the global model; return the record with the server's operations and the bytes it sends."""
        fit, shared = self._fit, self._shared
        bits = fit.server.move(
            shared,
            self._server,
            delta,
            self._cohort,
            training=self._training,
            mean_square=self._table.clients.mean_square(),
            on_step=fit.notifier.server_step,
        )
        fit.tensors.warn_of_averages(shared.changed_unsure(self._server))
        if not self._training:
            return record
        if shared.fits:
            with randomness.untouched():
                shared.refit()
        algorithm, downlink = fit.options.algorithm, fit.options.downlink_compressor
        record = replace(record, operations=operations(algorithm, downlink, self._cohort))
        if bits is not None:
            uncompressed = model_bytes(algorithm, shared) - shared.trainable_bytes
            received = (uncompressed + math.ceil(bits / 8)) * len(self._cohort.clients)
            record = replace(record, download_bytes=received)
        return record

    # ---- the end

    def _commit(self, record: RoundRecord) -> None:
        """Commit what clients and server keep, now that the round has succeeded."""
        fit, rounds = self._fit, self._plan.round + 1
        fit.clients.commit(self._plan, self._table.clients.cursors())
        fit.executor.set_scaler_state(*self._table.clients.smallest_scale())
        fit.stale.keep(self._plan, lambda: self._server.vector)
        if (why := fit.totals.exhausted(rounds)) is not None:
            rank_zero_info(why)
            fit.trainer.should_stop = True
        fit.executor.choose(ExecutorTiming(*self._table.executor_timing()))
        fit.totals.add(record)
        fit.log.points.commit(int(record.local_steps.sum()))
        if len(record.clients):
            fit.tensors.end_watch(self._shared, int(record.local_steps.max()))

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Restore what clients changed besides tensors if the round must start again."""
        if not self._shared.untouched:
            yield
            return
        module = self._fit.trainer.lightning_module
        state, metrics = PythonState(module, places_of(module), most=_MOST_COPIED), MetricStates(module)
        try:
            yield
        except FrozenWritten:
            self._fit.log.undo()
            metrics.restore()
            state.restore()
            raise

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Restore the module and all that clients keep to before the round if anything fails inside."""
        try:
            yield
        except BaseException:
            shared = self._shared
            self._context.frozen.restore()
            shared.rebind()
            shared.irregular.restore()
            shared.set_trainable()
            shared.view.write_copy(self._server)
            shared.write_personal(self._context.own)
            self._fit.executor.close_round()
            self._fit.clients.rollback()
            raise
