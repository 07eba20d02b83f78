"""A run of rounds: the data divided among clients, what they keep, the server, and how a round goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.core.client_state import OptimizerKeeper
from lightning_fedscale.core.executors import (
    Ballot,
    ClientLog,
    Exchange,
    ExecutorChoice,
    LargestClient,
    RoundContext,
    RoundLoader,
    SequentialExecutor,
    Transfer,
    VectorizedExecutor,
)
from lightning_fedscale.core.executors.meter import Meter
from lightning_fedscale.core.lightning.checkpoint import (
    changed_settings,
    check_resume,
    federated_state,
    refuse_other_owners,
    refuse_other_rules,
)
from lightning_fedscale.core.lightning.module_flags import restore_flags, restore_groups, restore_pruning
from lightning_fedscale.core.lightning.run_state import (
    advise_on_workers,
    is_train_iterator,
    next_round,
)
from lightning_fedscale.core.lightning.side_effects import undone
from lightning_fedscale.core.lightning.slurm import Requeue
from lightning_fedscale.core.lightning.train_data import division_by_ranks
from lightning_fedscale.core.options import compatibility as combinations
from lightning_fedscale.core.options.options import Arguments
from lightning_fedscale.core.options.trainer_checks import check_trainable
from lightning_fedscale.core.plan import LocalWork, RoundPlan
from lightning_fedscale.core.round.client_batches import ClientBatches
from lightning_fedscale.core.round.client_pipeline import (
    DITTO,
    PersonalModels,
    Sent,
    Uplink,
)
from lightning_fedscale.core.round.client_scope import ClientScope
from lightning_fedscale.core.round.client_states import ClientStates
from lightning_fedscale.core.round.costs import corrected, model_bytes, operations, size_of_message, update_bytes
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.round.module_tensors import ModuleTensors
from lightning_fedscale.core.round.notifier import Notifier
from lightning_fedscale.core.round.run_totals import RunTotals
from lightning_fedscale.core.round.server_step import GlobalModel
from lightning_fedscale.core.round.stale_models import OlderModels
from lightning_fedscale.core.round.sums import RoundSums
from lightning_fedscale.core.round.work import Workload
from lightning_fedscale.devices import ON_CLIENT, estimate_memory
from lightning_fedscale.devices.fleet import Fleet
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.privacy import PrivacyBudget
from lightning_fedscale.types import ClientCost, Cohort, IntArray, RoundRecord
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import format_bytes

_SAMPLED = 16  # rounds, of which one must be large enough for the aggregator before training begins


@dataclass
class _OpenRound:
    """A round whose first batch is on its way through the Trainer's loop."""

    plan: RoundPlan
    work: list[LocalWork]
    first: LocalWork | None  # the client whose first batch this is; None if it is only shown
    batches: Iterator[Any]
    skipped: int  # batches before the first one that are None
    started: float
    outside: randomness.GlobalState | None  # the global generators as the user left them; None if nothing draws
    inside: randomness.GlobalState | None = None  # as the first client finds them once its first batch is there


