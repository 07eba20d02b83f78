"""The sums over the clients of a round and over ranks, in the round's one collective."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils import collectives


class RoundAccumulator:
    """The aggregator's accumulator, and the sum of the local rule's messages if it has any.

    With several ranks, both are views of one buffer, in which they and the table are summed over ranks.

    Args:
        algorithm: the aggregator, and the local rule.
        like: a vector as long as an update, which is not written to.
        cohort: who takes part.
        table: the round in numbers.
        world_size: number of ranks.
    """

    def __init__(
        self, algorithm: AlgorithmOptions, like: Tensor, cohort: Cohort, table: RoundTable, world_size: int
    ) -> None:
        self._aggregator = algorithm.aggregator
        self._cohort = cohort
        self._table = table
        self._total = self._aggregator.init(like, cohort) if len(cohort.clients) else like.new_zeros(0)
        self._messages: Tensor | None = None
        self._joint: collectives.JointBuffer | None = None
        if algorithm.local_rule is not None and algorithm.local_rule.sends_message:
            self._messages = torch.zeros_like(like[: cohort.trainable])
        if world_size > 1:
            length = len(self._total)
            both = self._total if self._messages is None else torch.cat([self._total, self._messages])
            self._joint = collectives.JointBuffer(both, table.size)
            self._total = self._joint.vector[:length]
            if self._messages is not None:
                self._messages = self._joint.vector[length:]

    def add(self, update: ClientUpdate, weight: float, message: Tensor | None) -> None:
        """Add a client's finite update and its message."""
        self._total = self._aggregator.accumulate(self._total, update, weight, self._cohort)
        if self._messages is not None and message is not None:
            self._messages.add_(message)

    def merge(self) -> tuple[Tensor, Tensor | None]:
        """Add up all ranks, including the table; return accumulator and messages."""
        if self._joint is None:
            return self._total, self._messages
        length, vector = len(self._total), self._joint.vector
        # An aggregator may have returned a new vector.
        if self._total.data_ptr() != vector.data_ptr():
            vector[:length].copy_(self._total)
        vector, numbers = self._joint.sum_over_ranks(vector, self._table.pack())
        self._table.unpack(numbers)
        return vector[:length], None if self._messages is None else vector[length:]
