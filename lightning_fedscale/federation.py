"""A run of rounds: the data divided among clients, what they keep, the server, and how a round goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_fedscale import collectives, randomness
from lightning_fedscale.arguments import Arguments, name_clients
from lightning_fedscale.checkpointing import changed_settings, check_resume, federated_state
from lightning_fedscale.clients import ClientStore, OptimizerKeeper
from lightning_fedscale.executors import (
    ClientLoader,
    Exchange,
    RoundContext,
    RoundLoader,
    SequentialExecutor,
    client_seed,
    exchange_of,
    no_batch_left,
)
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.progress import ClientProgress
from lightning_fedscale.records import RoundTable
from lightning_fedscale.rounds import LocalWork, RoundPlan, epochs_from, pass_order, plan_round, steps_from
from lightning_fedscale.types import ClientUpdate, IntArray, Params, RoundRecord


@dataclass
class _OpenRound:
    """A round whose first batch is on its way through the Trainer's loop."""

    plan: RoundPlan
    work: list[LocalWork]
    batches: Iterator[Any]
    skipped: int  # batches before the first one that are None
    started: float
    outside: randomness.GlobalState  # the global generators as the user left them
    inside: randomness.GlobalState | None = None  # as the first client finds them once its first batch is there


class _Data(NamedTuple):
    """The training data as the federation sees it."""

    loader: ClientLoader
    partition: Partition
    cohort_size: int
    order_seed: int


