"""The counting of `ComputeAccounting`: what each step and round cost, added up over ranks into one ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_fedscale import collectives
from lightning_fedscale.devices.batches import Form, form_of
from lightning_fedscale.energy import EnergyMeter
from lightning_fedscale.metering import Meter
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import ClientCost, RoundRecord


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
        self._step: _OpenStep | None = None
        self._record: RoundRecord | None = None  # that was counted last
        self._mark = (0.0, 0.0)  # tokens and updates when there was last an update
        self._energy: EnergyMeter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "meter": None, "_step": None, "_energy": None}

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

    def begin_step(self, trainer: pl.Trainer, batch: Any) -> None:
        """A batch is about to be trained on; what it will cost is known before."""
        assert self.meter is not None
        form = form_of(batch)
        self.meter.training(form, batch)
        if not isinstance(trainer.strategy, FederatedStrategy):
            self.meter.evaluations.take()
            self._step = _OpenStep(trainer, form, _progress(trainer), time.perf_counter())

    def end_step(self) -> None:
        """Count the open step if it is over; a checkpoint may ask before the Trainer tells."""
        step, meter = self._step, self.meter
        if step is None or meter is None or not step.over:
            return
        self._step = None
        cost, automatic = meter.training(step.form), step.trainer.lightning_module.automatic_optimization
        stepped = not automatic or not step.trainer.fit_loop.epoch_loop._should_accumulate()
        repeats = max(1, meter.evaluations.take()) if meter.evaluations.counting else 1
        first = step.trainer.is_global_zero  # the other ranks make the same update at the same time
        self._own.add(
            forward=cost.forward * repeats, backward=cost.backward * repeats,
            optimizer=cost.optimizer if stepped and first else 0.0, samples=cost.samples, tokens=cost.tokens,
            size=meter.size.active, seconds=time.perf_counter() - step.begun if first else 0.0,
            updates=float(stepped and first),
        )  # fmt: skip

    # ---- rounds

    def client(self, forms: Mapping[Form, int], steps: int) -> ClientCost:
        """The cost of a client's training, for the round's table."""
        assert self.meter is not None
        return self.meter.client(forms, steps)

    def side(self) -> tuple[float, float]:
        """FLOPs that this rank spent on evaluation and on probing since the round before, for the round's table."""
        sent = self._sent = self._own.flops["evaluation"], self._own.flops["probing"]
        return sent

    def count_round(self, trainer: pl.Trainer, record: RoundRecord) -> None:
        """A round is complete."""
        assert self.meter is not None
        if record is self._record:
            return
        self._record = record
        evaluation, probing = record.side_flops if self._sent is not None else (0.0, 0.0)
        sent, self._sent = self._sent or (0.0, 0.0), None
        self.ledger.add(
            forward=float(record.forward_flops.sum()), backward=float(record.backward_flops.sum()),
            optimizer=float(record.optimizer_flops.sum()),
            # A multiplication and an addition for every number received.
            aggregation=2.0 * self.meter.size.total * len(record.clients),
            evaluation=evaluation, probing=probing, samples=float(record.samples.sum()),
            tokens=float(record.tokens.sum()), size=self.meter.size.active, upload_bytes=record.upload_bytes,
            download_bytes=record.download_bytes, seconds=record.seconds, updates=1.0,
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

    def count_evaluation(self, batch: Any, step: str) -> None:
        """A batch of validation or test."""
        if self.meter is not None:
            self._own.add(evaluation=self.meter.evaluation(form_of(batch), batch, step))

    def count_probe(self, batch: Any, flops: float) -> None:
        """A training step on the side, with this batch or of so many FLOPs."""
        if self.meter is not None and batch is not None:
            cost = self.meter.training(form_of(batch), batch)
            flops += cost.flops
        self._own.add(probing=flops)

    def measure_energy(self) -> None:
        """Read the counters of energy."""
        if self._energy is not None and (joules := self._energy.read()) is not None:
            self._own.add(energy=joules, meters=1.0)

    # ---- ranks

    def add_up(self) -> None:
        """Move what the ranks have spent into the ledger; to be called on all of them."""
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
        form: of its batch.
        before: how many batches had been started, and processed.
        begun: when.
    """

    trainer: pl.Trainer
    form: Form
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
