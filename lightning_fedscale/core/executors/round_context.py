"""What executors need for the clients of one rank in one round, and whom they call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.frozen_parameters import FrozenGuard
from lightning_fedscale.core.executors.meter import CostMeter
from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.local_rules import Correction
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.flat_view import FlatView


class Pipeline(Protocol):
    """What the chosen algorithm does to each client's training, requested when the client starts and when it ends."""

    def start(self, client: int) -> Tensor | None:
        """Return the model from which the client starts, as a vector; None for the global model."""

    def correction(self, client: int) -> Correction | None:
        """Return the correction of its gradients, while the module holds its first model; None for no correction."""

    def personal(self, client: int) -> dict[str, Tensor]:
        """Return the client's personal tensors by name as it left them; empty if it never took part."""

    def keep_personal(self, client: int, values: dict[str, Tensor]) -> None:
        """Store the client's personal tensors after its training."""


class LargestClient:
    """The buffers of this rank's client with the most samples; ties go to the lower client number."""

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self.values: Mapping[str, Tensor | None] = {}

    def offer(self, update: ClientUpdate, values: Callable[[], Mapping[str, Tensor | None]]) -> None:
        """Keep a client's buffers, unless another client has more samples or its update is excluded.

        Args:
            update: the client's update.
            values: returns copies of its buffers by name; None for a buffer that was removed.
        """
        key = (update.num_samples, -update.client)
        if update.finite and (self._key is None or key >= self._key):
            self._key, self.values = key, values()


class RoundContext(NamedTuple):
    """Everything that an executor needs for the clients of one rank in one round.

    Attributes:
        round: index of the round.
        work: the rank's clients and their batches.
        batches: the clients' collated batches in order; on the device if they come from ``cache``, else on the CPU
            except the first.
        first: the client whose first batch came through the Trainer's own loop and is on the device.
        randomness: state of the global generators for that client; None if fetching a batch draws nothing.
        cache: the dataset on the device; None if not cached.
        shared: the model's tensors, which hold the global model.
        server: copies of these tensors, of the global model.
        training: False runs forward passes only.
        fetch: makes one batch of these dataset positions in this process.
        reopen: returns the collated batches of given clients again, in the given order or client by client.
        meter: measures the cost of clients' training; None for no measurement.
        pipeline: what the chosen algorithm does to each client's training; None if clients train as in FedAvg, or only
            run forward passes.
        own: the server's values of the personal tensors, as the module was built, by name.
        largest: keeps the buffers of the client with the most samples; None if they are not needed.
        timed: whether local batches are timed; batches of known cost should then not be counted again.
        frozen: notices writes to frozen parameters that are not exchanged.
    """

    round: int
    work: list[LocalWork]
    batches: Iterator[Any]
    first: LocalWork | None
    randomness: randomness.GlobalState | None
    cache: DeviceData | None
    shared: SharedTensors
    server: FlatView
    training: bool
    fetch: Callable[[list[int]], Any]
    reopen: Callable[[list[LocalWork], Iterable[tuple[int, int]] | None], Iterator[Any]]
    meter: CostMeter | None = None
    pipeline: Pipeline | None = None
    own: Mapping[str, Tensor] = MappingProxyType({})
    largest: LargestClient | None = None
    timed: bool = False
    frozen: FrozenGuard = FrozenGuard()

    def restarted(self, order: Iterable[tuple[int, int]] | None) -> RoundContext:
        """Return a context in which the same clients start again with their first batches.

        Args:
            order: order of the batches, as (number in ``work``, number of the batch); None for client by client.
        """
        return self._replace(batches=self.reopen(self.work, order), first=None, randomness=None)


class Watcher(Protocol):
    """Is called as clients train."""

    def client_started(self, client: int) -> None:
        """Handle the start of a client; the model holds the global weights."""

    def client_stepped(self, done: int, loss: Tensor | None) -> None:
        """Handle the end of a local batch; ``done`` clients of this rank are complete."""

    def client_ended(self, update: ClientUpdate) -> None:
        """Handle the end of a client; the model holds its weights."""


class Personal:
    """The personal tensors of each client; after each client the server's values, as built, are restored."""

    def __init__(self, context: RoundContext) -> None:
        self._pipeline = context.pipeline
        self._shared = context.shared
        self._servers = context.own

    def load(self, client: int) -> None:
        """Write this client's personal tensors to the module."""
        if self._pipeline is not None:
            self._shared.write_personal(self._pipeline.personal(client))

    def keep(self, client: int, update: ClientUpdate) -> None:
        """Store the client's personal tensors after its training, unless its update is not finite."""
        if self._pipeline is not None and update.finite and (values := self._shared.copy_personal()):
            self._pipeline.keep_personal(client, values)

    def restore(self) -> None:
        """Write the server's values to the module."""
        self._shared.write_personal(self._servers)
