"""The numbers of a round's clients, one row for each client."""

from __future__ import annotations

import math

import torch

from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.types import ClientCost, ClientUpdate, Cursor, FloatArray, IntArray

_COLUMNS = (
    "weight", "samples", "steps", "loss", "norm", "seconds", "rejected", "pass", "batch", "scale", "growth",
    *ClientCost._fields, "bytes", "normalizer", "within",
)  # fmt: skip


class ClientRows:
    """A row for each client of the cohort; a rank fills the rows of the clients that it trains.

    Args:
        plan: the round's plan.
        cells: where the numbers lie, `size_of` of them; zeros.
    """

    def __init__(self, plan: RoundPlan, cells: FloatArray) -> None:
        self._cohort = plan.cohort
        self._ranks = plan.ranks
        self._row = {client: row for row, client in enumerate(plan.cohort.tolist())}
        self._rows = cells.reshape(-1, len(_COLUMNS))

    @staticmethod
    def size_of(plan: RoundPlan) -> int:
        """Return how many numbers the clients of a round take."""
        return len(plan.cohort) * len(_COLUMNS)

    def __len__(self) -> int:
        """Return the number of clients in the round, accepted or not."""
        return len(self._row)

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
            cursor: where it resumes in its data.
            scaler: scale and growth counter that its training left in the gradient scaler.
            cost: the cost of its training.
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

    def add_cost(self, client: int, cost: ClientCost) -> None:
        """Add the cost of more training of a client, which saw the same tokens again."""
        row = self._rows[self._row[client]]
        for name in ("forward", "backward", "optimizer"):
            row[_COLUMNS.index(name)] += getattr(cost, name)

    def cursors(self) -> dict[int, Cursor]:
        """Return where each client of the cohort resumes in its data."""
        pairs = zip(self.column("pass").tolist(), self.column("batch").tolist(), strict=True)
        return {client: (int(p), int(b)) for client, (p, b) in zip(self._row, pairs, strict=True)}

    def rejected(self) -> tuple[int, ...]:
        """Return the clients that are left out, see `RoundRecord.rejected`."""
        return tuple(self._cohort[self.column("rejected") > 0].tolist())

    def without_batches(self) -> tuple[int, ...]:
        """Return the clients that are left out because all of their batches were None."""
        return tuple(self._cohort[(self.column("rejected") > 0) & (self.column("steps") == 0)].tolist())

    def rank_of_largest(self, num_samples: IntArray) -> int | None:
        """Return the rank of the client with the most samples among the accepted ones; None if there is none.

        Args:
            num_samples: number of samples of each client of the round.
        """
        counts = ((self.column("rejected") == 0) & (self.column("steps") > 0)).nonzero()[0]
        if not len(counts):
            return None
        place = counts[num_samples[counts].argmax()]  # of equal ones the first, which has the lowest number
        return int(self._ranks[place])

    def smallest_scale(self) -> tuple[float, float]:
        """Return the smallest scale, which is too large for no client, and its growth counter; else zeros."""
        if not len(scale := self.column("scale")):
            return 0.0, 0.0
        return float(scale.min()), float(self.column("growth")[scale == scale.min()].min())

    def mean_square(self) -> float:
        """Return the weighted mean of the accepted clients' squared norms."""
        accepted, weights = self.column("rejected") == 0, self.column("weight")
        return in_order(weights[accepted] * self.column("norm")[accepted] ** 2) / (in_order(weights) or 1.0)

    def normalizer(self) -> float:
        """Return the weighted mean of the accepted clients' normalizers."""
        accepted, weights = self.column("rejected") == 0, self.column("weight")
        return in_order((weights * self.column("normalizer"))[accepted]) / in_order(weights)

    def within(self) -> float:
        """Return the number of clients that privacy did not clip."""
        return in_order(self.column("within"))

    @property
    def accepted(self) -> int:
        """Number of clients whose updates count."""
        return int((self.column("weight") > 0).sum())

    def column(self, name: str) -> FloatArray:
        """Return a copy of one column: a number of each client."""
        return self._rows[:, _COLUMNS.index(name)].copy()


def in_order(values: FloatArray) -> float:
    """Return the sum, rounded as torch does; numpy adds up in another order."""
    return float(torch.from_numpy(values).sum())
