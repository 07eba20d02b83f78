"""The numbers of a round's clients and ranks, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.core.executors import ExecutorTiming
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round.client_rows import ClientRows, in_order
from lightning_fedscale.types import (
    SIDE,
    FloatArray,
    IntArray,
    RoundRecord,
    SimulatedRound,
)

_TIMINGS = len(ExecutorTiming._fields)


class RoundTable:
    """The numbers of a rank and of its clients; the sum over ranks is the complete table.

    It crosses the ranks as part of the round's one collective, so every rank computes the same record from it.

    Args:
        plan: the round's plan.
        world_size: number of ranks.
        num_parameters: number of parameter tensors that clients may freeze or unfreeze.
        num_logged: how many numbers the clients' logged values take, see `set_logged`.

    Attributes:
        clients: a row for each client.
        logged: what clients logged.
    """

    def __init__(self, plan: RoundPlan, world_size: int, num_parameters: int = 0, num_logged: int = 0) -> None:
        self._plan = plan
        # numpy, since torch takes several times as long to write a few numbers.
        parts = [ClientRows.size_of(plan), world_size, world_size, num_parameters + 1, 1, 1, 1, 1, SIDE, _TIMINGS]
        self._numbers = np.zeros(sum(parts) + num_logged)
        cells, self._busy, self._failed, self._trainable, *others = np.split(self._numbers, np.cumsum(parts))
        self._slots, self._preempted, self._irregular, self._again, self._side, self._timing, self.logged = others
        self.clients = ClientRows(plan, cells)

    def set_logged(self, numbers: FloatArray) -> None:
        """Note what the clients of this rank logged; ``logged`` is then the sum over ranks."""
        self.logged[:] = numbers

    def add_trainable(self, flags: list[bool]) -> None:
        """Count the parameters that a client left trainable, and the client."""
        self._trainable += [*flags, True]

    def trainable(self) -> list[bool] | None:
        """Return which parameters are trainable now: those that any client left so; None if no client trained."""
        *flags, anybody = (self._trainable > 0).tolist()
        return flags if anybody else None

    def finish_rank(
        self,
        rank: int,
        seconds: float,
        *,
        failed: bool,
        preempted: bool = False,
        irregular_buffers: bool = False,
        again: bool = False,
    ) -> None:
        """Note how long this rank worked.

        Args:
            rank: this one.
            seconds: of work.
            failed: whether an exception ended it.
            preempted: whether the rank's job will end soon.
            irregular_buffers: whether buffers appeared, disappeared, or changed their shape.
            again: whether the round must start again.
        """
        self._busy[rank] = seconds
        self._failed[rank] = float(failed)
        self._preempted[0] = float(preempted)
        self._irregular[0] = float(irregular_buffers)
        self._again[0] = float(again)

    def add_side(self, side: Sequence[float]) -> None:
        """Note what else this rank spent and counted since the last round, see `RoundRecord.side`."""
        self._side[:] = side

    def add_executor(self, slots: int, timing: Sequence[float]) -> None:
        """Note how many local steps this rank had slots for, and what it measured of its executors."""
        self._slots[0] = slots
        self._timing[:] = timing

    def executor_timing(self) -> list[float]:
        """Return the sum of what the ranks measured of their executors."""
        numbers: list[float] = self._timing.tolist()
        return numbers

    @property
    def size(self) -> int:
        """How many numbers `pack` returns."""
        return len(self._numbers)

    def pack(self) -> Tensor:
        """Return all numbers as one float64 vector on the CPU, to be summed over ranks; it is a view."""
        return torch.from_numpy(self._numbers)

    def unpack(self, packed: Tensor) -> None:
        """Replace the numbers by the sum over ranks."""
        self.pack().copy_(packed)

    def failed_ranks(self) -> list[int]:
        """Return the ranks whose work ended in an exception."""
        ranks: list[int] = self._failed.nonzero()[0].tolist()
        return ranks

    def irregular_buffers(self) -> bool:
        """Return whether buffers appeared, disappeared, or changed their shape on any rank."""
        return bool(self._irregular[0] > 0)

    def again(self) -> bool:
        """Return whether any rank needs the round to start again."""
        return bool(self._again[0] > 0)

    def preempted(self) -> bool:
        """Return whether the job of any rank will end soon."""
        return bool(self._preempted[0] > 0)

    @property
    def round(self) -> int:
        """Index of the round."""
        return self._plan.round

    def record(
        self,
        delta_norm: float,
        model_bytes: int,
        simulated_before: float = 0.0,
        epsilon: float | None = None,
        batch_sizes: IntArray | None = None,
    ) -> RoundRecord:
        """Return the round in numbers.

        Args:
            delta_norm: L2 norm of the aggregated pseudo-gradient.
            model_bytes: the bytes that one client receives.
            simulated_before: simulated seconds of all rounds before this one.
            epsilon: what differential privacy has cost so far; None without privacy.
            batch_sizes: of the cohort, in asynchronous training on simulated hardware.
        """
        column = self.clients.column
        weights, norms, losses = column("weight"), column("norm"), column("loss")
        samples = column("samples")
        weights /= in_order(weights) or 1.0
        accepted = column("rejected") == 0
        known = accepted & ~np.isnan(losses)
        square = in_order(weights[accepted] * norms[accepted] ** 2) - delta_norm**2
        slowest = float(self._busy.max())
        return RoundRecord(
            round=self._plan.round,
            clients=self._plan.cohort,
            ranks=self._plan.ranks,
            weights=weights,
            samples=samples.astype(np.int64),
            local_steps=column("steps").astype(np.int64),
            losses=losses,
            delta_norms=norms,
            client_seconds=column("seconds"),
            rejected=self.clients.rejected(),
            loss=in_order(losses[known] * samples[known]) / in_order(samples[known]) if known.any() else math.nan,
            delta_norm=delta_norm,
            drift=_ratio(math.sqrt(max(0.0, square)), delta_norm),
            upload_bytes=round(in_order(column("bytes"))),
            download_bytes=model_bytes * len(self.clients),
            seconds=slowest,
            padding=max(0.0, 1.0 - in_order(column("steps")) / float(self._slots[0])) if self._slots[0] else 0.0,
            idle=1.0 - float(self._busy.mean()) / slowest if slowest > 0 else 0.0,
            simulated=self._simulated(simulated_before, batch_sizes),
            staleness=None if self._plan.buffered is None else self._plan.round - self._plan.buffered.versions,
            forward_flops=column("forward"),
            backward_flops=column("backward"),
            optimizer_flops=column("optimizer"),
            tokens=column("tokens"),
            side=tuple(self._side.tolist()),
            epsilon=epsilon,
        )

    def _simulated(self, before: float, batch_sizes: IntArray | None) -> SimulatedRound | None:
        if (buffered := self._plan.buffered) is not None:
            sizes = np.zeros(len(buffered.clients), dtype=np.int64) if batch_sizes is None else batch_sizes
            return SimulatedRound(buffered.time - before, buffered.time, sizes, buffered.durations, ())
        if self._plan.simulated is None:
            return None
        selection, chosen = self._plan.simulated
        seconds, dropped = selection.round_seconds, tuple(selection.dropped.tolist())
        return SimulatedRound(seconds, before + seconds, chosen, selection.seconds, dropped)


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return math.inf if part > 0 else 0.0
