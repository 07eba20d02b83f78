"""The counting of `ComputeAccounting`: what each step and round cost, added up over ranks into one ledger."""

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
from lightning_fedscale.devices.profiling.batches import Form, form_of, loaded_samples
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import ClientCost, RoundRecord
from lightning_fedscale.utils import collectives


class Counting:
    """Counts a run: rounds by their records, which are the same on every rank; all else by rank, added up now and then.

    Args:
        ledger: that all ranks share.

    Attributes:
        meter: says what things cost; None outside of ``fit``, ``validate`` and ``test``.
        batch: tokens that an update sees, over all ranks and clients.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.meter: Meter | None = None
        self.batch = 0.0
        self._own = Ledger()  # what this rank has spent since ranks last added up
        # Of that, what the open round tells the other ranks; None if ranks have added it up in another way.
        self._sent: tuple[float, float] | None = None
        self._clients = [0.0] * 5  # what the table of the open round does not say of this rank's clients
        self._step: _OpenStep | None = None
        self._evaluation: MeteredStep | None = None
        self._later: Counter[Form] = Counter()  # probing with batches of which nothing is known yet
        self._record: RoundRecord | None = None  # that was counted last
        self._mark = (0.0, 0.0)  # tokens and updates when there was last an update
        self._energy: EnergyMeter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "meter": None, "_step": None, "_evaluation": None, "_energy": None}

    def begin_fit(self, trainer: pl.Trainer) -> None:
        """Have clients metered, and energy."""
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
        """A batch is about to be trained on."""
        assert self.meter is not None
        if isinstance(trainer.strategy, FederatedStrategy):
            if not self.ledger.updates:
                self.meter.check_tokens(batch)  # before anything is trained; rounds count for themselves
            return
        self.drop_step()
        loaded = partial(loaded_samples, trainer.train_dataloader, batch_idx)
        step = self.meter.step(batch, loaded=loaded, backward=not trainer.fit_loop._skip_backward)
        self._step = _OpenStep(trainer, step.__enter__(), _progress(trainer), time.perf_counter())

    def end_step(self) -> None:
        """Count the open step if it is over; a checkpoint may ask before the Trainer tells."""
        step, meter = self._step, self.meter
        if step is None or meter is None or not step.over:
            return
        self._step = None
        step.metered.__exit__()
        cost, automatic = step.metered.cost, step.trainer.lightning_module.automatic_optimization
        stepped = not automatic or not step.trainer.fit_loop.epoch_loop._should_accumulate()
        first = step.trainer.is_global_zero  # the other ranks make the same update at the same time
        self._own.add(
            forward=cost.forward, backward=cost.backward, samples=cost.samples, tokens=cost.tokens,
            optimizer=cost.optimizer + meter.optimizer_cost() if stepped and first else 0.0,
            size=cost.size, seconds=time.perf_counter() - step.begun if first else 0.0,
            updates=float(stepped and first), error=cost.error, steps=1.0, counted=float(cost.counted),
        )  # fmt: skip

    def drop_step(self) -> None:
        """Whatever is still open has not come to its end: it is over, and says nothing."""
        for step in (None if self._step is None else self._step.metered, self._evaluation):
            if step is not None:
                step.__exit__(RuntimeError)
        self._step = self._evaluation = None

    # ---- rounds

    def client(self) -> Tally:
        """A client is about to train; what it costs is for the round's table."""
        assert self.meter is not None
        return Tally(self.meter, self._note_client)

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """See `Meter.alone`."""
        assert self.meter is not None
        return self.meter.alone(batch, samples)

    def wants(self, form: Form, samples: int) -> bool:
        """See `Meter.wants`."""
        assert self.meter is not None
        return self.meter.wants(form, samples)

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """See `Meter.optimizer_step`."""
        assert self.meter is not None
        return self.meter.optimizer_step(clients)

    def side(self) -> tuple[float, ...]:
        """For the round's table: see `RoundRecord.side`."""
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
        """A round is complete."""
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
            # A multiplication and an addition for every number received, besides what rules do with it.
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
        """Count what is over and was not counted yet: other callbacks may save a checkpoint before this one is told."""
        self.end_step()
        strategy = trainer.strategy
        record = strategy.last_round if isinstance(strategy, FederatedStrategy) else None
        if record is not None and record.round < trainer.global_step:
            self.count_round(trainer, record)

    # ---- on the side

    def begin_evaluation(self, batch: Any, name: str) -> None:
        """A batch of validation or test is about to run."""
        self.end_evaluation()
        if self.meter is not None:
            step = self.meter.step(batch, name=name, charge=self._note_evaluation)
            self._evaluation = step.__enter__()

    def end_evaluation(self) -> None:
        """It has run."""
        step, self._evaluation = self._evaluation, None
        if step is not None:
            step.__exit__()

    def evaluation(self, batch: Any) -> AbstractContextManager[Any]:
        """To be active while another callback evaluates such a batch."""
        if self.meter is None:
            return nullcontext()
        return self.meter.step(batch, name="validation_step", everything=True, charge=self._note_evaluation)

    def _note_evaluation(self, cost: BatchCost) -> None:
        self._own.add(evaluation=cost.flops)

    def count_probe(self, batch: Any, flops: float) -> None:
        """A training step on the side, with this batch or of so many FLOPs."""
        self._own.add(probing=flops)
        if self.meter is not None and batch is not None:
            self._later[form_of(batch).anonymous()] += 1

    def _count_later(self) -> None:
        """Batches that were probed with cost what the run's own do, once one of them has run."""
        for form, number in list(self._later.items()):
            if self.meter is not None and (cost := self.meter.expected(form)) is not None:
                self._own.add(probing=number * cost.flops)
                del self._later[form]

    def measure_energy(self) -> None:
        """Read the counters of energy."""
        if self._energy is not None and (joules := self._energy.read()) is not None:
            self._own.add(energy=joules, meters=1.0)

    # ---- ranks

    def add_up(self) -> None:
        """Move what the ranks have spent into the ledger; to be called on all of them."""
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
        metered: counts it.
        before: how many batches had been started, and processed.
        begun: when.
    """

    trainer: pl.Trainer
    metered: MeteredStep
    before: tuple[int, int]
    begun: float

    @property
    def over(self) -> bool:
        # A module may refuse a batch: then it is processed, and was never started.
        return all(now > before for now, before in zip(_progress(self.trainer), self.before, strict=True))


def _progress(trainer: pl.Trainer) -> tuple[int, int]:
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.started, total.processed


def _summed(numbers: list[float]) -> list[float]:
    """The sums over all ranks."""
    if collectives.world_size() == 1:
        return numbers
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found: list[float] = collectives.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    return found
