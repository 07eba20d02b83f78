"""Accumulators with one row per client, for rules that need all updates at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.types import ClientUpdate, Cohort


class Stack(NamedTuple):
    """The updates of a round's clients, without those that are not finite.

    Attributes:
        deltas: one row per client, float64, (clients, elements).
        weights: weight of each client, before normalisation.
        places: position of each client in the cohort.
        trainable: number of a row's first elements that belong to trainable parameters.
    """

    deltas: Tensor
    weights: Tensor
    places: list[int]
    trainable: int


Read: TypeAlias = Callable[[Stack, Cohort], Tensor]
ReadWithState: TypeAlias = Callable[[Stack, Cohort, Any], tuple[Tensor, Any]]


def stacked(
    weigh: Callable[[ClientUpdate], float],
    read: Read | ReadWithState,
    init_state: Callable[[Tensor, Cohort], Any] | None = None,
) -> Aggregator:
    """Return an aggregator from a function of all updates.

    Every rank then stores one float64 copy of the model for each client of the round.

    Args:
        weigh: weight of a client, above 0.
        read: ``(stack, cohort)``: the aggregated delta, as long as a row. With ``init_state`` it is
            ``(stack, cohort, state)``, and returns the delta and the next state.
        init_state: ``(like, cohort)``: the state before the first round, see `Aggregator`; None keeps nothing.

    Example:
        >>> import numpy as np
        >>> first = stacked(lambda update: 1.0, lambda stack, cohort: stack.deltas[0])
        >>> cohort = Cohort(0, np.array([3, 8]), num_clients=9, trainable=1, seed=0)
        >>> total = first.init(torch.zeros(1, dtype=torch.float64), cohort)
        >>> update = ClientUpdate(8, torch.tensor([5.0], dtype=torch.float64), 5.0, 1, 1, 1, 0.0, 0.0)
        >>> first.finish(first.accumulate(total, update, 1.0, cohort), cohort).tolist()
        [5.0]
    """
    return Aggregator(weigh, _init, _accumulate, partial(_finish, read=read), sees_all=True, init_state=init_state)


def _init(like: Tensor, cohort: Cohort) -> Tensor:
    # The last element of a row is the client's weight; it is zero if the client sent no update.
    return torch.zeros(len(cohort.clients) * (like.numel() + 1), dtype=like.dtype, device=like.device)


def _accumulate(total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort) -> Tensor:
    row = total.view(len(cohort.clients), -1)[cohort.place(update.client)]
    for elements, part in update.parts():
        row[:-1][elements].copy_(part)
    row[-1] = weight
    return total


def _finish(total: Tensor, cohort: Cohort, *state: Any, read: Callable[..., Any]) -> Any:
    rows = total.view(len(cohort.clients), -1)
    places: list[int] = (rows[:, -1] > 0).nonzero().flatten().tolist()
    sent = rows if len(places) == len(rows) else rows[places]
    return read(Stack(sent[:, :-1], sent[:, -1], places, cohort.trainable), cohort, *state)
