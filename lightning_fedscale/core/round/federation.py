"""The entry points of the strategy in a fit, from the optimizers and the data to the end of each round."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_fedscale.core.client_state import OptimizerKeeper
from lightning_fedscale.core.executors import (
    ExecutorChoice,
    FrozenWritten,
    RoundLoader,
    SequentialExecutor,
    VectorizedExecutor,
)
from lightning_fedscale.core.lightning.data_loaders import is_asked_by_trainer, warn_of_few_workers
from lightning_fedscale.core.lightning.run_state import next_round
from lightning_fedscale.core.lightning.train_data import division_by_ranks
from lightning_fedscale.core.options import compatibility
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.options.trainer_checks import check_trainable
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.core.round.checkpoint import FederationCheckpoint
from lightning_fedscale.core.round.client_batches import ClientBatches
from lightning_fedscale.core.round.client_data import ClientData
from lightning_fedscale.core.round.fit import Fit
from lightning_fedscale.core.round.hardware import simulated_fleet
from lightning_fedscale.core.round.opening import OpenRound
from lightning_fedscale.core.round.run import RoundRunner
from lightning_fedscale.devices.fleet import Fleet
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.privacy import PrivacyBudget
from lightning_fedscale.types import RoundRecord

_MOST_ATTEMPTS = 3  # of a round before all frozen parameters are exchanged
_SAMPLED = 16  # rounds; training begins only if one of them is large enough for the aggregator


class Federation:
    """Everything between ``trainer.fit`` and the last round.

    The strategy calls `attach_optimizers` and `attach_data`, then `equip`, and for each round `open_round`,
    `first_batch_arrived`, `run_round` and `end_round`; at last `end`. `lightning_fedscale.core.round` has a drawing.

    Args:
        trainer: the Trainer, its strategy's optimizers not yet built.
        options: the strategy's checked arguments.
        rank: this process.
        world_size: number of processes.

    Attributes:
        fit: the parts that rounds and checkpoints are made of.
        checkpoint: reads and writes their state.
        last_round: the record of the last finished round; None before the first.
    """

    def __init__(self, trainer: pl.Trainer, options: Options, rank: int, world_size: int) -> None:
        self.fit = Fit(trainer, options, rank, world_size)
        self.checkpoint = FederationCheckpoint(self.fit)
        self._open: OpenRound | None = None
        self._begun: list[LocalWork] = []  # what this rank does in the round that runs
        self._equipped = False
        self.last_round: RoundRecord | None = None

    # ---- before the first round

    def attach_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Make the executors for the optimizers that were just built."""
        fit, options = self.fit, self.fit.options
        parts: dict[str, Any] = {
            "store": fit.clients.store,
            "keepers": [OptimizerKeeper(optimizer) for optimizer in optimizers],
            "keep": options.keep_optimizers,
            "watcher": fit.notifier,
            "log": fit.log,
            "transfer": fit.transfer,
        }
        corrects = options.algorithm.local_rule is not None or options.algorithm.ditto is not None
        sequential = SequentialExecutor(fit.trainer, **parts, corrects=corrects)
        vectorized = VectorizedExecutor(
            fit.trainer,
            sequential,
            **parts,
            clients_per_wave=options.clients_per_wave,
            verify=options.verify_executor,
        )
        fit.executor = ExecutorChoice(options.executor, sequential, vectorized)

    def attach_data(self, loader: object, share: float | int) -> RoundLoader:
        """Divide the user's training data among the clients.

        Args:
            loader: the user's train loader.
            share: share or number of each client's batches to use.

        Raises:
            TypeError, ValueError: if the data cannot be divided as requested.
        """
        fit, trainer, is_first = self.fit, self.fit.trainer, self.fit.data is None  # loaders may be reloaded
        data = ClientData(
            trainer.lightning_module,
            loader,
            fit.options,
            fit.world_size,
            share,
            device=fit.device,
            show_progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )
        if is_first and data.loader.cache is None:
            warn_of_few_workers(trainer, loader)
        if is_first and (divided := division_by_ranks(trainer, data.loader.batch_size)):
            rank_zero_warn(divided)
        self.close()
        fit.data = data
        fit.batches = ClientBatches(trainer, data.loader, fit.transfer, seed=fit.options.seed, rank=fit.rank)
        self._calibrate(data)
        self.checkpoint.check_resumed()
        is_trainers = partial(is_asked_by_trainer, trainer)
        return RoundLoader(loader, fit.options.rounds_per_epoch, self.open_round, is_trainers)

    def _calibrate(self, data: ClientData) -> None:
        """Make privacy ready for these clients."""
        fit = self.fit
        if (privacy := fit.options.algorithm.privacy) is None:
            return
        clients, cohort = data.partition.num_clients, data.cohort_size
        budget = PrivacyBudget(privacy.calibrated(cohort / clients, cohort), cohort / clients)
        fit.totals.budget, fit.options = budget, replace(fit.options, privacy=budget.privacy)
        fit.server.calibrate(fit.options.algorithm, budget.expected_weight(data.partition.sizes))

    def equip(self) -> None:
        """Check the model, and simulate the clients' hardware if there is any, before the first round.

        Raises:
            ValueError: if a device class does not hold the model.
        """
        fit, data, trainer = self.fit, self.fit.data, self.fit.trainer
        if not any(parameter.requires_grad for parameter in trainer.lightning_module.parameters()):
            return  # a callback may unfreeze layers when the first epoch begins
        if data is not None and not self._equipped:
            self._equipped = True
            self._check_first_rounds(data)
        if data is not None and data.fleet is None and (population := fit.options.population) is not None:
            data.fleet = simulated_fleet(
                population, trainer, fit.options, data, fit.tensors.shared(), accumulation=fit.scope.accumulation
            )

    def _check_first_rounds(self, data: ClientData) -> None:
        """Raise now for what would otherwise fail in a round, however late."""
        fit, first, planned = self.fit, self.fit.trainer.global_step, self._planned_rounds()
        if fit.totals.budget is not None:
            fit.totals.budget.check(first)
        compatibility.check_model(fit.options, fit.trainer.lightning_module, fit.tensors.shared())
        data.check_cohorts(range(first, first + min(planned or _SAMPLED, _SAMPLED)))
        compatibility.warn_of_lost_errors(fit.options, data.partition.num_clients, data.cohort_size, planned)

    def _planned_rounds(self) -> int:
        """Return the largest number of rounds in the fit; 0 if it has no end."""
        # Not `estimated_stepping_batches`, which sets up loaders and draws random numbers for it.
        trainer = self.fit.trainer
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        limits = [trainer.max_steps, epochs * self.fit.options.rounds_per_epoch]
        return min((limit for limit in limits if limit > 0), default=0)

    def first_batches(self) -> Iterator[tuple[int, Any]]:
        """Return the first batch of each of this rank's clients in the running round, see `ClientBatches.first_of`."""
        return self.fit.batches.first_of(self._begun) if self._begun else iter(())

    @property
    def fleet(self) -> Fleet | None:
        """The clients' simulated hardware, None without a population or before the first round."""
        return None if self.fit.data is None else self.fit.data.fleet

    @property
    def partition(self) -> Partition | None:
        """Which samples each client holds; None before the data was seen."""
        return None if self.fit.data is None else self.fit.data.partition

    def divide_alike(self, dataset: Any, seed: int) -> Partition:
        """Divide further data as the training data are divided; see `Options.divide_alike`."""
        assert self.fit.data is not None
        return self.fit.options.divide_alike(self.fit.data.loader.dataset, dataset, seed)

    def personal_model(self, client: int) -> dict[str, Any] | None:
        """Return the module's state dict with the client's own values in it; None if another rank has them."""
        fit = self.fit
        return fit.clients.personal_model(client, fit.trainer.lightning_module.state_dict(), fit.tensors.shared())

    def end(self) -> None:
        """End the run: stop the workers and close monitors and executor."""
        self.close()
        self.fit.notifier.monitors.close()
        if hasattr(self.fit, "executor"):  # not if training was refused before its optimizers were built
            self.fit.executor.close()
        if self.fit.data is not None:
            self.fit.data.loader.cache = None  # batches are the same without it

    def close(self) -> None:
        """Stop the loader's worker processes; give up a round whose first batch never arrived."""
        if self._open is not None and self._open.inside is None:
            self._open.give_up(self.fit.device)
            self._open = None
        if self.fit.data is not None:
            self.fit.data.loader.close()

    # ---- a round

    def open_round(self) -> Any:
        """Plan the next round and fetch the first batch of this rank's first client, under that client's randomness."""
        fit = self.fit
        assert fit.data is not None
        check_trainable(fit.trainer.lightning_module)
        self.equip()
        round, started = next_round(fit.trainer), time.perf_counter()
        plan = fit.data.plan(round, fit.totals.losses)
        self._open, batch = OpenRound.begin(fit, plan, started)
        return batch

    def first_batch_arrived(self, batch: Any) -> Any:
        """Take a batch that the Trainer has moved to the device, the first of a round if one is open."""
        return batch if self._open is None else self._open.arrived(batch, self.fit.device)

    def run_round(self, batch: Any, *, training: bool) -> dict[str, Any]:
        """Train the cohort, merge the ranks, and move the global model.

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
        self._begun = opened.work
        for attempt in itertools.count(1):
            runner = RoundRunner(self.fit, opened, batch, training=training)
            try:
                self.last_round = record = runner.run()
                break
            except FrozenWritten as error:  # on all ranks
                self._exchange(None if attempt == _MOST_ATTEMPTS else error.names, opened.plan.round)
                opened = opened.again(self.fit)
        return {} if math.isnan(record.loss) else {"loss": torch.tensor(record.loss, device=self.fit.device)}

    def _exchange(self, frozen: list[str] | None, round: int) -> None:
        """Exchange frozen parameters from now on, while the module holds the global model of a round's start.

        Args:
            frozen: their names; None for all.
            round: the round.
        """
        fit = self.fit
        fit.tensors.add_written(frozen, round)
        view = fit.tensors.shared().view
        fit.stale.complete(view)
        fit.clients.complete(view)

    def end_round(self) -> None:
        """Log the round and tell callbacks, now that the Trainer has counted it and stepped its schedules.

        What is saved or interrupted from here on belongs to the next round.
        """
        if (record := self.last_round) is not None:
            self.fit.notifier.round_ended(record)
