"""Apply a rule to updates that are all available: for studies, tests and rules that wrap others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.types import ClientUpdate, Cohort


def aggregate(
    rule: Aggregator,
    rows: Tensor,
    num_samples: Sequence[int] | None = None,
    trainable: int | None = None,
    seed: int = 0,
    *,
    held: Sequence[int] | None = None,
) -> Tensor:
    """Aggregate these updates in one call; a rule with state acts as in the first round.

    Args:
        rule: the rule.
        rows: one update per client, (clients, elements); rows with NaN or infinite values are left out.
        num_samples: number of samples of each client; 1 each by default.
        trainable: number of a row's first elements that belong to trainable parameters; all by default.
        seed: seed of rules that draw random numbers.
        held: the old name of ``num_samples``, which goes after one release.

    Raises:
        TypeError, ValueError: if ``rows`` or ``num_samples`` have another type or shape.

    Example:
        >>> from lightning_fedscale.aggregators import mean, median
        >>> rows = torch.tensor([[1.0], [2.0], [600.0]])
        >>> aggregate(mean(), rows).tolist(), aggregate(median(), rows).tolist()
        ([201.0], [2.0])
    """
    if held is not None:
        warnings.warn("aggregate: held is num_samples now: use that.", DeprecationWarning, stacklevel=2)
        num_samples = held
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows={rows!r}: pass a tensor, (clients, elements), with one update per client.")
    if rows.dim() != 2:
        raise ValueError(f"rows={tuple(rows.shape)}: pass a tensor, (clients, elements), with one update per client.")
    clients, length = rows.shape
    num_samples = [1] * clients if num_samples is None else num_samples
    if len(num_samples) != clients or any(size < 0 for size in num_samples):
        raise ValueError(
            f"num_samples={num_samples!r}: pass a number of samples, at least 0, for each of the {clients} rows."
        )
    cohort = Cohort(0, np.arange(clients), clients, length if trainable is None else trainable, seed)
    updates = (
        ClientUpdate(client, row, norm_of(row, cohort), size, size, 1, torch.nan, 0.0)
        for client, (row, size) in enumerate(zip(rows.double(), num_samples, strict=True))
    )
    like = rows.new_zeros(length, dtype=torch.float64)
    return fold(rule, updates, like, cohort, rule.fresh_state(like, cohort))[0]


def fold(
    rule: Aggregator, updates: Iterable[ClientUpdate], like: Tensor, cohort: Cohort, state: Any = None
) -> tuple[Tensor, Any]:
    """Accumulate and finish, as a round on one rank does; zero and the same state if there is no update.

    Args:
        rule: the rule.
        updates: updates of the cohort's clients, in any order; those that are not finite are left out.
        like: a vector as long as an update.
        cohort: who takes part.
        state: of the rule, see `Aggregator.finish_with`.

    Returns:
        The aggregated delta, and the next state.
    """
    total, anybody = rule.init(like, cohort), False
    for update in updates:
        if update.finite:
            total, anybody = rule.accumulate(total, update, float(rule.weigh(update)), cohort), True
    return rule.finish_with(total, cohort, state) if anybody else (torch.zeros_like(like), state)


def norm_of(delta: Tensor, cohort: Cohort) -> float:
    """Return the ``ClientUpdate.norm`` of a delta: that of its trainable part, or NaN if any element is not finite."""
    if not bool(delta.isfinite().all()):
        return float("nan")
    return float(torch.linalg.vector_norm(delta[: cohort.trainable]))


def distances_to(center: Tensor, rows: Tensor) -> Tensor:
    """Return the Euclidean distance of each row to a point, without a second copy of the rows."""
    return torch.stack([torch.dist(row, center) for row in rows])


def needing(rule: Aggregator, clients: int, name: str) -> Aggregator:
    """Return the rule with a check that rejects cohorts of fewer clients.

    Raises:
        ValueError: from ``init``, if a cohort is too small; names the rule and the remedy.
    """
    return rule._replace(init=partial(_init_enough, rule=rule, clients=clients, name=name), needs=clients)


def _init_enough(like: Tensor, cohort: Cohort, *, rule: Aggregator, clients: int, name: str) -> Tensor:
    if 0 < len(cohort.clients) < clients:
        raise ValueError(
            f"aggregator={name}: it needs at least {clients} clients in a round, and round {cohort.round} has"
            f" {len(cohort.clients)}: raise clients_per_round, or lower its arguments."
        )
    return rule.init(like, cohort)