class Federation:
    """Everything between ``trainer.fit`` and the last round.

    A round goes so; only the line marked with stars crosses ranks:

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
        self._store = ClientStore()
        self._holder: dict[int, int] = {}  # rank that holds a client's optimizers; absent: every rank, or none yet
        self._executor: SequentialExecutor
        self._data: _Data | None = None
        self._server_state: Any = None
        self._resumed: dict[str, Any] | None = None
        self._open: _OpenRound | None = None
        self._live: tuple[Exchange, Tensor] | None = None  # the global model, while the module holds a client's
        self._progress: ClientProgress
        self.local_accumulation = 1
        self.last_round: RoundRecord | None = None

    # ---- before the first round

    def attach_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Take note of the optimizers just after they were built."""
        self._executor = SequentialExecutor(
            self._trainer,
            seed=self._options.seed,
            store=self._store,
            keepers=[OptimizerKeeper(optimizer) for optimizer in optimizers],
            keep=self._options.keep_optimizers,
            watcher=self,
        )

    def attach_data(self, loader: object, share: float | int) -> RoundLoader:
        """Divide the user's training data among the clients.

        Args:
            loader: the user's train loader.
            share: share or number of each client's batches to use.

        Raises:
            TypeError, ValueError: for data that cannot be divided as asked.
        """
        module = self._trainer.lightning_module
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        clients = ClientLoader(loader, share=share, merge_single=bool(norms))
        partition = self._options.partition(clients.dataset)
        cohort_size = self._options.cohort_size(partition.num_clients)
        if cohort_size < self._world_size:
            raise ValueError(
                f"clients_per_round={cohort_size} is fewer than the {self._world_size} ranks (devices x nodes): every"
                f" rank needs a client. Use devices={cohort_size} or raise clients_per_round."
            )
        if len(short := clients.too_small(partition.sizes)):
            raise ValueError(
                f"train_dataloader: drop_last=True with batch_size={clients.batch_size} leaves {len(short)} of"
                f" {partition.num_clients} clients without a batch ({name_clients(short)}): set drop_last=False, use a"
                " smaller batch_size, or a partitioner with a larger min_partition_size."
            )
        if norms and len(alone := (partition.sizes == 1).nonzero()[0]):
            rank_zero_warn(
                f"{len(alone)} clients hold a single sample ({name_clients(alone)}), and the model has BatchNorm, which"
                " may refuse a batch of one: use a partitioner with min_partition_size=2."
            )
        seed = self._options.seed
        if clients.salt is not None:
            seed = randomness.derive(seed, randomness.ORDER, clients.salt)
        self.close()
        self._data = _Data(clients, partition, cohort_size, order_seed=seed)
        self._check_resumed()
        sizes = partition.sizes
        rank_zero_info(
            f"Federated: {len(sizes):,} clients hold {int(sizes.sum()):,} samples ({sizes.min():,} to {sizes.max():,}"
            f" each); {cohort_size:,} of them train in every round."
        )
        return RoundLoader(clients, self._options.rounds_per_epoch, self.open_round)

    @property
    def partition(self) -> Partition | None:
        """Which samples each client holds; None before the data was seen."""
        return None if self._data is None else self._data.partition

    def _seen(self) -> _Data:
        assert self._data is not None, "rounds need data"
        return self._data

    def close(self) -> None:
        """Stop the loader's worker processes; give up a round whose first batch never arrived."""
        if self._open is not None and self._open.inside is None:
            randomness.restore(self._open.outside, self._device)
            self._open = None
        if self._data is not None:
            self._data.loader.close()

    # ---- a round

    def open_round(self) -> Any:
        """Plan the next round and fetch the first batch of this rank's first client, under that client's randomness."""
        round = self._next_round()
        started = time.perf_counter()
        plan = self._plan(round)
        work = [self._work_of(client, round) for client in plan.clients_of(self._rank)]
        seed, device = self._options.seed, self._device
        outside = randomness.capture(device)
        try:
            batches = self._seen().loader.stream(
                [(client_seed(seed, round, item.client), item.batches) for item in work],
                randomness.derive(seed, randomness.LOADER, round, self._rank),
            )
            randomness.seed_globals(client_seed(seed, round, work[0].client), device)
            first, skipped = _first_batch(batches, work[0])
        except BaseException as error:
            randomness.restore(outside, device)
            if isinstance(error, Exception):
                self._fail_together(plan, started)
            raise
        self._open = _OpenRound(plan, work, batches, skipped, started, outside)
        return first

    def first_batch_arrived(self) -> None:
        """The first batch is on the device: what its transfer drew is part of the first client's randomness."""
        if self._open is not None and self._open.inside is None:
            self._open.inside = randomness.capture(self._device)
            randomness.restore(self._open.outside, self._device)

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
        assert opened.inside is not None
        exchange = exchange_of(self._trainer.lightning_module)
        server = exchange.view.read()
        context = RoundContext(
            opened.plan.round,
            opened.work,
            chain([None] * opened.skipped, [batch], opened.batches),
            opened.inside,
            exchange,
            server,
            training,
        )
        self._progress = ClientProgress(self._trainer, len(opened.work))
        self._fetch_optimizers(opened.plan)
        self._tell("on_round_start", opened.plan.round, opened.plan.cohort)
        try:
            total, table = self._train_together(context, opened)
            aggregate = self._aggregate(total, table, server)
            self._step(exchange, server, aggregate, training=training)
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
        norm = float(torch.linalg.vector_norm(aggregate[: exchange.view.trainable]))
        self.last_round = record = table.record(norm, exchange.message_bytes)
        return {} if record.loss != record.loss else {"loss": torch.tensor(record.loss, device=self._device)}

    def end_round(self) -> None:
        """Log the round and tell callbacks, now that the Trainer has counted it and stepped its schedules.

        What is saved or interrupted from here on belongs to the next round.
        """
        if (record := self.last_round) is not None:
            self._log(record)
            self._tell("on_round_end", record)

    def _next_round(self) -> int:
        loop = self._trainer.fit_loop
        # Steps stand still in an epoch that only feeds BatchNorm; its rounds differ all the same.
        return self._trainer.global_step + (loop.epoch_loop.batch_progress.current.ready if loop._skip_backward else 0)

    def _plan(self, round: int) -> RoundPlan:
        return plan_round(
            round,
            seed=self._options.seed,
            sampler=self._options.sampler,
            num_clients=self._seen().partition.num_clients,
            clients_per_round=self._seen().cohort_size,
            cost=self._cost,
            world_size=self._world_size,
        )

    def _cost(self, clients: IntArray) -> IntArray:
        # By samples; with local_steps every client does the same work. Not `partition.sizes`: that is of all clients.
        offsets = self._seen().partition.offsets
        sizes: IntArray = offsets[clients + 1] - offsets[clients]
        return sizes if self._options.local_steps is None else sizes * 0 + self._options.local_steps

    def _work_of(self, client: int, round: int) -> LocalWork:
        data, options = self._seen(), self._options
        indices = data.partition.client(client)

        def batches_of(number: int) -> list[list[int]]:
            shuffle = data.loader.shuffle
            order = pass_order(indices, shuffle=shuffle, seed=data.order_seed, client=client, number=number)
            return data.loader.batches(order)

        if options.local_steps is not None:
            batches, cursor = steps_from(self._store.cursor(client), options.local_steps, batches_of)
        else:
            assert options.local_epochs is not None
            batches, cursor = epochs_from(round * options.local_epochs, options.local_epochs, batches_of), (0, 0)
        return LocalWork(client, len(indices), batches, cursor)

    def _train_together(self, context: RoundContext, opened: _OpenRound) -> tuple[Tensor, RoundTable]:
        """Train this rank's clients and add up the ranks; an exception on one of them is one on all."""
        total = self._options.aggregator.init(context.server)
        table = RoundTable(opened.plan, self._world_size, len(context.exchange.parameters))
        failure: Exception | None = None
        try:
            with self._inside_clients(context.exchange, context.server):
                total = self._train_clients(context, total, table)
        except Exception as error:
            # The other ranks wait for this one in the collective: there they are told.
            failure = error
        table.finish_rank(self._rank, time.perf_counter() - opened.started, failed=failure is not None)
        self._merge(total, table)
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
            table.add(update, weight, cursors[update.client], self._executor.scaler_state())
            table.add_trainable(context.exchange.trainable_now())
            if update.finite:
                total = aggregator.accumulate(total, update, weight)
        return total

    def _fail_together(self, plan: RoundPlan, started: float) -> None:
        """This rank could not even begin: take part in the round's communication, so that no rank waits in vain."""
        if self._world_size == 1:
            return
        self._fetch_optimizers(plan)
        exchange = exchange_of(self._trainer.lightning_module)
        total = self._options.aggregator.init(exchange.view.read())
        table = RoundTable(plan, self._world_size, len(exchange.parameters))
        table.finish_rank(self._rank, time.perf_counter() - started, failed=True)
        self._merge(total, table)

    def _merge(self, total: Tensor, table: RoundTable) -> None:
        """The round's one collective: accumulator and table of all ranks are added up."""
        if self._world_size == 1:
            return
        merged = collectives.sum_over_ranks(torch.cat([total, table.pack().to(total.device)]))
        total.copy_(merged[: total.numel()])
        table.unpack(merged[total.numel() :])

    def _aggregate(self, total: Tensor, table: RoundTable, server: Tensor) -> Tensor:
        rejected = table.rejected()
        if len(rejected) == table.cohort_size:
            raise RuntimeError(
                f"round {self._trainer.global_step}: the updates of all {len(rejected)} clients have NaN or infinite"
                " values, so the global model stays as it was before this round. Lower the learning rate, clip"
                " gradients (Trainer(gradient_clip_val=1.0)) or look for bad samples."
            )
        if rejected:
            rank_zero_warn(
                f"round {self._trainer.global_step}: left out {len(rejected)} client(s) whose update has NaN or"
                f" infinite values: {', '.join(map(str, rejected[:10]))}{', ...' if len(rejected) > 10 else ''}."
            )
        aggregate = self._options.aggregator.finish(total)
        if aggregate.shape != server.shape:
            raise ValueError(
                f"aggregator: finish returned a tensor of shape {tuple(aggregate.shape)}, not one as long as the"
                f" clients' deltas, {tuple(server.shape)}."
            )
        return aggregate

    def _step(self, exchange: Exchange, server: Tensor, aggregate: Tensor, *, training: bool) -> None:
        """Move the global model; buffers and frozen parameters take the clients' mean."""
        moved = exchange.origin(server) - aggregate
        if training:
            rule, params = self._options.server_optimizer, exchange.named(server)
            if self._server_state is None:
                self._server_state = rule.init(params)
            step, state = _checked(rule.update(exchange.named(aggregate), self._server_state, params), params)
            for name, value in exchange.named(moved).items():
                torch.sub(params[name], step[name], out=value)
        else:
            state = self._server_state
            moved[: exchange.view.trainable] = server[: exchange.view.trainable]
        if not (torch.isfinite(moved) | ~torch.isfinite(server)).all():
            raise RuntimeError(
                f"server_optimizer: its step in round {self._trainer.global_step} has NaN or infinite values, so the"
                " global model stays as it was before this round. Lower the server learning rate."
            )
        exchange.view.write(moved)
        self._server_state = state

    def _commit(self, plan: RoundPlan, table: RoundTable) -> None:
        if self._options.local_steps is not None:
            for client, cursor in table.cursors().items():
                self._store.stage(client, cursor)
        self._store.commit()
        if self._options.keep_optimizers:
            for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
                self._holder[client] = rank
                if rank != self._rank:
                    self._store.put_optimizers(client, None)
        self._executor.set_scaler_state(*table.smallest_scale())

    def _fetch_optimizers(self, plan: RoundPlan) -> None:
        """Bring kept optimizers to the rank that trains their client now; nothing moves when the placement stays."""
        if not self._options.keep_optimizers or self._world_size == 1:
            return
        for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
            holder = self._holder.get(client, rank)
            if holder == rank:
                continue
            if self._rank == holder:
                collectives.send(self._store.optimizers(client), rank, self._device)
            elif self._rank == rank:
                self._store.put_optimizers(client, collectives.receive(holder, self._device))

    # ---- while clients train

    @property
    def in_client(self) -> bool:
        """Whether the module holds a client's model right now."""
        return self._live is not None

    @contextmanager
    def _inside_clients(self, exchange: Exchange, server: Tensor) -> Iterator[None]:
        trainer, outside = self._trainer, randomness.capture(self._device)
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

    def _log(self, record: RoundRecord) -> None:
        """Straight to the loggers, every round, and to where callbacks look for what they monitor."""
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
        clients = self._store.state_dict()
        if self._options.keep_optimizers and self._world_size > 1:
            if self.in_client:
                raise RuntimeError(
                    "save_checkpoint inside a client: with client_optimizer='keep' on several ranks the clients'"
                    " optimizers can only be collected between rounds. Save from a callback's on_train_batch_end."
                )
            mine = {c: s for c, s in clients["optimizers"].items() if self._holder.get(c, 0) == self._rank}
            parts = collectives.gather_on_zero(mine)
            clients["optimizers"] = dict(sorted((c, s) for part in parts for c, s in part.items()))
        if self._rank != 0:
            return None
        return federated_state(
            round=self._trainer.global_step,
            settings=self._settings(),
            seed=self._options.seed,
            num_clients=None if self.partition is None else self.partition.num_clients,
            partition=None if self.partition is None else self.partition.fingerprint,
            server=self._server_state,
            clients=clients,
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
        self._store.load_state_dict(state["clients"])
        self._holder = {}
        self._server_state = tree_map(
            lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, state["server"]
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


def _first_batch(batches: Iterator[Any], work: LocalWork) -> tuple[Any, int]:
    """A client's first batch, and how many that are None were passed over; such batches are skipped in training.

    Raises:
        ValueError: if it has no other.
    """
    for skipped in range(len(work.batches)):
        if (batch := next(batches)) is not None:
            return batch, skipped
    raise no_batch_left(work)


def _checked(answer: Any, params: Params) -> tuple[Params, Any]:
    """What a server optimizer's ``update`` returned, if it is what it should be."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Mapping):
        step, state = answer
        if step.keys() == params.keys() and all(step[name].shape == params[name].shape for name in params):
            return step, state
    raise TypeError(
        "server_optimizer: update must return (step, state), where step has a tensor for every parameter, by the names"
        " and in the shapes of delta."
    )