class Federation:
    """Everything between ``trainer.fit`` and the last round.

    A round goes so; the line marked with stars crosses ranks, and kept optimizers do that move with their clients:

        open_round    plan the cohort, start streaming its batches, hand the first one to the Trainer
        run_round     for each client of this rank: global weights -> local batches -> delta -> accumulate
                      *** one sum over ranks of accumulator and table ***
                      server step, write the global weights, commit what clients keep
        end_round     log it, tell callbacks

    Args:
        trainer: the Trainer, its strategy's optimizers not yet built.
        options: the strategy's checked arguments.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, trainer: pl.Trainer, options: Arguments, rank: int, world_size: int) -> None:
        self._trainer = trainer
        self._options = options
        self._rank = rank
        self._world_size = world_size
        self._device = trainer.strategy.root_device
        processes = world_size // trainer.num_nodes
        self.clients = ClientStates(options, rank, world_size, device=self._device, processes=processes)
        self._log = ClientLog(trainer, options.client_log_every_n, world_size)
        self.notifier = Notifier(trainer, self._log)
        self._transfer = Transfer(trainer)
        self._executor: ExecutorChoice
        self._work: Workload | None = None
        self._batches: ClientBatches
        self._global = GlobalModel(options.rules, options.server_optimizer, options.downlink_compressor)
        self._resumed: dict[str, Any] | None = None
        self._open: _OpenRound | None = None
        self._begun: list[LocalWork] = []  # what this rank does in the round that runs
        self._equipped = False
        self._totals = RunTotals(options.sampler)
        self._older = OlderModels(options.asynchrony)
        self.tensors = ModuleTensors(trainer, options)
        self.requeue = Requeue(trainer)
        self.scope = ClientScope(trainer)
        self.meter: Meter | None = None
        self.last_round: RoundRecord | None = None

    # ---- before the first round

    def attach_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Take note of the optimizers just after they were built."""
        options = self._options
        parts: dict[str, Any] = {
            "store": self.clients.store,
            "keepers": [OptimizerKeeper(optimizer) for optimizer in optimizers],
            "keep": options.keep_optimizers,
            "watcher": self.notifier,
            "log": self._log,
            "transfer": self._transfer,
        }
        corrects = options.rules.local is not None or options.rules.ditto is not None
        sequential = SequentialExecutor(self._trainer, **parts, corrects=corrects)
        vectorized = VectorizedExecutor(
            self._trainer,
            sequential,
            **parts,
            clients_per_wave=options.clients_per_wave,
            verify=options.verify_executor,
        )
        self._executor = ExecutorChoice(options.executor, sequential, vectorized)

    def attach_data(self, loader: object, share: float | int) -> RoundLoader:
        """Divide the user's training data among the clients.

        Args:
            loader: the user's train loader.
            share: share or number of each client's batches to use.

        Raises:
            TypeError, ValueError: for data that cannot be divided as asked.
        """
        trainer = self._trainer
        workload = Workload(
            trainer.lightning_module,
            loader,
            self._options,
            self._world_size,
            share,
            device=self._device,
            show_progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )
        if workload.loader.cache is None and self._work is None:  # once, however often loaders are reloaded
            advise_on_workers(trainer, loader)
        if self._work is None and (divided := division_by_ranks(trainer, workload.loader.batch_size)):
            rank_zero_warn(divided)
        self.close()
        self._work = workload
        self._batches = ClientBatches(
            trainer, workload.loader, self._transfer, seed=self._options.seed, rank=self._rank
        )
        self._calibrate(workload)
        self._check_resumed()
        return RoundLoader(loader, self._options.rounds_per_epoch, self.open_round, partial(is_train_iterator, trainer))

    def _calibrate(self, work: Workload) -> None:
        """Make privacy ready for these clients."""
        if (privacy := self._options.rules.privacy) is None:
            return
        clients, cohort = work.partition.num_clients, work.cohort_size
        budget = PrivacyBudget(privacy.calibrated(cohort / clients, cohort), cohort / clients)
        self._totals.budget = budget
        rules = self._options.rules._replace(privacy=budget.privacy)
        self._options = self._options._replace(rules=rules)
        self._global.calibrate(rules, budget.expected_weight(work.partition.sizes))

    def equip(self) -> None:
        """Before the first round: look at the model, and give the clients their simulated hardware, if any.

        Raises:
            ValueError: if a device class does not hold the model.
        """
        population, work = self._options.population, self._work
        trainer = self._trainer
        if not any(parameter.requires_grad for parameter in trainer.lightning_module.parameters()):
            return  # a callback may unfreeze layers when the first epoch begins
        if work is not None and not self._equipped:
            self._equipped = True
            if self._totals.budget is not None:
                self._totals.budget.check(trainer.global_step)
            combinations.check_model(self._options, trainer.lightning_module, self.tensors.exchange())
            first = trainer.global_step
            work.check_cohorts(range(first, first + min(self._planned_rounds() or _SAMPLED, _SAMPLED)))
            combinations.warn_of_lost_errors(
                self._options, work.partition.num_clients, work.cohort_size, self._planned_rounds()
            )
        if population is None or work is None or work.fleet is not None:
            return
        with randomness.untouched(), undone(trainer):
            model = estimate_memory(
                trainer.lightning_module,
                work.loader.example(),
                precision=str(trainer.precision),
                accumulate=self.scope.accumulation,
                device="other",
                extras={**ON_CLIENT, **self._options.rules.kept_on_device},
                trainer=trainer,
            )
            exchange = self.tensors.exchange()
            down = model_bytes(self._options.rules, exchange)
            if (downlink := self._options.downlink_compressor) is not None:
                down += size_of_message(downlink, exchange) - exchange.trainable_bytes
            duty = work.duty(down, update_bytes(self._options.rules, exchange))
            work.fleet = Fleet(population, model, work.partition.num_clients, duty)
        for name, row in work.fleet.table().iterrows():
            rank_zero_info(
                f"Federated: {row['clients']:,.0f} clients on {name} train with batches of {row['batch_size']:,.0f}"
                f" ({format_bytes(row['peak_bytes'])} of {format_bytes(row['memory'])},"
                f" {row['samples_per_second']:,.0f} samples/s)."
            )

    def _planned_rounds(self) -> int:
        """At most so many; 0 if there is no end to them."""
        # Not `estimated_stepping_batches`, which sets up loaders and draws random numbers for it.
        trainer = self._trainer
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        limits = [trainer.max_steps, epochs * self._options.rounds_per_epoch]
        return min((limit for limit in limits if limit > 0), default=0)

    def first_batches(self) -> Iterator[tuple[int, Any]]:
        """The first batch of each of this rank's clients in the round that has begun, see `ClientBatches.first_of`."""
        return self._batches.first_of(self._begun)

    @property
    def fleet(self) -> Fleet | None:
        """The clients' simulated hardware, None without a population or before the first round."""
        return None if self._work is None else self._work.fleet

    @property
    def partition(self) -> Partition | None:
        """Which samples each client holds; None before the data was seen."""
        return None if self._work is None else self._work.partition

    def divide_alike(self, dataset: Any, seed: int) -> Partition:
        """Further data divided as the training data are; see `Arguments.divide_alike`."""
        assert self._work is not None
        return self._options.divide_alike(self._work.loader.dataset, dataset, seed)

    def holder(self, client: int) -> int | None:
        """The rank that has what the client keeps; None if it makes no difference which."""
        return self.clients.holder(client)

    def personal_model(self, client: int) -> dict[str, Any] | None:
        """The module's state dict with what is the client's own in it; None if another rank has that."""
        return self.clients.personal_model(client, self._trainer.lightning_module.state_dict(), self.tensors.exchange())

    def end(self) -> None:
        """The run is over: let go of workers and of what was recorded."""
        self.close()
        self.notifier.monitors.close()
        if hasattr(self, "_executor"):  # not if training was refused before its optimizers were built
            self._executor.close()

    def close(self) -> None:
        """Stop the loader's worker processes; give up a round whose first batch never arrived."""
        if self._open is not None and self._open.inside is None:
            if self._open.outside is not None:
                randomness.restore(self._open.outside, self._device)
            self._open = None
        if self._work is not None:
            self._work.loader.close()

    # ---- a round

    def open_round(self) -> Any:
        """Plan the next round and fetch the first batch of this rank's first client, under that client's randomness."""
        assert self._work is not None
        check_trainable(self._trainer.lightning_module)
        self.equip()
        round, started = next_round(self._trainer), time.perf_counter()
        plan = self._work.plan(round, self._totals.losses)
        clients = plan.clients_of(self._rank)
        device, draws = self._device, self._batches.draw_random_numbers
        outside = randomness.capture(device) if draws else None
        try:
            work = [self._work.of_client(client, plan, self.clients.store.cursor(client)) for client in clients]
            # A rank without a client shows the Trainer a batch all the same, of a client that does not train.
            shown = work or [self._work.of_client(0, plan, (0, 0))]
            order = self._executor.order(shown)
            first_client, its_batches = shown[0], len(shown[0].batches)
            if order is not None:
                number, batch_idx = next(order)
                first_client, its_batches = shown[number], 1
                # Of cached data, executors that do not go client by client cut the other batches out themselves.
                order = chain([(number, batch_idx)], order if draws else ())
            batches = self._batches.stream(round, shown, order)
            if draws:
                randomness.seed_globals(first_client.seed, device)
            first, skipped = _first_batch(batches, sum(len(item.batches) for item in shown))
        except BaseException as error:
            if outside is not None:
                randomness.restore(outside, device)
            if isinstance(error, Exception):
                self._fail_together(plan, started)
            raise
        if not work or skipped >= its_batches:
            # Not the first client's batch: it is shown to the Trainer, and training begins with a new stream.
            batches = self._batches.stream(round, work, self._executor.order(work))
            self._open = _OpenRound(plan, work, None, batches, 0, started, outside)
        else:
            self._open = _OpenRound(plan, work, first_client, batches, skipped, started, outside)
        return first

    def first_batch_arrived(self, batch: Any) -> Any:
        """The first batch is on the device: what its transfer drew is part of the first client's randomness.

        Returns:
            The batch; in place of None, where this rank's clients have nothing else, a tensor of one zero: the Trainer
            passes over a step whose batch is None, and the other ranks wait for this one.
        """
        if (opened := self._open) is None:
            return batch
        if opened.inside is None and opened.outside is not None:
            opened.inside = randomness.capture(self._device)
            randomness.restore(opened.outside, self._device)
        return torch.zeros(1, device=self._device) if batch is None else batch

    def run_round(self, batch: Any, *, training: bool) -> dict[str, Any]:
        """Train the cohort, merge the ranks, move the global model.

        Args:
            batch: the first batch, on the device.
            training: False when nothing may learn; then only buffers are averaged.

        Returns:
            ``{"loss": ...}`` of the round for the Trainer's callbacks; empty when no client reported a loss.

        Raises:
            RuntimeError: if no client's update, or not the server's step, is finite. The module then holds the last
                good global model.
        """
        opened, self._open = self._open, None
        assert opened is not None
        assert self._work is not None
        exchange = self.tensors.exchange()
        self.tensors.check_trained(exchange)
        server = exchange.view.read()
        cohort = self._cohort(opened.plan, exchange)
        self.clients.fetch(opened.plan)
        states = self._global.open_round(server, exchange.view.trainable)
        guided = self._options.rules.guided or opened.plan.arrived is not None
        own = {name: tensor.detach().clone() for name, tensor in exchange.personal.items()}
        uplink = self._uplink(opened, exchange, cohort, states) if training and guided else None
        context = RoundContext(
            opened.plan.round,
            opened.work,
            opened.batches if opened.first is None else chain([None] * opened.skipped, [batch], opened.batches),
            opened.first,
            None if opened.first is None else opened.inside,
            self._work.loader.cache,
            exchange,
            server,
            training,
            self._work.loader.fetch,
            partial(self._batches.stream, opened.plan.round),
            self.meter,
            uplink,
            own,
            LargestClient(),
        )
        self._begun = opened.work
        self.notifier.expect_clients(len(opened.work))
        try:
            total, messages, table = self._train_together(context, opened, cohort, uplink)
            largest = self._of_largest(context, opened.plan, table)
            aggregate = self._global.aggregate(server, total, table, cohort, messages)
            norm = float(torch.linalg.vector_norm(aggregate[: exchange.view.trainable]))
            record = table.record(
                norm,
                model_bytes(self._options.rules, exchange),
                self._totals.simulated,
                self._totals.epsilon(cohort.round + 1),
                self._batch_sizes(cohort),
            )
            if training:
                self.notifier.aggregated(record, exchange.named(aggregate))
            bits = self._global.move(
                exchange,
                server,
                aggregate,
                cohort,
                training=training,
                mean_square=table.clients.mean_square(),
                on_step=self.notifier.server_step,
            )
            self.tensors.warn_of_averages(exchange.changed_unsure(server))
            if training and exchange.fits:
                with randomness.untouched():
                    exchange.refit()
            exchange.write_largest(largest)
            if training:
                computed = operations(self._options.rules, self._options.downlink_compressor, cohort)
                record = replace(record, operations=computed)
            if bits is not None:
                uncompressed = model_bytes(self._options.rules, exchange) - exchange.trainable_bytes
                received = (uncompressed + math.ceil(bits / 8)) * len(cohort.clients)
                record = replace(record, download_bytes=received)
        except BaseException:
            exchange.settle()
            exchange.restore()
            exchange.set_trainable()
            exchange.view.write(server)
            exchange.write_personal(own)
            self._executor.close_round()
            self.clients.rollback()
            raise
        exchange.set_trainable(table.trainable())
        if training:
            self._commit(opened.plan, table)
            self._older.keep(opened.plan, server)
            if (why := self._totals.exhausted(cohort.round + 1)) is not None:
                rank_zero_info(why)
                self._trainer.should_stop = True
            self._executor.settle(Ballot(*table.ballot()))
        self.last_round = record
        if training:
            self._totals.add(record)
            self._log.commit(int(record.local_steps.sum()))
        return {} if record.loss != record.loss else {"loss": torch.tensor(record.loss, device=self._device)}

    def end_round(self) -> None:
        """Log the round and tell callbacks, now that the Trainer has counted it and stepped its schedules.

        What is saved or interrupted from here on belongs to the next round.
        """
        if (record := self.last_round) is not None:
            self.notifier.round_ended(record)

    def _of_largest(self, context: RoundContext, plan: RoundPlan, table: RoundTable) -> Mapping[str, Tensor | None]:
        assert self._work is not None
        assert context.largest is not None
        rank = table.clients.rank_of_largest(self._work.held(plan.cohort))
        return self.tensors.of_largest(context.exchange, context.largest, rank, odd=table.odd_buffers())

    def _train_together(
        self, context: RoundContext, opened: _OpenRound, cohort: Cohort, uplink: Uplink | None
    ) -> tuple[Tensor, Tensor | None, RoundTable]:
        """Train this rank's clients and add up the ranks; an exception on one of them is one on all."""
        table = self._table(opened.plan, context.exchange)
        sums = RoundSums(self._options.rules, context.server, cohort, table, self._world_size)
        failure: Exception | None = None
        try:
            self.notifier.round_started(opened.plan.round, opened.plan.cohort)
            with self.scope.entered(context, draws=self._executor.draws_from_globals), self._log.collecting():
                self._train_clients(context, sums, table, uplink)
            if self._world_size > 1:
                table.set_logged(self._log.joint.pack(self._log.last_clients()))
        except Exception as error:
            # The other ranks wait for this one in the collective: there they are told.
            failure = error
        seconds, leaves = time.perf_counter() - opened.started, self.requeue.heard
        assert context.largest is not None
        odd = self.tensors.has_odd_buffers(context.exchange, context.largest)
        table.finish_rank(self._rank, seconds, failed=failure is not None, leaves=leaves, odd_buffers=odd)
        table.add_executor(self._executor.slots, self._executor.ballot)
        if self.meter is not None:
            table.add_side(self.meter.side())
        total, messages = sums.merge()
        self.requeue.agreed = table.leaves()
        if failure is not None:
            raise failure
        if failed := table.failed_ranks():
            raise RuntimeError(
                f"round {opened.plan.round}: an exception ended the work of rank {', '.join(map(str, failed))} (see"
                " there), so the global model stays as it was before this round."
            )
        if self._world_size > 1:
            self._log.joint.merge(table.logged)
        return total, messages, table

    def _train_clients(self, context: RoundContext, sums: RoundSums, table: RoundTable, uplink: Uplink | None) -> None:
        rules = self._options.rules
        plain = float(context.exchange.message_bytes)
        cursors = {item.client: item.cursor for item in context.work}
        for update in self._executor.run(context):
            sent = Sent(update, None, rules.weigh(update), plain) if uplink is None else uplink.send(update)
            cost = update.cost or ClientCost()
            if uplink is not None and update.cost is not None:
                cost = cost.plus(uplink.cost(update))
            update, weight = sent.update, sent.weight
            table.clients.add(
                update,
                weight,
                cursors[update.client],
                self._executor.scaler_state(),
                cost,
                (0.0 if update.without_batches else sent.bytes, sent.normalizer, sent.within),
            )
            if not update.without_batches:
                table.add_trainable(context.exchange.trainable_now())
            if update.finite:
                context.exchange.strip(update.delta)
                sums.add(update, weight, sent.message)
        if (ditto := rules.ditto) is not None and context.training:
            self._train_personal(ditto, context, table)

    def _train_personal(self, ditto: Ditto, context: RoundContext, table: RoundTable) -> None:
        """Once more, each client its own model: nothing of it is logged, told or sent."""
        guidance = PersonalModels(ditto, self.clients.store, context.exchange, context.server)
        with self.notifier.silenced():
            for update in self._executor.run_again(context._replace(guidance=guidance, largest=None)):
                if update.cost is not None:
                    pulled = guidance.correction(update.client).operations
                    cost = update.cost.plus(corrected(pulled, update, context.exchange))
                    table.clients.add_cost(update.client, cost)
                guidance.keep(update)

    def _fail_together(self, plan: RoundPlan, started: float) -> None:
        """This rank could not even begin: take part in the round's communication, so that no rank waits in vain."""
        if self._world_size == 1:
            return
        self.clients.fetch(plan)
        exchange = self.tensors.exchange()
        table = self._table(plan, exchange)
        cohort = self._cohort(plan, exchange)
        sums = RoundSums(self._options.rules, exchange.view.empty(), cohort, table, self._world_size)
        table.finish_rank(self._rank, time.perf_counter() - started, failed=True)
        sums.merge()

    def _cohort(self, plan: RoundPlan, exchange: Exchange) -> Cohort:
        assert self._work is not None
        registered = self._work.partition.num_clients
        return Cohort(plan.round, plan.cohort, registered, exchange.view.trainable, self._options.seed)

    def _table(self, plan: RoundPlan, exchange: Exchange) -> RoundTable:
        return RoundTable(plan, self._world_size, len(exchange.parameters), self._log.joint.size)

    def _batch_sizes(self, cohort: Cohort) -> IntArray | None:
        return None if self.fleet is None else self.fleet.batch_sizes_of(cohort.clients)

    def _uplink(self, opened: _OpenRound, exchange: Exchange, cohort: Cohort, states: dict[str, Any]) -> Uplink:
        work = {item.client: item for item in opened.work}
        return Uplink(
            self._options.rules,
            self.clients.store,
            exchange,
            cohort,
            self._trainer.optimizers[0],
            states,
            starts=self._older.starts(opened.plan),
            scales=self._older.scales(opened.plan),
            gradient_of=lambda client, tally: self._batches.gradient(work[client], exchange, tally),
            meter=self.meter,
        )

    def _commit(self, plan: RoundPlan, table: RoundTable) -> None:
        self.clients.commit(plan, table.clients.cursors())
        self._executor.set_scaler_state(*table.clients.smallest_scale())

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint needs to go on exactly; on rank 0, None elsewhere. To be called on all ranks."""
        clients = self.clients.state_dict(in_client=self.scope.in_client)
        monitored = self.notifier.monitors.state_dict(in_client=self.scope.in_client)
        if self._rank != 0:
            return None
        return federated_state(
            round=self._trainer.global_step,
            settings=self._settings(),
            seed=self._options.seed,
            num_clients=None if self.partition is None else self.partition.num_clients,
            partition=None if self.partition is None else self.partition.fingerprint,
            server=self._global.states,
            clients=clients,
            local_batches=self._log.local_batches,
            executor=self._executor.kind if self._options.executor == "auto" else None,
            gave_up=self._executor.gave_up,
            simulated=self._totals.simulated,
            versions=self._older.state_dict(),
            accumulation=[self.scope.accumulation_asked, self.scope.accumulation],
            flags=self.scope.flags(),
            trained=self.tensors.trained,
            losses=torch.tensor(sorted(self._totals.losses.items()), dtype=torch.float64).reshape(-1, 2),
            monitored=monitored,
        )

    def _settings(self) -> dict[str, Any]:
        """What may be changed on resume, but then the run is another one."""
        options = self._options
        compressor = options.rules.compressor
        return {
            "clients_per_round": options.clients_per_round,
            "local_epochs": options.local_epochs,
            # Functions have no value that a checkpoint could hold.
            "local_steps": "a function" if callable(options.local_steps) else options.local_steps,
            "rounds_per_epoch": options.rounds_per_epoch,
            "client_optimizer": "keep" if options.keep_optimizers else "reset",
            "population": None if options.population is None else options.population.description(),
            "local_rule": None if options.rules.local is None else options.rules.local.name,
            "compressor": compressor.name if compressor is not None and compressor.stateful else None,
            "mode": "sync" if options.asynchrony is None else options.asynchrony.description(),
            "buffers": dict(options.rules.buffers) or None,
            "personal": repr(options.rules.ditto) if options.rules.ditto else list(options.rules.personal),
            "threads": torch.get_num_threads(),
        }

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint that is saved while a client trains one of the start of the round."""
        if self.scope.in_client:
            self._executor.rewind_checkpoint(checkpoint)

    def load_groups(self, state: dict[str, Any]) -> None:
        """Before the optimizers are loaded: callbacks may have added groups of parameters to them."""
        if (flags := state.get("flags")) is not None:
            restore_pruning(flags, self._trainer.lightning_module)
            restore_groups(flags, self._trainer.lightning_module, self._trainer.optimizers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of ranks.

        Raises:
            ValueError: if the saved run is not this one.
        """
        self._resumed = state
        refuse_other_rules(state["settings"], self._settings())
        if state["versions"] or DITTO in state["clients"]:
            refuse_other_owners(state["settings"], self._settings())
        if changed := changed_settings(state["settings"], self._settings()):
            rank_zero_warn(f"ckpt_path: {changed}")
        self._check_resumed()
        self._executor.resume(state.get("executor"), gave_up=state.get("gave_up", False))
        self.clients.load_state_dict(state["clients"])
        self._global.load_states(state["server"], self._device)
        self._log.local_batches = state.get("local_batches", 0)
        self._totals.simulated = state.get("simulated", 0.0)
        self._older.load_state_dict(state["versions"], self._device)
        self._totals.losses = {int(client): loss for client, loss in state["losses"].tolist()}
        self.notifier.monitors.load_state_dict(state.get("monitored", {}))
        self._load_flags(state)

    def _load_flags(self, state: dict[str, Any]) -> None:
        if (flags := state.get("flags")) is None:
            return  # written by an earlier version
        self.tensors.trained = state.get("trained")
        asked, last = state["accumulation"]
        if asked == self.scope.accumulation_asked:  # otherwise the Trainer is asked for another one from now on
            self.scope.accumulation = last
        if changed := restore_flags(flags, self._trainer.lightning_module):
            rank_zero_info(
                f"Federated: {len(changed)} parameters are frozen or trainable as in the checkpoint, not as the module"
                f" was built: {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}."
            )

    def _check_resumed(self) -> None:
        # A checkpoint from before the data was seen (a learning-rate search writes one) has nothing to compare.
        if self._resumed is not None and self._resumed["partition"] is not None and self.partition is not None:
            check_resume(
                self._resumed,
                seed=self._options.seed,
                num_clients=self.partition.num_clients,
                partition=self.partition.fingerprint,
            )


def _first_batch(batches: Iterator[Any], most: int) -> tuple[Any, int]:
    """The first batch that is not None, None if all are, and how many were passed over; training skips those too."""
    for skipped in range(most):
        if (batch := next(batches)) is not None:
            return batch, skipped
    return None, most
