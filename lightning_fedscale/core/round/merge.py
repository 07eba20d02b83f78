"""The numbers of a round: one row per client, filled by the rank that trained it, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.types import (
    SIDE,
    ClientCost,
    ClientUpdate,
    Cursor,
    FloatArray,
    IntArray,
    RoundRecord,
    SimulatedRound,
)

_COLUMNS = (
    "weight", "samples", "steps", "loss", "norm", "seconds", "rejected", "pass", "batch", "scale", "growth",
    *ClientCost._fields, "bytes", "normalizer", "within",
)  # fmt: skip
_BALLOT = 4


class RoundTable:
    """Rows for the whole cohort, of which a rank fills its own; the sum over ranks is the complete table.

    It crosses the ranks as part of the round's one collective, so every rank computes the same record from it.

    Args:
        plan: the round's plan.
        world_size: number of ranks.
        num_parameters: number of parameter tensors that clients may freeze or unfreeze.
        num_logged: how many numbers the clients' logged values take, see `set_logged`.
    """

    def __init__(self, plan: RoundPlan, world_size: int, num_parameters: int = 0, num_logged: int = 0) -> None:
        self._plan = plan
        self._row = {client: row for row, client in enumerate(plan.cohort.tolist())}
        cells = len(self._row) * len(_COLUMNS)
        # numpy, since torch takes several times as long to write a few numbers.
        parts = [cells, world_size, world_size, num_parameters + 1, 1, 1, 1, SIDE, _BALLOT]
        self._numbers = np.zeros(sum(parts) + num_logged)
        rows, self._busy, self._failed, self._trainable, *others = np.split(self._numbers, np.cumsum(parts))
        self._slots, self._leave, self._odd, self._side, self._ballot, self.logged = others
        self._rows = rows.reshape(-1, len(_COLUMNS))

    def add(
        self,
        update: ClientUpdate,
        weight: float,
        cursor: Cursor,
        scaler: tuple[float, float],
        cost: ClientCost = ClientCost(),  # noqa: B008 (a constant)
        sent: tuple[float, float, float] = (0.0, 1.0, 0.0),
    ) -> None:
        """Fill a client's row.

        Args:
            update: what the client sent.
            weight: its weight in the aggregate.
            cursor: where its data goes on.
            scaler: scale and growth counter that its training left in the gradient scaler.
            cost: of its training.
            sent: bytes that it sent, its local rule's normalizer, and 1 if privacy did not clip its update.
        """
        accepted = update.finite
        values = (
            weight if accepted else 0.0,
            update.samples,
            update.steps,
            update.loss,
            update.norm if accepted else math.nan,
            update.seconds,
            0.0 if accepted else 1.0,
            *cursor,
            *scaler,
            *cost,
            *sent,
        )
        self._rows[self._row[update.client]] = values

    def set_logged(self, numbers: FloatArray) -> None:
        """Note what the clients of this rank logged; ``logged`` is then the sum over ranks."""
        self.logged[:] = numbers

    def add_cost(self, client: int, cost: ClientCost) -> None:
        """Add the cost of more training of a client, which saw the same tokens again."""
        row = self._rows[self._row[client]]
        for name in ("forward", "backward", "optimizer"):
            row[_COLUMNS.index(name)] += getattr(cost, name)

    def add_trainable(self, flags: list[bool]) -> None:
        """Count the parameters that a client left trainable, and the client."""
        self._trainable += [*flags, True]

    def trainable(self) -> list[bool] | None:
        """The parameters that are trainable from now on: those that any client left so; None if no client trained."""
        *flags, anybody = (self._trainable > 0).tolist()
        return flags if anybody else None

    def finish_rank(
        self, rank: int, seconds: float, *, failed: bool, leaves: bool = False, odd_buffers: bool = False
    ) -> None:
        """Note how long this rank worked.

        Args:
            rank: this one.
            seconds: of work.
            failed: whether an exception ended it.
            leaves: whether the rank's job is to end soon.
            odd_buffers: whether buffers came, went, or changed their shape.
        """
        self._busy[rank] = seconds
        self._failed[rank] = float(failed)
        self._leave[0] = float(leaves)
        self._odd[0] = float(odd_buffers)

    def add_side(self, side: Sequence[float]) -> None:
        """Note what this rank spent and counted besides since the last round, see `RoundRecord.side`."""
        self._side[:] = side

    def add_executor(self, slots: int, ballot: Sequence[float]) -> None:
        """Note how many local steps this rank had room for, and what it found out about its executors."""
        self._slots[0] = slots
        self._ballot[:] = ballot

    def ballot(self) -> list[float]:
        """What the ranks found out about their executors, added up."""
        numbers: list[float] = self._ballot.tolist()
        return numbers

    @property
    def size(self) -> int:
        """How many numbers `pack` gives."""
        return len(self._numbers)

    def pack(self) -> Tensor:
        """Everything as one float64 vector on the CPU, to be summed over ranks; a view, not a copy."""
        return torch.from_numpy(self._numbers)

    def unpack(self, packed: Tensor) -> None:
        """Take over the sum."""
        self.pack().copy_(packed)

    def failed_ranks(self) -> list[int]:
        """The ranks whose work ended in an exception."""
        ranks: list[int] = self._failed.nonzero()[0].tolist()
        return ranks

    def odd_buffers(self) -> bool:
        """Whether on any rank buffers came, went, or changed their shape."""
        return bool(self._odd[0] > 0)

    def leaves(self) -> bool:
        """Whether any rank was told that its job is to end soon."""
        return bool(self._leave[0] > 0)

    @property
    def round(self) -> int:
        """Index of the round."""
        return self._plan.round

    @property
    def cohort_size(self) -> int:
        """Number of clients in the round, accepted or not."""
        return len(self._row)

    def cursors(self) -> dict[int, Cursor]:
        """Where every client of the cohort goes on."""
        pairs = zip(self._column("pass").tolist(), self._column("batch").tolist(), strict=True)
        return {client: (int(p), int(b)) for client, (p, b) in zip(self._row, pairs, strict=True)}

    def rejected(self) -> tuple[int, ...]:
        """The clients that are left out, see `RoundRecord.rejected`."""
        return tuple(self._plan.cohort[self._column("rejected") > 0].tolist())

    def without_batches(self) -> tuple[int, ...]:
        """Those of them all of whose batches were None."""
        return tuple(self._plan.cohort[(self._column("rejected") > 0) & (self._column("steps") == 0)].tolist())

    def rank_of_largest(self, held: IntArray) -> int | None:
        """The rank of the client with the most samples whose update counts; None if there is none.

        Args:
            held: samples of each client of the round.
        """
        counts = ((self._column("rejected") == 0) & (self._column("steps") > 0)).nonzero()[0]
        if not len(counts):
            return None
        place = counts[held[counts].argmax()]  # of equal ones the first, which has the lowest number
        return int(self._plan.ranks[place])

    def smallest_scale(self) -> tuple[float, float]:
        """Scale and growth counter that no client would find too large: the smallest left by any; zeros by nobody."""
        if not len(scale := self._column("scale")):
            return 0.0, 0.0
        return float(scale.min()), float(self._column("growth")[scale == scale.min()].min())

    def mean_square(self) -> float:
        """Weighted mean of the accepted clients' squared norms."""
        accepted, weights = self._column("rejected") == 0, self._column("weight")
        return _sum(weights[accepted] * self._column("norm")[accepted] ** 2) / (_sum(weights) or 1.0)

    def normalizer(self) -> float:
        """Weighted mean of the accepted clients' normalizers."""
        accepted, weights = self._column("rejected") == 0, self._column("weight")
        return _sum((weights * self._column("normalizer"))[accepted]) / _sum(weights)

    def within(self) -> float:
        """Number of clients that privacy did not clip."""
        return _sum(self._column("within"))

    @property
    def accepted(self) -> int:
        """Number of clients whose updates count."""
        return int((self._column("weight") > 0).sum())

    def record(
        self,
        delta_norm: float,
        message_bytes: int,
        simulated_before: float = 0.0,
        epsilon: float | None = None,
        batch_sizes: IntArray | None = None,
    ) -> RoundRecord:
        """The round in numbers.

        Args:
            delta_norm: L2 norm of the aggregated pseudo-gradient.
            message_bytes: what one client receives.
            simulated_before: simulated seconds of all rounds before this one.
            epsilon: what differential privacy has cost so far; None without.
            batch_sizes: of the cohort, in asynchronous training on simulated hardware.
        """
        weights, norms, losses = self._column("weight"), self._column("norm"), self._column("loss")
        samples = self._column("samples")
        weights /= _sum(weights) or 1.0
        accepted = self._column("rejected") == 0
        known = accepted & ~np.isnan(losses)
        square = _sum(weights[accepted] * norms[accepted] ** 2) - delta_norm**2
        slowest = float(self._busy.max())
        return RoundRecord(
            round=self._plan.round,
            clients=self._plan.cohort,
            ranks=self._plan.ranks,
            weights=weights,
            samples=samples.astype(np.int64),
            local_steps=self._column("steps").astype(np.int64),
            losses=losses,
            delta_norms=norms,
            client_seconds=self._column("seconds"),
            rejected=self.rejected(),
            loss=_sum(losses[known] * samples[known]) / _sum(samples[known]) if known.any() else math.nan,
            delta_norm=delta_norm,
            drift=_ratio(math.sqrt(max(0.0, square)), delta_norm),
            upload_bytes=round(_sum(self._column("bytes"))),
            download_bytes=message_bytes * len(self._row),
            seconds=slowest,
            padding=max(0.0, 1.0 - _sum(self._column("steps")) / float(self._slots[0])) if self._slots[0] else 0.0,
            idle=1.0 - float(self._busy.mean()) / slowest if slowest > 0 else 0.0,
            simulated=self._simulated(simulated_before, batch_sizes),
            staleness=None if self._plan.arrived is None else self._plan.round - self._plan.arrived.versions,
            forward_flops=self._column("forward"),
            backward_flops=self._column("backward"),
            optimizer_flops=self._column("optimizer"),
            tokens=self._column("tokens"),
            side=tuple(self._side.tolist()),
            epsilon=epsilon,
        )

    def _simulated(self, before: float, batch_sizes: IntArray | None) -> SimulatedRound | None:
        if (arrived := self._plan.arrived) is not None:
            sizes = np.zeros(len(arrived.clients), dtype=np.int64) if batch_sizes is None else batch_sizes
            return SimulatedRound(arrived.time - before, arrived.time, sizes, arrived.durations, ())
        if self._plan.simulated is None:
            return None
        selection, chosen = self._plan.simulated
        seconds, dropped = selection.round_seconds, tuple(selection.dropped.tolist())
        return SimulatedRound(seconds, before + seconds, chosen, selection.seconds, dropped)

    def _column(self, name: str) -> FloatArray:
        return self._rows[:, _COLUMNS.index(name)].copy()


def _sum(values: FloatArray) -> float:
    # Not numpy's, which adds up in another order and so rounds differently.
    return float(torch.from_numpy(values).sum())


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return math.inf if part > 0 else 0.0
