"""The beginning of a round: its first batch goes through the Trainer's loop, as in a plain training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from lightning_fedscale.core.plan import LocalWork, RoundPlan
from lightning_fedscale.core.round.accumulator import RoundAccumulator
from lightning_fedscale.core.round.fit import Fit
from lightning_fedscale.utils import randomness


@dataclass
class OpenRound:
    """A planned round whose first batch is on its way to the device.

    Attributes:
        plan: who trains where.
        work: what this rank's clients do.
        first: the client whose first batch this is; None if it is only shown to the Trainer.
        batches: those after the first one, or all where it is only shown.
        skipped: batches before the first one that are None.
        started: when the round began, by ``time.perf_counter``.
        outside: the global generators as the user left them; None if no batch draws from them.
        inside: the same as the first client finds them, once its first batch has arrived.
        is_again: whether the round has started before.
    """

    plan: RoundPlan
    work: list[LocalWork]
    first: LocalWork | None
    batches: Iterator[Any]
    skipped: int
    started: float
    outside: randomness.GlobalState | None
    inside: randomness.GlobalState | None = None
    is_again: bool = False

    @classmethod
    def begin(cls, fit: Fit, plan: RoundPlan, started: float) -> tuple[OpenRound, Any]:
        """Stream the batches of this rank's clients, and fetch the first one under its client's randomness.

        Returns:
            The round and its first batch, on the CPU; None if this rank's clients have nothing else.
        """
        assert fit.data is not None
        data, batches, draws = fit.data, fit.batches, fit.batches.draw_random_numbers
        outside = randomness.capture(fit.device) if draws else None
        try:
            work = [data.of_client(each, plan, fit.clients.store.cursor(each)) for each in plan.clients_of(fit.rank)]
            # A rank without a client shows the Trainer a batch too, of a client that does not train.
            shown = work or [data.of_client(0, plan, (0, 0))]
            order = fit.executor.order(shown)
            first_client, its_batches = shown[0], len(shown[0].batches)
            if order is not None:
                number, batch_idx = next(order)
                first_client, its_batches = shown[number], 1
                # Of cached data, executors that do not go client by client cut the other batches out themselves.
                order = chain([(number, batch_idx)], order if draws else ())
            stream = batches.stream(plan.round, shown, order)
            if draws:
                randomness.seed_globals(first_client.seed, fit.device)
            first, skipped = _first_batch(stream, sum(len(item.batches) for item in shown))
        except BaseException as error:
            if outside is not None:
                randomness.restore(outside, fit.device)
            if isinstance(error, Exception):
                _fail_together(fit, plan, started)
            raise
        if not work or skipped >= its_batches:
            # Not the first client's batch: it is shown to the Trainer, and training begins with a new stream.
            stream = batches.stream(plan.round, work, fit.executor.order(work))
            return cls(plan, work, None, stream, 0, started, outside), first
        return cls(plan, work, first_client, stream, skipped, started, outside), first

    def arrived(self, batch: Any, device: torch.device) -> Any:
        """Take the first batch, on the device; its transfer drew from the first client's randomness.

        Returns:
            The batch. If it is None, since this rank's clients have no other, a tensor of one zero: the Trainer would
            skip a step whose batch is None, and the other ranks would wait for this one.
        """
        if self.inside is None and self.outside is not None:
            self.inside = randomness.capture(device)
            randomness.restore(self.outside, device)
        return torch.zeros(1, device=device) if batch is None else batch

    def all_batches(self, batch: Any) -> Iterator[Any]:
        """Return the batches of this rank's clients in order, given the first one on the device."""
        return self.batches if self.first is None else chain([None] * self.skipped, [batch], self.batches)

    def again(self, fit: Fit) -> OpenRound:
        """Return the same round with all batches still to come."""
        batches = fit.batches.stream(self.plan.round, self.work, fit.executor.order(self.work))
        return replace(self, first=None, batches=batches, skipped=0, is_again=True)

    def give_up(self, device: torch.device) -> None:
        """Restore the global generators, since the first batch never arrived."""
        if self.outside is not None:
            randomness.restore(self.outside, device)


def _first_batch(batches: Iterator[Any], most: int) -> tuple[Any, int]:
    """Return the first batch that is not None, else None, and how many were skipped, as training skips them."""
    for skipped in range(most):
        if (batch := next(batches)) is not None:
            return batch, skipped
    return None, most


def _fail_together(fit: Fit, plan: RoundPlan, started: float) -> None:
    """Take part in the round's communication though this rank could not begin, so that no rank waits forever."""
    if fit.world_size == 1:
        return
    fit.clients.fetch(plan)
    shared = fit.tensors.shared()
    table, cohort = fit.table(plan, shared), fit.cohort(plan, shared)
    accumulator = RoundAccumulator(fit.options.algorithm, shared.view.zeros(), cohort, table, fit.world_size)
    table.finish_rank(fit.rank, time.perf_counter() - started, failed=True)
    accumulator.merge()
