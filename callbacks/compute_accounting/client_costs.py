"""The cost of clients' training, as executors report it and as the table of a round shares it between ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_fedscale.callbacks.compute_accounting.flop_meter import BatchCost, Meter
from lightning_fedscale.callbacks.compute_accounting.rank_costs import RankCosts
from lightning_fedscale.devices.profiling.batches import BatchSignature
from lightning_fedscale.types import ClientCost


class ClientTally:
    """Adds up the cost of a client's training, batch by batch.

    Args:
        meter: counts the batches.
        report: called with the total, once it is requested.

    Attributes:
        size_tokens: sum of active parameters times tokens.
        error: sum of the standard errors of training FLOPs.
        steps: number of batches.
        counted: number of batches that were counted.
    """

    def __init__(self, meter: Meter, report: Callable[[ClientTally, ClientCost], None]) -> None:
        self._meter = meter
        self._report = report
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._lacking: list[tuple[BatchSignature, int]] = []
        self.size_tokens = self.error = 0.0
        self.steps = self.counted = 0

    def batch(self, batch: Any, samples: int, *, training: bool = True) -> AbstractContextManager[Any]:
        """Return a context manager to be active while a batch of the client runs."""
        return self._meter.step(batch, samples, backward=training, charge=self._add)

    def again(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Return a context manager for the gradient of a batch that a copy of the module computes besides training."""
        return self._meter.step(batch, samples, name="gradient", everything=True, charge=self._add)

    def add(self, signature: BatchSignature, samples: int) -> None:
        """Add a batch of this signature that ran vectorized, together with those of other clients."""
        if (cost := self._meter.vectorized(signature, samples)) is None:
            self._lacking.append((signature, samples))
        else:
            self._add(cost)

    def total(self, optimizer_steps: int) -> ClientCost:
        """Return the total cost.

        Args:
            optimizer_steps: number of steps of the client's optimizer; ignored in manual optimization.
        """
        lacking, self._lacking = self._lacking, []
        for signature, samples in lacking:
            self._add(self._meter.expected(signature, samples) or BatchCost(samples=samples, tokens=samples))
        forward, backward, optimizer, tokens = self._sums
        cost = ClientCost(forward, backward, optimizer + optimizer_steps * self._meter.optimizer_cost(), tokens)
        self._report(self, cost)
        return cost

    def _add(self, cost: BatchCost) -> None:
        sums = self._sums
        sums[0] += cost.forward
        sums[1] += cost.backward
        sums[2] += cost.optimizer
        sums[3] += cost.tokens
        self.size_tokens += cost.size * cost.tokens
        self.error += cost.error
        self.steps += 1
        self.counted += cost.counted


class RoundMeter:
    """Meters the clients of this rank, as `lightning_fedscale.core.executors.meter.Meter` asks for.

    Args:
        meter: counts the batches.
        costs: further costs of this rank, which are shared in the same table.
    """

    def __init__(self, meter: Meter, costs: RankCosts) -> None:
        self._meter = meter
        self._costs = costs
        self._clients = [0.0] * 5  # values of this rank's clients that the open round's table lacks

    def client(self) -> ClientTally:
        """Return the tally of a client that is about to train; its cost goes into the round's table."""
        return ClientTally(self._meter, self._add_client)

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """See `Meter.alone`."""
        return self._meter.alone(batch, samples)

    def wants(self, signature: BatchSignature, samples: int) -> bool:
        """See `Meter.wants`."""
        return self._meter.wants(signature, samples)

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """See `Meter.optimizer_step`."""
        return self._meter.optimizer_step(clients)

    def side(self) -> tuple[float, ...]:
        """Return this rank's part of `RoundRecord.side`, for the round's table."""
        clients, self._clients = self._clients, [0.0] * 5
        return (*self._costs.send(self._meter), *clients)

    def _add_client(self, tally: ClientTally, cost: ClientCost) -> None:
        counted = tally.counted + self._meter.take_alone()
        mine = tally.error, counted, tally.steps, tally.size_tokens, cost.tokens
        self._clients = [before + more for before, more in zip(self._clients, mine, strict=True)]
