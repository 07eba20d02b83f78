"""The counting of `ComputeAccounting`: the cost of each step and round, summed over ranks into one ledger."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_fedscale.callbacks.compute_accounting.client_costs import RoundMeter
from lightning_fedscale.callbacks.compute_accounting.energy import EnergyMeter
from lightning_fedscale.callbacks.compute_accounting.flop_meter import Meter, MeteredStep
from lightning_fedscale.callbacks.compute_accounting.rank_costs import RankCosts
from lightning_fedscale.core.lightning.trainer_state import is_accumulating, learns_nothing
from lightning_fedscale.devices.profiling.batches import loaded_samples
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils.stopwatch import Stopwatch


class Counting:
    """Counts the costs of a run: rounds by their records, all else per rank; the latter is summed over ranks at times.

    Attributes:
        ledger: ledger that is the same on all ranks.
        costs: further costs of this rank, which the ledger lacks.
        meter: counts and estimates costs; None outside of ``fit``, ``validate`` and ``test``.
        batch: tokens per update, over all ranks and clients.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.costs = RankCosts()
        self.meter: Meter | None = None
        self.batch = 0.0
        self._step: _OpenStep | None = None
        self._record: RoundRecord | None = None  # counted last
        self._mark = (0.0, 0.0)  # tokens and updates at the last update
        self._energy: EnergyMeter | None = None
        self._watch: Stopwatch[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "meter": None, "_step": None, "_energy": None, "_watch": None}

    def begin_fit(self, trainer: pl.Trainer) -> None:
        """Start metering clients and energy."""
        assert self.meter is not None
        if isinstance(trainer.strategy, FederatedStrategy):
            trainer.strategy.meter_clients(RoundMeter(self.meter, self.costs))
        device, uuid = trainer.strategy.root_device, None
        self._watch = Stopwatch(device)
        if device.type == "cuda":
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._energy = EnergyMeter(uuid, processor=trainer.local_rank == 0)
        self._mark = self.ledger.tokens, self.ledger.updates

    # ---- steps

    def begin_step(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Open a step before a batch is trained on."""
        assert self.meter is not None
        if isinstance(trainer.strategy, FederatedStrategy):
            if not self.ledger.updates:
                self.meter.check_tokens(batch)  # before training; rounds are counted by their records
            return
        self.drop_step()
        loaded = partial(loaded_samples, trainer.train_dataloader, batch_idx)
        step = self.meter.step(batch, loaded=loaded, backward=not learns_nothing(trainer))
        begun = None if self._watch is None else self._watch.start()
        self._step = _OpenStep(trainer, step.__enter__(), _progress(trainer), begun)

    def end_step(self) -> None:
        """Count the open step if it has ended; a checkpoint may call this before the Trainer's hook does."""
        step, meter = self._step, self.meter
        if step is None or meter is None or not step.over:
            return
        self._step = None
        step.metered.__exit__()
        cost, automatic = step.metered.cost, step.trainer.lightning_module.automatic_optimization
        stepped = not automatic or not is_accumulating(step.trainer)
        first = step.trainer.is_global_zero  # the other ranks make the same update at the same time
        self.costs.ledger.add(
            forward=cost.forward, backward=cost.backward, samples=cost.samples, tokens=cost.tokens,
            optimizer=cost.optimizer + meter.optimizer_cost() if stepped and first else 0.0,
            size=cost.size, updates=float(stepped and first), error=cost.error, steps=1.0, counted=float(cost.counted),
        )  # fmt: skip
        if self._watch is not None and first:
            self._watch.stop(step.begun, None)
            self._add_seconds(wait=False)

    def _add_seconds(self, *, wait: bool) -> None:
        """Add the time of the steps that the device has finished."""
        for _, seconds in () if self._watch is None else self._watch.read(wait=wait):
            self.costs.ledger.add(seconds=seconds)

    def drop_step(self) -> None:
        """Discard the open step, which did not complete."""
        if self._step is not None:
            self._step.metered.__exit__(RuntimeError)
        self._step = None

    # ---- rounds

    def count_round(self, trainer: pl.Trainer, record: RoundRecord) -> None:
        """Count a completed round, once."""
        assert self.meter is not None
        if record is self._record:
            return
        self._record = record
        size = self.meter.parameters.size
        evaluation, probing, error, counted, steps, size_tokens, tokens = record.side
        if not self.costs.subtract_sent():
            evaluation = probing = 0.0
        self.ledger.add(
            forward=float(record.forward_flops.sum()), backward=float(record.backward_flops.sum()),
            optimizer=float(record.optimizer_flops.sum()),
            # A multiplication and an addition for every number received, plus the operations of rules on it.
            aggregation=2.0 * size.total * len(record.clients) + record.operations,
            evaluation=evaluation, probing=probing, samples=float(record.samples.sum()),
            tokens=float(record.tokens.sum()), size=size_tokens / tokens if tokens else size.active,
            upload_bytes=record.upload_bytes, download_bytes=record.download_bytes, seconds=record.seconds,
            cohort=int((record.local_steps > 0).sum()), updates=1.0, error=error, steps=steps, counted=counted,
        )  # fmt: skip
        self.ledger.add_clients(zip(record.clients.tolist(), record.flops.tolist(), strict=True))
        if (trained := record.local_steps > 0).any():
            per_step = record.tokens[trained] / record.local_steps[trained]
            self.batch = float(per_step.sum()) * trainer.accumulate_grad_batches

    def count_ended(self, trainer: pl.Trainer) -> None:
        """Count steps and rounds that have ended: a callback may save a checkpoint before this one's hook runs."""
        self.end_step()
        self._add_seconds(wait=True)
        strategy = trainer.strategy
        record = strategy.last_round if isinstance(strategy, FederatedStrategy) else None
        if record is not None and record.round < trainer.global_step:
            self.count_round(trainer, record)

    # ---- ranks

    def measure_energy(self) -> None:
        """Read the energy counters."""
        if self._energy is not None and (joules := self._energy.read()) is not None:
            self.costs.ledger.add(energy=joules, meters=1.0)

    def add_up(self) -> None:
        """Sum the costs of the ranks into the ledger; call it on all of them."""
        self._add_seconds(wait=True)
        self.costs.move_into(self.ledger, self.meter)
        tokens, updates = self.ledger.tokens, self.ledger.updates
        if self._record is None and updates > self._mark[1]:
            self.batch = (tokens - self._mark[0]) / (updates - self._mark[1])
            self._mark = tokens, updates


class _OpenStep(NamedTuple):
    """A step that has begun.

    Attributes:
        trainer: the Trainer.
        metered: counts the step.
        before: numbers of batches started and processed before it.
        begun: its start on the device.
    """

    trainer: pl.Trainer
    metered: MeteredStep
    before: tuple[int, int]
    begun: Any

    @property
    def over(self) -> bool:
        # If a module skips a batch, it is processed without having been started.
        return all(now > before for now, before in zip(_progress(self.trainer), self.before, strict=True))


def _progress(trainer: pl.Trainer) -> tuple[int, int]:
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.started, total.processed
