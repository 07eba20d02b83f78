"""What one rank has spent since the ranks last summed their costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from lightning_fedscale.callbacks.compute_accounting.flop_meter import BatchCost, Meter
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.utils import collectives


class RankCosts:
    """The costs of this rank that the common ledger lacks.

    Attributes:
        ledger: these costs.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        # The part of it that the open round sends to the other ranks; None if ranks have summed it in another way.
        self._sent: tuple[float, float] | None = None
        self._unpriced: Counter[BatchSignature] = Counter()  # probing steps with batches whose cost is not known yet

    def add_evaluation(self, cost: BatchCost) -> None:
        """Add an evaluation."""
        self.ledger.add(evaluation=cost.flops)

    def add_probe(self, batch: Any, flops: float) -> None:
        """Add an extra training step, with this batch or of so many FLOPs."""
        self.ledger.add(probing=flops)
        if batch is not None:
            self._unpriced[signature_of(batch).anonymous()] += 1

    def _price_probes(self, meter: Meter) -> None:
        """Add probing steps by the cost of the run's own batches, once a similar one has run."""
        for signature, number in list(self._unpriced.items()):
            if (cost := meter.expected(signature)) is not None:
                self.ledger.add(probing=number * cost.flops)
                del self._unpriced[signature]

    def send(self, meter: Meter) -> tuple[float, float]:
        """Return the FLOPs of evaluation and probing, which the table of the open round shares."""
        self._price_probes(meter)
        self._sent = self.ledger.flops["evaluation"], self.ledger.flops["probing"]
        return self._sent

    def subtract_sent(self) -> bool:
        """Remove what the completed round has shared; return False if ranks have summed it in another way before."""
        if self._sent is None:
            return False
        evaluation, probing = self._sent
        self.ledger.add(evaluation=-evaluation, probing=-probing)
        self._sent = None
        return True

    def move_into(self, ledger: Ledger, meter: Meter | None) -> None:
        """Add the sum over all ranks to the common ledger; call it on all ranks."""
        if meter is not None:
            self._price_probes(meter)
        ledger.add_numbers(_summed(self.ledger.numbers()))
        self.ledger, self._sent = Ledger(), None


def _summed(numbers: list[float]) -> list[float]:
    """Return the sums over all ranks."""
    if collectives.world_size() == 1:
        return numbers
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found: list[float] = collectives.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    return found
