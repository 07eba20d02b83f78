"""The counting of `ComputeAccounting`: the cost of each step and round, summed over ranks into one ledger."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_fedscale.callbacks.compute_accounting.energy import EnergyMeter
from lightning_fedscale.callbacks.compute_accounting.flop_meter import BatchCost, Meter, MeteredStep, Tally
from lightning_fedscale.core.lightning.trainer_state import is_accumulating, learns_nothing
from lightning_fedscale.devices.profiling.batches import BatchSignature, loaded_samples, signature_of
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import ClientCost, RoundRecord
from lightning_fedscale.utils import collectives


class Counting:
    """Counts the costs of a run: rounds by their records, all else per rank; the latter is summed over ranks at times.

    Args:
        ledger: ledger that is the same on all ranks.

    Attributes:
        meter: counts and estimates costs; None outside of ``fit``, ``validate`` and ``test``.
        batch: tokens per update, over all ranks and clients.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.meter: Meter | None = None
        self.batch = 0.0
        self._own = Ledger()  # spent by this rank since ranks last summed their costs
        # The part of it that the open round sends to the other ranks; None if ranks have summed it in another way.
        self._sent: tuple[float, float] | None = None
        self._clients = [0.0] * 5  # values of this rank's clients that the open round's table lacks
        self._step: _OpenStep | None = None
        self._evaluation: MeteredStep | None = None
        self._later: Counter[BatchSignature] = Counter()  # probing steps with batches whose cost is not known yet
        self._record: RoundRecord | None = None  # counted last
        self._mark = (0.0, 0.0)  # tokens and updates at the last update
        self._energy: EnergyMeter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "meter": None, "_step": None, "_evaluation": None, "_energy": None}

    def begin_fit(self, trainer: pl.Trainer) -> None:
        """Start metering clients and energy."""
        assert self.meter is not None
        if isinstance(trainer.strategy, FederatedStrategy):
            trainer.strategy.meter_clients(self)
        device, uuid = trainer.strategy.root_device, None
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
        self._step = _OpenStep(trainer, step.__enter__(), _progress(trainer), time.perf_counter())

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
        self._own.add(
            forward=cost.forward, backward=cost.backward, samples=cost.samples, tokens=cost.tokens,
            optimizer=cost.optimizer + meter.optimizer_cost() if stepped and first else 0.0,
            size=cost.size, seconds=time.perf_counter() - step.begun if first else 0.0,
            updates=float(stepped and first), error=cost.error, steps=1.0, counted=float(cost.counted),
        )  # fmt: skip

    def drop_step(self) -> None:
        """Discard the open step and evaluation, which did not complete."""
        for step in (None if self._step is None else self._step.metered, self._evaluation):
            if step is not None:
                step.__exit__(RuntimeError)
        self._step = self._evaluation = None

    # ---- rounds

    def client(self) -> Tally:
        """Return the tally of a client that is about to train; its cost goes into the round's table."""
        assert self.meter is not None
        return Tally(self.meter, self._note_client)

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """See `Meter.alone`."""
        assert self.meter is not None
        return self.meter.alone(batch, samples)

    def wants(self, form: BatchSignature, samples: int) -> bool:
        """See `Meter.wants`."""
        assert self.meter is not None
        return self.meter.wants(form, samples)

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """See `Meter.optimizer_step`."""
        assert self.meter is not None
        return self.meter.optimizer_step(clients)

    def side(self) -> tuple[float, ...]:
        """Return this rank's part of `RoundRecord.side`, for the round's table."""
        self._count_later()
        sent = self._sent = self._own.flops["evaluation"], self._own.flops["probing"]
        clients, self._clients = self._clients, [0.0] * 5
        return (*sent, *clients)

    def _note_client(self, tally: Tally, cost: ClientCost) -> None:
        assert self.meter is not None
        counted = tally.counted + self.meter.take_alone()
        mine = tally.error, counted, tally.steps, tally.size_tokens, cost.tokens
        self._clients = [before + more for before, more in zip(self._clients, mine, strict=True)]

    def count_round(self, trainer: pl.Trainer, record: RoundRecord) -> None:
        """Count a completed round, once."""
        assert self.meter is not None
        if record is self._record:
            return
        self._record = record
        evaluation, probing, error, counted, steps, size_tokens, tokens = record.side
        if self._sent is None:
            evaluation = probing = 0.0
        sent, self._sent = self._sent or (0.0, 0.0), None
        self.ledger.add(
            forward=float(record.forward_flops.sum()), backward=float(record.backward_flops.sum()),
            optimizer=float(record.optimizer_flops.sum()),
            # A multiplication and an addition for every number received, plus the operations of rules on it.
            aggregation=2.0 * self.meter.size.total * len(record.clients) + record.operations,
            evaluation=evaluation, probing=probing, samples=float(record.samples.sum()),
            tokens=float(record.tokens.sum()), size=size_tokens / tokens if tokens else self.meter.size.active,
            upload_bytes=record.upload_bytes, download_bytes=record.download_bytes, seconds=record.seconds,
            cohort=int((record.local_steps > 0).sum()), updates=1.0, error=error, steps=steps, counted=counted,
        )  # fmt: skip
        self.ledger.add_clients(zip(record.clients.tolist(), record.flops.tolist(), strict=True))
        self._own.add(evaluation=-sent[0], probing=-sent[1])
        if (trained := record.local_steps > 0).any():
            per_step = record.tokens[trained] / record.local_steps[trained]
            self.batch = float(per_step.sum()) * trainer.accumulate_grad_batches

    def settle(self, trainer: pl.Trainer) -> None:
        """Count steps and rounds that have ended: a callback may save a checkpoint before this one's hook runs."""
        self.end_step()
        strategy = trainer.strategy
        record = strategy.last_round if isinstance(strategy, FederatedStrategy) else None
        if record is not None and record.round < trainer.global_step:
            self.count_round(trainer, record)

    # ---- evaluation, probing, energy

    def begin_evaluation(self, batch: Any, name: str) -> None:
        """Open the count of a validation or test batch."""
        self.end_evaluation()
        if self.meter is not None:
            step = self.meter.step(batch, name=name, charge=self._note_evaluation)
            self._evaluation = step.__enter__()

    def end_evaluation(self) -> None:
        """Close the count of that batch."""
        step, self._evaluation = self._evaluation, None
        if step is not None:
            step.__exit__()

    def evaluation(self, batch: Any) -> AbstractContextManager[Any]:
        """Return a context manager to be active while another callback evaluates such a batch."""
        if self.meter is None:
            return nullcontext()
        return self.meter.step(batch, name="validation_step", everything=True, charge=self._note_evaluation)

    def _note_evaluation(self, cost: BatchCost) -> None:
        self._own.add(evaluation=cost.flops)

    def count_probe(self, batch: Any, flops: float) -> None:
        """Count an extra training step, with this batch or of so many FLOPs."""
        self._own.add(probing=flops)
        if self.meter is not None and batch is not None:
            self._later[signature_of(batch).anonymous()] += 1

    def _count_later(self) -> None:
        """Count probing steps by the cost of the run's own batches, once a similar one has run."""
        for form, number in list(self._later.items()):
            if self.meter is not None and (cost := self.meter.expected(form)) is not None:
                self._own.add(probing=number * cost.flops)
                del self._later[form]

    def measure_energy(self) -> None:
        """Read the energy counters."""
        if self._energy is not None and (joules := self._energy.read()) is not None:
            self._own.add(energy=joules, meters=1.0)

    # ---- ranks

    def add_up(self) -> None:
        """Sum the costs of the ranks into the ledger; call it on all of them."""
        self._count_later()
        self.ledger.add_numbers(_summed(self._own.numbers()))
        self._own, self._sent = Ledger(), None
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
        begun: time of its start.
    """

    trainer: pl.Trainer
    metered: MeteredStep
    before: tuple[int, int]
    begun: float

    @property
    def over(self) -> bool:
        # If a module skips a batch, it is processed without having been started.
        return all(now > before for now, before in zip(_progress(self.trainer), self.before, strict=True))


def _progress(trainer: pl.Trainer) -> tuple[int, int]:
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.started, total.processed


def _summed(numbers: list[float]) -> list[float]:
    """Return the sums over all ranks."""
    if collectives.world_size() == 1:
        return numbers
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found: list[float] = collectives.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    return found
