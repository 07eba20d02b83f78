"""Batch sizes and times of a population's clients for a given module."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_fedscale.devices.classes import usable_bytes
from lightning_fedscale.devices.communication import star
from lightning_fedscale.devices.memory import MemoryModel
from lightning_fedscale.devices.performance import PerformanceModel, StepTime, roofline_step_time
from lightning_fedscale.devices.population import Population, Selection, select
from lightning_fedscale.types import FloatArray, IntArray, renamed_field
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import format_bytes
from lightning_fedscale.utils.moved import renamed

if TYPE_CHECKING:
    import pandas as pd

__getattr__ = renamed(__name__, {"Duty": "ClientWorkload"})


@renamed_field("message_bytes", "model_bytes")
class ClientWorkload(NamedTuple):
    """The clients' work in a round.

    Attributes:
        clients: number of clients in a round.
        local_steps: batches of each client, at the loader's batch size.
        batch_size: the loader's batch size.
        largest: largest useful batch, that of the client with the most samples.
        model_bytes: size of the model on the downlink.
        update_bytes: size of an update on the uplink.
    """

    clients: int
    local_steps: float
    batch_size: int
    largest: int
    model_bytes: int
    update_bytes: int


class Fleet:
    """Batch sizes and simulated times of a population that trains a given module.

    Args:
        population: the hardware.
        model: memory and cost of the module's training step.
        num_clients: number of clients.
        workload: the clients' work in a round.

    Attributes:
        batch_sizes: batch size of each device class.

    Raises:
        ValueError: if the smallest batch, or the chosen one, does not fit a class.
    """

    def __init__(self, population: Population, model: MemoryModel, num_clients: int, workload: ClientWorkload) -> None:
        self.population = population
        self._model = model
        self._workload = workload
        self._class_of = population.assign(num_clients)
        self._largest = [self._most(number, workload.largest) for number in range(len(population.classes))]
        self.batch_sizes: IntArray = np.array(self._choose(), dtype=np.int64)
        self._steps = [self._step_time(number, int(size)) for number, size in enumerate(self.batch_sizes)]
        self._transfers = np.array(
            [
                star(workload.model_bytes, each.up, each.down, each.latency, workload.update_bytes)
                for each in population.classes
            ]
        )

    def batch_size(self, client: int) -> int:
        """Return the batch size of a client."""
        return int(self.batch_sizes[self._class_of[client]])

    def batch_sizes_of(self, clients: IntArray) -> IntArray:
        """Return the batch sizes of several clients."""
        return self.batch_sizes[self._class_of[clients]]

    def seconds(self, clients: IntArray, steps: FloatArray, samples: FloatArray) -> FloatArray:
        """Return each client's simulated time for downlink, local batches and uplink.

        Compute time is the `roofline` of the device for full batches, and interpolated for smaller ones.

        Args:
            clients: the clients.
            steps: local batches of each.
            samples: samples of each, over all batches.
        """
        kinds = self._class_of[clients]
        fixed = np.array([step.fixed for step in self._steps])
        per_sample = np.array([step.per_sample for step in self._steps])
        seconds: FloatArray = self._transfers[kinds] + fixed[kinds] * steps + per_sample[kinds] * samples
        return seconds

    def select(
        self, seed: int, round: int, clients: IntArray, steps: FloatArray, samples: FloatArray, wanted: int
    ) -> Selection:
        """Select the sampled clients that count; see `lightning_fedscale.devices.population.select`."""
        return select(
            clients,
            self.seconds(clients, steps, samples),
            self._unavailability(seed, round, clients),
            wanted=wanted,
            deadline=self.population.deadline,
            min_clients=self.population.min_clients,
        )

    def table(self) -> pd.DataFrame:
        """Return a table with one row per device class: clients, batches, memory, simulated speed."""
        import pandas as pd

        counts = np.bincount(self._class_of, minlength=len(self._steps))
        rows = [
            {
                "class": device.name,
                "clients": int(count),
                "batch_size": int(size),
                "largest": largest,
                "peak_bytes": self._model.peak(max(int(size), self._model.smallest)),
                "memory": device.memory,
                "step_seconds": step.seconds(int(size)),
                "samples_per_second": int(size) / step.seconds(int(size)),
                "message_seconds": message,
            }
            for device, count, size, largest, step, message in zip(
                self.population.classes, counts, self.batch_sizes, self._largest, self._steps,
                self._transfers.tolist(), strict=True,
            )
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("class")

    def is_available(self, seed: int, request: int, client: int) -> bool:
        """Return whether a client is available for the request of this number."""
        return bool(self._unavailability(seed, request, np.array([client]))[0] < 1)

    def _unavailability(self, seed: int, round: int, clients: IntArray) -> FloatArray:
        """Return a number for each client, below 1 if it is available."""
        unavailability = np.zeros(len(clients))
        for number, client in enumerate(clients.tolist()):
            availability = self.population.classes[self._class_of[client]].availability
            if availability < 1:
                drawn = randomness.generator(seed, randomness.AVAILABILITY, round, client).random()
                unavailability[number] = drawn / availability
        return unavailability

    def _most(self, number: int, limit: int) -> int:
        device, model = self.population.classes[number], self._model
        try:
            return model.max_batch(device.memory, self.population.headroom, limit)
        except ValueError as error:
            raise ValueError(f"population: device class {device.name!r}: {error}") from None

    def _choose(self) -> list[int]:
        rule, largest, own = self.population.batch_size, self._largest, self._workload.batch_size
        if rule == "largest":
            return largest
        if rule == "loader":
            return [min(own, most) for most in largest]
        if rule == "fastest":
            return [self._fastest(number) for number in range(len(largest))]
        if rule == "proportional":
            speeds = [own / self._step_time(number, own).seconds(own) for number in range(len(largest))]
            counts = np.bincount(self._class_of, minlength=len(largest)).astype(np.float64)
            shared: list[int] = share_out(own, np.array(speeds), counts, np.array(largest)).tolist()
            return [max(size, self._model.smallest) for size in shared]
        return [self._given(number, rule[device.name]) for number, device in enumerate(self.population.classes)]

    def _given(self, number: int, size: int) -> int:
        device = self.population.classes[number]
        usable = usable_bytes(device.memory, self.population.headroom)
        if (peak := self._model.peak(max(size, self._model.smallest))) > usable:
            raise ValueError(
                f"population: batch_size={size} takes {format_bytes(peak)} on device class {device.name!r}, which has"
                f" {format_bytes(usable)} for it: pass at most {self._largest[number]}."
            )
        return size

    def _fastest(self, number: int) -> int:
        device, workload = self.population.classes[number], self._workload
        performance = PerformanceModel(
            self._step_time(number, self._largest[number]),
            star(workload.model_bytes, device.up, device.down, device.latency, workload.update_bytes),
            self.population.noise_scale,
            self._largest[number],
        )
        return performance.best_batch(workload.clients, max(1, round(workload.local_steps)))

    def _step_time(self, number: int, size: int) -> StepTime:
        low = self._model.smallest
        return roofline_step_time(self._model.cost, self.population.classes[number], (low, max(size, low + 1)))


def share_out(mean: float, speeds: FloatArray, counts: FloatArray, most: IntArray) -> IntArray:
    """Return batch sizes in proportion to speeds, with the given mean over clients, within each class's largest batch.

    What does not fit a class goes to the others in proportion; if nothing more fits any class, the mean is smaller.
    Fractions are rounded down, but not below 1.

    Args:
        mean: mean samples per batch, over clients.
        speeds: samples per second of each class.
        counts: clients of each class.
        most: largest batch of each class.

    Example:
        >>> share_out(32, np.array([1.0, 3.0]), np.array([1.0, 1.0]), np.array([100, 40])).tolist()
        [24, 40]
    """
    sizes = np.zeros(len(speeds))
    open_ = np.ones(len(speeds), dtype=bool)
    while open_.any():
        left = mean * counts.sum() - (sizes * counts)[~open_].sum()
        weight = (speeds * counts)[open_].sum()
        factor = max(0.0, left) / weight if weight > 0 else 0.0
        sizes[open_] = speeds[open_] * factor
        full = open_ & (sizes > most)
        if not full.any():
            break
        sizes[full] = most[full]
        open_ &= ~full
    rounded: IntArray = np.maximum(1, np.floor(sizes + 1e-9)).astype(np.int64)
    return rounded
