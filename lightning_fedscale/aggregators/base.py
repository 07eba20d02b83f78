"""The interface of an aggregator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_fedscale.types import ClientUpdate, Cohort


class Aggregator(NamedTuple):
    """A rule in four pure functions over one float64 vector that ranks add up.

    Every rank folds its own clients into an accumulator; the accumulators of all ranks are summed by the round's one
    collective; ``finish`` reads the aggregate off the sum. So a rule is right on any number of ranks as soon as its
    accumulator is additive. A rule that must see all updates at once gives each client a place of its own in it (see
    `lightning_fedscale.aggregators.stacked`), which other ranks leave zero.

    Of nobody there is no aggregate: in a round in which no client's update counts, ``finish`` is not called, and the
    aggregated delta is zero under any rule. The server optimizer sees that zero as it sees any other delta.

    Attributes:
        weigh: weight of a client, before normalisation: handed to ``accumulate`` and reported in
            ``RoundRecord.weights``.
        init: ``(like, cohort)``: a zero accumulator, one float64 vector, for deltas as long as ``like``.
        accumulate: ``(total, update, weight, cohort)``: add one client with its weight; may work in place and returns
            the accumulator. Clients whose update is not finite never come here.
        finish: ``(total, cohort)``: the aggregated delta, as long as the clients' ones; may work in place, the sum is
            not needed any more.
        sees_all: whether it looks at all updates at once, to bear hostile ones; their sum alone would not do.
        call: how it was made, such as ``trimmed_mean(trim=0.2)``; for logs only.
        hides_clients: whether the server learns nothing but the sum, and so takes no buffer of a single client.
        needs: fewest clients of a round with which it bears what it promises. Where fewer are sampled, nobody trains.

    Example:
        >>> from lightning_fedscale.aggregators import mean
        >>> by_root = mean()._replace(weigh=lambda update: update.held**0.5)  # large clients count, but not so much
    """

    weigh: Callable[[ClientUpdate], float]
    init: Callable[[Tensor, Cohort], Tensor]
    accumulate: Callable[[Tensor, ClientUpdate, float, Cohort], Tensor]
    finish: Callable[[Tensor, Cohort], Tensor]
    sees_all: bool = False
    call: str = ""
    hides_clients: bool = False
    needs: int = 0
