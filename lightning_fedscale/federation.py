"""A run of rounds: the data divided among clients, what they keep, the server, and how a round goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale import collectives, randomness
from lightning_fedscale.arguments import Arguments
from lightning_fedscale.checkpointing import changed_settings, check_resume, federated_state
from lightning_fedscale.clients import ClientStore, OptimizerKeeper, StateStore, tiers_of
from lightning_fedscale.custody import Custody
from lightning_fedscale.devices import ON_CLIENT, estimate_memory
from lightning_fedscale.devices.fleet import Fleet
from lightning_fedscale.devices.samples import largest_sample
from lightning_fedscale.executors import (
    Ballot,
    ClientLog,
    Exchange,
    ExecutorChoice,
    RoundContext,
    RoundLoader,
    SequentialExecutor,
    Transfer,
    VectorizedExecutor,
    exchange_of,
    no_batch_left,
)
from lightning_fedscale.global_model import GlobalModel
from lightning_fedscale.memory import format_bytes
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.progress import ClientProgress
from lightning_fedscale.records import RoundTable
from lightning_fedscale.rounds import LocalWork, RoundPlan
from lightning_fedscale.types import ClientCost, ClientUpdate, Params, RoundRecord
from lightning_fedscale.workload import Workload


class Meter(Protocol):
    """What says what things cost."""

    def client(self, forms: Mapping[Any, int], steps: int) -> ClientCost:
        """The cost of a client's training, from how many of its batches had which form, and their number."""

    def side(self) -> tuple[float, float]:
        """FLOPs that this rank spent on evaluation and on probing since the round before."""


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
        self._store = ClientStore(StateStore(tiers_of(self._device, options.client_state_memory, processes)))
        self._custody = Custody(self._store, rank, world_size, self._device) if options.keep_optimizers else None
        self._log = ClientLog(trainer, options.client_log_every_n)
        self._transfer = Transfer(trainer)
        self._executor: ExecutorChoice
        self._work: Workload | None = None
        self._global = GlobalModel(options.aggregator, options.server_optimizer)
        self._resumed: dict[str, Any] | None = None
        self._open: _OpenRound | None = None
        self._live: tuple[Exchange, Tensor] | None = None  # the global model, while the module holds a client's
        self._progress: ClientProgress
        self._begun: list[LocalWork] = []  # what this rank does in the round that runs
        self._simulated = 0.0  # seconds, over all rounds
        self.local_accumulation = 1
        self.meter: Meter | None = None
        self.last_round: RoundRecord | None = None

    # ---- before the first round

    def attach_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Take note of the optimizers just after they were built."""
        options = self._options
        parts: dict[str, Any] = {
            "store": self._store,
            "keepers": [OptimizerKeeper(optimizer) for optimizer in optimizers],
            "keep": options.keep_optimizers,
            "watcher": self,
            "log": self._log,
            "transfer": self._transfer,
        }
        sequential = SequentialExecutor(self._trainer, **parts)
        vectorized = VectorizedExecutor(self._trainer, sequential, **parts, clients_per_wave=options.clients_per_wave)
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
        self.close()
        self._work = workload
        self._check_resumed()
        return RoundLoader(workload.loader, self._options.rounds_per_epoch, self.open_round)

    def equip(self) -> None:
        """Give the clients their simulated hardware, if there is a population; before the first round.

        Raises:
            ValueError: if a device class does not hold the model.
        """
        population, work = self._options.population, self._work
        if population is None or work is None or work.fleet is not None:
            return
        trainer = self._trainer
        with randomness.untouched():
            sample = largest_sample(work.loader.dataset).sample
            model = estimate_memory(
                trainer.lightning_module,
                work.loader.collate([sample] * 2),
                precision=str(trainer.precision),
                accumulate=self.local_accumulation,
                device="cpu",
                extras=ON_CLIENT,
                trainer=trainer,
            )
            duty = work.duty(exchange_of(trainer.lightning_module).message_bytes)
            work.fleet = Fleet(population, model, work.partition.num_clients, duty)
        for name, row in work.fleet.table().iterrows():
            rank_zero_info(
                f"Federated: {row['clients']:,.0f} clients on {name} train with batches of {row['batch_size']:,.0f}"
                f" ({format_bytes(row['peak_bytes'])} of {format_bytes(row['memory'])},"
                f" {row['samples_per_second']:,.0f} samples/s)."
            )

    def first_batches(self) -> Iterator[tuple[int, Any]]:
        """The first batch of each of this rank's clients in the round that has begun, on the device, made once more.

        Nothing is drawn from the global generators, and clients whose first batch is None are left out.
        """
        assert self._work is not None
        for work in self._begun:
            with randomness.untouched():
                randomness.seed_globals(work.seed, self._device)
                batch = self._work.loader.fetch(work.batches[0])
                batch = batch if batch is None else self._transfer(batch)
            if batch is not None:
                yield work.client, batch

    @property
    def fleet(self) -> Fleet | None:
        """The clients' simulated hardware, None without a population or before the first round."""
        return None if self._work is None else self._work.fleet

    @property
    def partition(self) -> Partition | None:
        """Which samples each client holds; None before the data was seen."""
        return None if self._work is None else self._work.partition

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
        self.equip()
        round, started = self._next_round(), time.perf_counter()
        plan = self._work.plan(round)
        clients = plan.clients_of(self._rank)
        loader, device = self._work.loader, self._device
        # Cutting a batch out of cached data draws no random number.
        draws = loader.cache is None or self._transfer.has_hooks
        outside = randomness.capture(device) if draws else None
        try:
            work = [self._work.of_client(client, round, self._store.cursor(client)) for client in clients]
            order = self._executor.order(work)
            first_client, most = work[0], len(work[0].batches)
            if order is not None:
                number, batch_idx = next(order)
                first_client, most = work[number], sum(len(item.batches) for item in work)
                # Of cached data, executors that do not go client by client cut the other batches out themselves.
                order = chain([(number, batch_idx)], order if draws else ())
            batches = self._stream(round, work, order)
            if draws:
                randomness.seed_globals(first_client.seed, device)
            first, skipped = _first_batch(batches, first_client, most)
        except BaseException as error:
            if outside is not None:
                randomness.restore(outside, device)
            if isinstance(error, Exception):
                self._fail_together(plan, started)
            raise
        if skipped and order is not None:
            # Not the first client's batch: it is shown to the Trainer, and training begins with a new stream.
            batches = self._stream(round, work, self._executor.order(work))
            self._open = _OpenRound(plan, work, None, batches, 0, started, outside)
        else:
            self._open = _OpenRound(plan, work, first_client, batches, skipped, started, outside)
        return first

    def _stream(self, round: int, work: list[LocalWork], order: Iterable[tuple[int, int]] | None) -> Iterator[Any]:
        """The collated batches of these clients, in the given order or client by client."""
        assert self._work is not None
        loader = self._work.loader
        batches = loader.stream(
            work,
            randomness.derive(self._options.seed, randomness.LOADER, round, self._rank),
            order,
        )
        return self._transfer.ahead(batches) if loader.in_workers else batches

    def first_batch_arrived(self) -> None:
        """The first batch is on the device: what its transfer drew is part of the first client's randomness."""
        if (opened := self._open) is not None and opened.inside is None and opened.outside is not None:
            opened.inside = randomness.capture(self._device)
            randomness.restore(opened.outside, self._device)

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
        exchange = exchange_of(self._trainer.lightning_module)
        server = exchange.view.read()
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
            partial(self._stream, opened.plan.round),
            self.meter is not None,
        )
        self._progress, self._begun = ClientProgress(self._trainer, len(opened.work)), opened.work
        if self._custody is not None:
            self._custody.fetch(opened.plan)
        try:
            total, table = self._train_together(context, opened)
            aggregate = self._global.aggregate(server, total, table)
            norm = float(torch.linalg.vector_norm(aggregate[: exchange.view.trainable]))
            record = table.record(norm, exchange.message_bytes, self._simulated)
            if training:
                self._tell("on_before_server_step", record, exchange.named(aggregate))
            self._global.move(
                exchange, server, aggregate, table.round, training=training, on_step=self._tell_of_server_step
            )
        except BaseException:
            exchange.settle()
            exchange.set_trainable()
            exchange.view.write(server)
            self._executor.close_round()
            self._store.rollback()
            raise
        exchange.set_trainable(table.trainable())
        if training:
            self._commit(opened.plan, table)
            self._executor.settle(Ballot(*table.ballot()))
        self.last_round = record
        if training:
            self._simulated += 0.0 if record.simulated is None else record.simulated.seconds
            self._log.commit(int(record.local_steps.sum()))
        return {} if record.loss != record.loss else {"loss": torch.tensor(record.loss, device=self._device)}

    def end_round(self) -> None:
        """Log the round and tell callbacks, now that the Trainer has counted it and stepped its schedules.

        What is saved or interrupted from here on belongs to the next round.
        """
        if (record := self.last_round) is not None:
            self._report(record)
            self._tell("on_round_end", record)

    def _next_round(self) -> int:
        loop = self._trainer.fit_loop
        # Steps stand still in an epoch that only feeds BatchNorm; its rounds differ all the same.
        return self._trainer.global_step + (loop.epoch_loop.batch_progress.current.ready if loop._skip_backward else 0)

    def _train_together(self, context: RoundContext, opened: _OpenRound) -> tuple[Tensor, RoundTable]:
        """Train this rank's clients and add up the ranks; an exception on one of them is one on all."""
        table = RoundTable(opened.plan, self._world_size, len(context.exchange.parameters))
        total, joint = self._accumulator(context.server, table)
        failure: Exception | None = None
        try:
            self._tell("on_round_start", opened.plan.round, opened.plan.cohort)
            with self._inside_clients(context.exchange, context.server), self._log.collecting():
                total = self._train_clients(context, total, table)
        except Exception as error:
            # The other ranks wait for this one in the collective: there they are told.
            failure = error
        table.finish_rank(self._rank, time.perf_counter() - opened.started, failed=failure is not None)
        table.add_executor(self._executor.slots, self._executor.ballot)
        if self.meter is not None:
            table.add_side(self.meter.side())
        total = self._merge(total, table, joint)
        if failure is not None:
            raise failure
        if failed := table.failed_ranks():
            raise RuntimeError(
                f"round {opened.plan.round}: an exception ended the work of rank {', '.join(map(str, failed))} (see"
                " there), so the global model stays as it was before this round."
            )
        return total, table

    def _train_clients(self, context: RoundContext, total: Tensor, table: RoundTable) -> Tensor:
        aggregator = self._options.aggregator
        cursors = {item.client: item.cursor for item in context.work}
        for update in self._executor.run(context):
            weight = float(aggregator.weigh(update))
            cost = ClientCost() if self.meter is None else self.meter.client(update.forms or {}, update.steps)
            table.add(update, weight, cursors[update.client], self._executor.scaler_state(), cost)
            table.add_trainable(context.exchange.trainable_now())
            if update.finite:
                total = aggregator.accumulate(total, update, weight)
        return total

    def _fail_together(self, plan: RoundPlan, started: float) -> None:
        """This rank could not even begin: take part in the round's communication, so that no rank waits in vain."""
        if self._world_size == 1:
            return
        if self._custody is not None:
            self._custody.fetch(plan)
        exchange = exchange_of(self._trainer.lightning_module)
        table = RoundTable(plan, self._world_size, len(exchange.parameters))
        total, joint = self._accumulator(exchange.view.empty(), table)
        table.finish_rank(self._rank, time.perf_counter() - started, failed=True)
        self._merge(total, table, joint)

    def _accumulator(self, like: Tensor, table: RoundTable) -> tuple[Tensor, collectives.JointBuffer | None]:
        """A zero accumulator; with several ranks it lies in the buffer in which both it and the table cross them."""
        total = self._options.aggregator.init(like)
        if self._world_size == 1:
            return total, None
        joint = collectives.JointBuffer(total, table.size)
        return joint.vector, joint

    def _merge(self, total: Tensor, table: RoundTable, joint: collectives.JointBuffer | None) -> Tensor:
        """The round's one collective: accumulator and table of all ranks are added up."""
        if joint is None:
            return total
        total, numbers = joint.sum_over_ranks(total, table.pack())
        table.unpack(numbers)
        return total

    def _commit(self, plan: RoundPlan, table: RoundTable) -> None:
        if self._options.local_steps is not None:
            for client, cursor in table.cursors().items():
                self._store.stage(client, cursor)
        self._store.commit()
        if self._custody is not None:
            self._custody.commit(plan)
        self._executor.set_scaler_state(*table.smallest_scale())

    # ---- while clients train

    @property
    def in_client(self) -> bool:
        """Whether the module holds a client's model right now."""
        return self._live is not None

    @contextmanager
    def _inside_clients(self, exchange: Exchange, server: Tensor) -> Iterator[None]:
        trainer = self._trainer
        outside = randomness.capture(self._device) if self._executor.draws_from_globals else None
        self._live = exchange, server
        around, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, self.local_accumulation
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last_round = progress.is_last_batch
        try:
            yield
        finally:
            trainer.accumulate_grad_batches = around
            progress.is_last_batch = last_round
            self._live = None
            if outside is not None:
                randomness.restore(outside, self._device)

    def global_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's state dict with the global model's values in place of the client's that is training."""
        if self._live is None:
            return state
        exchange, server = self._live
        return exchange.view.substituted(state, server)

    def client_started(self, client: int) -> None:
        """See `lightning_fedscale.executors.sequential.Watcher`."""
        self._tell("on_client_start", client)

    def client_stepped(self, done: int, loss: Tensor | None) -> None:
        """See `lightning_fedscale.executors.sequential.Watcher`."""
        self._progress.show(done, loss)

    def client_ended(self, update: ClientUpdate) -> None:
        """See `lightning_fedscale.executors.sequential.Watcher`."""
        self._tell("on_client_end", update)

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if (hook := getattr(callback, event, None)) is not None:
                hook(self._trainer, self._trainer.lightning_module, *values)

    def _tell_of_server_step(self, step: Params) -> Params:
        """Let callbacks change the step; what they get is theirs, since a server optimizer may keep its own."""
        if any(hasattr(callback, "on_server_step") for callback in self._trainer.callbacks):  # type: ignore[attr-defined]
            step = {name: value.clone() for name, value in step.items()}
            self._tell("on_server_step", step)
        return step

    def _report(self, record: RoundRecord) -> None:
        """Straight to the loggers, every round, and to where callbacks look for what they monitor."""
        self._log.send()
        trainer, metrics = self._trainer, record.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        values = {name: torch.tensor(value) for name, value in metrics.items()}
        for known in (trainer._logger_connector._callback_metrics, trainer._logger_connector._logged_metrics):
            known.pop("round/loss", None)  # else a round without a loss would show that of an earlier one
            known.update(values)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint needs to go on exactly; on rank 0, None elsewhere. To be called on all ranks."""
        if self._custody is None:
            clients = self._store.state_dict()
        else:
            if self.in_client and self._world_size > 1:
                raise RuntimeError(
                    "save_checkpoint inside a client: with client_optimizer='keep' on several ranks the clients'"
                    " optimizers can only be collected between rounds. Save from a callback's on_train_batch_end."
                )
            clients = self._custody.state_dict()
        if self._rank != 0:
            return None
        return federated_state(
            round=self._trainer.global_step,
            settings=self._settings(),
            seed=self._options.seed,
            num_clients=None if self.partition is None else self.partition.num_clients,
            partition=None if self.partition is None else self.partition.fingerprint,
            server=self._global.state,
            clients=clients,
            local_batches=self._log.local_batches,
            executor=self._executor.kind if self._options.executor == "auto" else None,
            simulated=self._simulated,
        )

    def _settings(self) -> dict[str, Any]:
        """What may be changed on resume, but then the run is another one."""
        options = self._options
        return {
            "clients_per_round": options.clients_per_round,
            "local_epochs": options.local_epochs,
            "local_steps": options.local_steps,
            "rounds_per_epoch": options.rounds_per_epoch,
            "client_optimizer": "keep" if options.keep_optimizers else "reset",
            "population": None if options.population is None else options.population.description(),
            "threads": torch.get_num_threads(),
        }

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint that is saved while a client trains one of the start of the round."""
        if self.in_client:
            self._executor.rewind_checkpoint(checkpoint)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of ranks.

        Raises:
            ValueError: if the saved run is not this one.
        """
        self._resumed = state
        if changed := changed_settings(state["settings"], self._settings()):
            rank_zero_warn(f"ckpt_path: {changed}")
        self._check_resumed()
        self._executor.resume(state.get("executor"))
        self._store.load_state_dict(state["clients"])
        if self._custody is not None:
            self._custody.reset()
        self._global.load_state(state["server"], self._device)
        self._log.local_batches = state.get("local_batches", 0)
        self._simulated = state.get("simulated", 0.0)

    def _check_resumed(self) -> None:
        # A checkpoint from before the data was seen (a learning-rate search writes one) has nothing to compare.
        if self._resumed is not None and self._resumed["partition"] is not None and self.partition is not None:
            check_resume(
                self._resumed,
                seed=self._options.seed,
                num_clients=self.partition.num_clients,
                partition=self.partition.fingerprint,
            )


def _first_batch(batches: Iterator[Any], work: LocalWork, most: int) -> tuple[Any, int]:
    """The first batch, and how many that are None were passed over; such batches are skipped in training.

    Raises:
        ValueError: if there is none among the first ``most``.
    """
    for skipped in range(most):
        if (batch := next(batches)) is not None:
            return batch, skipped
    raise no_batch_left(work)
