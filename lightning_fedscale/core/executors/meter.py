"""The interface by which executors report the cost of clients' training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from lightning_fedscale.devices.profiling.batches import BatchSignature
from lightning_fedscale.types import ClientCost


class ClientMeter(Protocol):
    """Adds up what one client's training costs."""

    def batch(self, batch: Any, samples: int, *, training: bool = True) -> AbstractContextManager[Any]:
        """Measure a batch of the client inside the context; ``training`` is False for only a forward pass."""

    def add(self, signature: BatchSignature, samples: int) -> None:
        """Add the cost of a vectorized batch with this batch signature."""

    def again(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Measure, inside the context, a copy of the module that computes a batch's gradient besides the training."""

    def total(self, optimizer_steps: int) -> ClientCost:
        """Return the total cost, including this many steps of the client's optimizer."""


class CostMeter(Protocol):
    """Measures the cost of training."""

    def client(self) -> ClientMeter:
        """Return the meter of the next client."""

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Measure a batch that runs alone inside the context, as the cost of such batches when they are vectorized."""

    def wants(self, signature: BatchSignature, samples: int) -> bool:
        """Return whether the cost of such batches is unknown."""

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """Measure a joint step of this many clients' optimizers inside the context."""

    def side(self) -> tuple[float, ...]:
        """Return this rank's other costs and counts since the previous round; see `RoundRecord.side`."""
