"""What executors tell to whoever counts what the training of clients costs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from lightning_fedscale.devices.profiling.batches import Form
from lightning_fedscale.types import ClientCost


class ClientMeter(Protocol):
    """Adds up what one client's training costs."""

    def batch(self, batch: Any, samples: int, *, training: bool = True) -> AbstractContextManager[Any]:
        """To be active while a batch of the client runs; ``training`` is False for a forward pass alone."""

    def add(self, form: Form, samples: int) -> None:
        """A batch of this form ran side by side with those of other clients."""

    def again(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """To be active while a copy of the module computes the gradient of a batch besides the client's training."""

    def total(self, optimizer_steps: int) -> ClientCost:
        """All of it, with so many steps of the client's optimizer."""


class Meter(Protocol):
    """What says what things cost."""

    def client(self) -> ClientMeter:
        """A client is about to train."""

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """To be active while a batch runs by itself that counts side by side: it tells what such batches cost."""

    def wants(self, form: Form, samples: int) -> bool:
        """Whether nothing is known of the cost of such batches."""

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """To be active while the optimizers of so many clients step at once."""

    def side(self) -> tuple[float, ...]:
        """What this rank spent and counted besides, since the round before; see `RoundRecord.side`."""
