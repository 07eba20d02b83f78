"""The parallel performance model: time per round, rounds to a target, and the batch that reaches it first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_fedscale.devices.classes import DeviceClass
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.utils import checks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ROUNDING = 1e-6  # relative errors below this are rounding, not noise


@dataclass(frozen=True)
class StepTime:
    """Seconds of a local step as a linear function of its batch, ``fixed + per_sample * batch``.

    Attributes:
        fixed: seconds of every step, independent of its batch.
        per_sample: seconds for each sample.
        residual: root mean square of the relative errors of the fit; 0 for a line that was not fitted.
        identified: whether the measurements determine both parameters: each is more than twice its standard error. If
            all batches have about the same size they do not, and only predictions for that size are valid.
        measurements: number of measurements.

    Raises:
        TypeError: if the seconds are not numbers.
        ValueError: if the seconds are below 0.
    """

    fixed: float
    per_sample: float
    residual: float = 0.0
    identified: bool = True
    measurements: int = 0

    def __post_init__(self) -> None:
        for name in ("fixed", "per_sample"):
            checks.number(name, getattr(self, name), "pass seconds, at least 0.", lambda seconds: seconds >= 0)

    def seconds(self, samples: float, steps: float = 1) -> float:
        """Return the time of this many steps over this many samples in total."""
        return self.fixed * steps + self.per_sample * samples


class StepTimes(NamedTuple):
    """Measurements of steps, stored only as the sums that a fit needs.

    Example:
        >>> times = StepTimes().add(steps=1, samples=10, seconds=0.3).add(steps=2, samples=80, seconds=1.2)
        >>> fitted = times.fit()
        >>> round(fitted.fixed, 3), round(fitted.per_sample, 3)
        (0.2, 0.01)
    """

    measurements: int = 0
    steps_squared: float = 0.0
    both: float = 0.0
    samples_squared: float = 0.0
    steps: float = 0.0
    samples: float = 0.0

    def add(self, *, steps: float, samples: float, seconds: float) -> StepTimes:
        """Add a measurement of a single step, or of all steps of a client in a round.

        Measurements count by their relative error, so that long ones do not dominate short ones. One whose time is zero
        or not finite is ignored.
        """
        if not (0 < seconds < math.inf and steps > 0):
            return self
        n, s = steps / seconds, samples / seconds
        return StepTimes(
            self.measurements + 1,
            self.steps_squared + n * n,
            self.both + n * s,
            self.samples_squared + s * s,
            self.steps + n,
            self.samples + s,
        )

    def fit(self) -> StepTime:
        """Fit the line with the smallest relative errors and no negative parameter.

        It minimizes ``sum ((fixed * steps + per_sample * samples) / seconds - 1)^2``.

        Raises:
            ValueError: if there is no measurement.
        """
        if not self.measurements:
            raise ValueError("StepTimes: no step has been measured: add one with a time above 0 first.")
        determinant = self.steps_squared * self.samples_squared - self.both**2
        solvable = determinant > 1e-9 * self.steps_squared * self.samples_squared
        only_samples = 0.0, self.samples / self.samples_squared if self.samples_squared else 0.0
        only_steps = self.steps / self.steps_squared, 0.0
        candidates = [only_steps, only_samples]
        if solvable:
            fixed = (self.steps * self.samples_squared - self.samples * self.both) / determinant
            per_sample = (self.samples * self.steps_squared - self.steps * self.both) / determinant
            if fixed >= 0 and per_sample >= 0:
                candidates = [(fixed, per_sample)]
        best = min(candidates, key=lambda line: self._squares(*line))
        residual = math.sqrt(max(0.0, self._squares(*best)) / self.measurements)
        noise = residual if residual > _ROUNDING else 0.0
        identified = solvable and all(
            part > 2.0 * noise * math.sqrt(other / determinant)
            for part, other in zip(best, (self.samples_squared, self.steps_squared), strict=True)
        )
        return StepTime(*best, residual, identified, self.measurements)

    def _squares(self, fixed: float, per_sample: float) -> float:
        quadratic = self.steps_squared * fixed**2 + 2 * self.both * fixed * per_sample
        quadratic += self.samples_squared * per_sample**2
        return quadratic - 2 * self.steps * fixed - 2 * self.samples * per_sample + self.measurements


def fit_step_time(batches: Iterable[float], seconds: Iterable[float]) -> StepTime:
    """Fit `StepTimes` to single steps.

    Example:
        >>> fit_step_time([8, 16], [1.0, 1.5]).fixed
        0.5
    """
    times = StepTimes()
    for batch, took in zip(batches, seconds, strict=True):
        times = times.add(steps=1, samples=batch, seconds=took)
    return times.fit()


def roofline(cost: StepCost, device: DeviceClass) -> float:
    """Return the seconds of a step on a device at its peaks: compute or memory traffic, whichever takes longer.

    ``max(flops / device.flops, bytes_moved / device.memory_bandwidth)`` (Williams, Waterman, Patterson 2009).
    """
    return max(cost.flops / device.flops, cost.bytes_moved / device.memory_bandwidth)


def roofline_step_time(cost_of: Callable[[int], StepCost], device: DeviceClass, batches: tuple[int, int]) -> StepTime:
    """Return the line through a device's `roofline` at two batch sizes, for devices that cannot be measured.

    Args:
        cost_of: cost of a step by batch size, such as `MemoryModel.cost`.
        device: the device.
        batches: the smallest and the largest relevant batch size.
    """
    low, high = batches
    first, last = roofline(cost_of(low), device), roofline(cost_of(high), device)
    per_sample = max(0.0, (last - first) / (high - low))
    return StepTime(max(0.0, first - per_sample * low), per_sample)


@dataclass(frozen=True)
class PerformanceModel:
    """Time to a target as the product of seconds per round and rounds to the target.

    A round takes ``H (t_f + t_1 b) + t_sync`` seconds with H local steps of batch b. An optimizer needs
    ``S_min (1 + B_noise / (K b))`` steps if K clients average batches of b samples (McCandlish et al. 2018,
    1812.06162). B_noise is the gradient noise scale: below it larger batches save steps in proportion, and far above it
    they save none.

    Attributes:
        step: seconds of a local step.
        sync: seconds of a round's communication, or a function of the number of clients that returns them.
        noise_scale: B_noise in samples; None if unknown.
        max_batch: largest batch that fits; None for no limit.

    Raises:
        TypeError: if ``step`` is not a `StepTime`, or another argument is not a number.
        ValueError: if ``sync`` is below 0 seconds, or the noise scale or largest batch is not positive.

    Example:
        >>> model = PerformanceModel(StepTime(fixed=0.02, per_sample=0.001), sync=0.1, noise_scale=800)
        >>> model.best_batch(clients=4, local_steps=5)
        89
        >>> round(model.time_per_round(89, clients=4, local_steps=5), 3)
        0.645
    """

    step: StepTime
    sync: float | Callable[[int], float] = 0.0
    noise_scale: float | None = None
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.step, StepTime):
            raise TypeError(f"step={self.step!r}: pass a StepTime, such as fit_step_time(batches, seconds).")
        if not callable(self.sync):
            remedy = "pass seconds, at least 0, or a function of the number of clients."
            checks.number("sync", self.sync, remedy, lambda seconds: seconds >= 0)
        for name in ("noise_scale", "max_batch"):
            value = getattr(self, name)
            if value is not None:
                checks.number(
                    name, value, "pass a number above 0, or None if it is unknown.", lambda number: number > 0
                )

    def time_per_round(self, batch: int, clients: int, local_steps: int = 1) -> float:
        """Return the seconds of a round, in which all clients compute in parallel and then communicate."""
        _check_positive(batch=batch, clients=clients, local_steps=local_steps)
        return local_steps * self.step.seconds(batch) + self._sync(clients)

    def rounds_to_target(self, batch: int, clients: int, local_steps: int = 1, min_steps: float = 1.0) -> float:
        """Return the rounds to a target, ``S_min (1 + B_noise / (K b)) / H``, assuming equally effective steps.

        Args:
            batch: samples per client and step.
            clients: K.
            local_steps: H.
            min_steps: S_min, the steps of infinitely large batches; with 1 the result is in these units.

        Raises:
            ValueError: if the noise scale is unknown.
        """
        _check_positive(batch=batch, clients=clients, local_steps=local_steps, min_steps=min_steps)
        if self.noise_scale is None:
            raise ValueError(
                "noise_scale=None: the number of steps is unknown without the gradient noise scale: pass it to"
                " PerformanceModel."
            )
        return min_steps * (1 + self.noise_scale / (clients * batch)) / local_steps

    def seconds_to_target(self, batch: int, clients: int, local_steps: int = 1, min_steps: float = 1.0) -> float:
        """Return `rounds_to_target` times `time_per_round`; see there."""
        rounds = self.rounds_to_target(batch, clients, local_steps, min_steps)
        return rounds * self.time_per_round(batch, clients, local_steps)

    def best_batch(self, clients: int, local_steps: int = 1, work_share: float = 0.5) -> int:
        """Return the batch that reaches the target first.

        With the noise scale it is ``b* = sqrt(B_noise t_f / (K t_1))``, rounded to the better neighbour, where ``t_f``
        includes the communication, spread over the local steps. Without it, it is the knee: the smallest batch at which
        a share ``work_share`` of the time is spent on samples, since larger ones hardly process samples faster. It is
        at most ``max_batch``.

        Args:
            clients: K.
            local_steps: H.
            work_share: the share, above 0 and below 1; only used without a noise scale.

        Raises:
            ValueError: if nothing bounds the batch: steps cost the same for any batch and ``max_batch`` is None.
        """
        _check_positive(clients=clients, local_steps=local_steps)
        if not 0 < work_share < 1:
            raise ValueError(f"work_share={work_share!r}: pass a share above 0 and below 1.")
        fixed, per_sample = self.step.fixed + self._sync(clients) / local_steps, self.step.per_sample
        if per_sample <= 0:
            if self.max_batch is None:
                raise ValueError(
                    "max_batch=None: these steps take the same time for any batch, so the largest batch is the fastest:"
                    " pass the largest one that fits to PerformanceModel."
                )
            return self.max_batch
        if self.noise_scale is None:
            return self._clipped(math.ceil(work_share / (1 - work_share) * fixed / per_sample * (1 - 1e-12)))
        best = math.sqrt(self.noise_scale * fixed / (clients * per_sample))
        neighbours = {self._clipped(math.floor(best)), self._clipped(math.ceil(best))}
        return min(sorted(neighbours), key=lambda batch: self.seconds_to_target(batch, clients, local_steps))

    def table(self, batches: Sequence[int], clients: int, local_steps: int = 1, min_steps: float = 1.0) -> pd.DataFrame:
        """Tabulate seconds per round, samples per second and, with a noise scale, rounds and seconds to the target."""
        import pandas as pd

        rows = []
        for batch in batches:
            seconds = self.time_per_round(batch, clients, local_steps)
            row = {"batch": batch, "seconds_per_round": seconds}
            row["samples_per_second"] = clients * local_steps * batch / seconds if seconds else math.inf
            if self.noise_scale is not None:
                row["rounds_to_target"] = self.rounds_to_target(batch, clients, local_steps, min_steps)
                row["seconds_to_target"] = self.seconds_to_target(batch, clients, local_steps, min_steps)
            rows.append(row)
        return pd.DataFrame(rows).set_index("batch")

    def plot(self, clients: int, local_steps: int = 1, batches: Sequence[int] | None = None) -> Figure:
        """Plot the time to the target and its two factors against the batch; time per sample without a noise scale.

        Args:
            clients: K.
            local_steps: H.
            batches: the sizes to show; None for powers of two around the best.
        """
        from lightning_fedscale.devices.plots import plot_batches

        best = self.best_batch(clients, local_steps)
        if batches is None:
            most = self.max_batch or 16 * best
            batches = sorted({*(2**n for n in range(most.bit_length())), best, most})
        return plot_batches(self.table(batches, clients, local_steps), best, self.max_batch)

    def _sync(self, clients: int) -> float:
        return self.sync(clients) if callable(self.sync) else self.sync

    def _clipped(self, batch: int) -> int:
        return max(1, batch if self.max_batch is None else min(batch, self.max_batch))


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r}: pass a number above 0.")
