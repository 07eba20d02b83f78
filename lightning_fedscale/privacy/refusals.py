"""What does not go together with privacy, each with its reason."""

from __future__ import annotations

import numpy as np
import torch

from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.types import ClientUpdate, Cohort


def refusals(aggregator: Aggregator, *, private: bool, secure: bool, buffers: bool) -> list[str]:
    """Why an aggregator cannot be used with differential privacy or secure aggregation; empty if it can.

    Args:
        aggregator: the rule as the user gave it.
        private: whether clients are to be differentially private (`dp_fed_avg`).
        secure: whether updates are to be hidden from the server.
        buffers: whether clients exchange buffers, as BatchNorm's.

    Example:
        >>> from lightning_fedscale.aggregators import krum, mean
        >>> refusals(mean("uniform"), private=True, secure=True, buffers=False)
        []
        >>> refusals(krum(1), private=False, secure=True, buffers=False)
        ['the aggregator must see single updates, which secure aggregation hides: use mean("uniform")']
    """
    found = []
    if secure and sees_single_updates(aggregator):
        found.append('the aggregator must see single updates, which secure aggregation hides: use mean("uniform")')
    if private and sees_single_updates(aggregator):
        found.append(
            "the aggregator must see single updates, but noise is made for their sum, from which alone privacy follows:"
            ' use mean("uniform")'
        )
    if private and _weigh(aggregator, 1) != _weigh(aggregator, 1000):
        found.append(
            "the aggregator weighs clients by their samples, so that a large one counts beyond the clip norm: use"
            ' mean("uniform"), or dp_fed_avg(weight_cap=...) for weights of at most 1'
        )
    if private and buffers:
        found.append(
            "clients exchange buffers (BatchNorm's statistics), which are neither clipped nor hidden by noise: use"
            " GroupNorm or LayerNorm"
        )
    return found


def sees_single_updates(aggregator: Aggregator) -> bool:
    """Whether a rule keeps the round's updates apart: its accumulator then grows by a delta for every client.

    Example:
        >>> from lightning_fedscale.aggregators import mean, median
        >>> sees_single_updates(mean()), sees_single_updates(median())
        (False, True)
    """
    # Cohorts large enough for any rule; one flag a client is no update.
    longs, clients = (100, 200), (1000, 2000)
    grown = [
        aggregator.init(torch.zeros(long), Cohort(0, np.arange(many), many, long, 0)).numel()
        for long in longs
        for many in clients
    ]
    return grown[3] - grown[2] > grown[1] - grown[0]


def _weigh(aggregator: Aggregator, held: int) -> float:
    update = ClientUpdate(0, torch.zeros(1, dtype=torch.float64), 0.0, held, held, 1, 0.0, 0.0)
    return float(aggregator.weigh(update))
