"""The interface of an aggregator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils.factory_repr import Arguments

Finish: TypeAlias = Callable[[Tensor, Cohort], Tensor]
FinishWithState: TypeAlias = Callable[[Tensor, Cohort, Any], tuple[Tensor, Any]]


class Aggregator(NamedTuple):
    """A rule in four pure functions over one float64 vector that ranks add up.

    Every rank folds its own clients into an accumulator; the accumulators of all ranks are summed by the round's one
    collective; ``finish`` reads the aggregate off the sum. So a rule is right on any number of ranks as soon as its
    accumulator is additive. A rule that must see all updates at once gives each client its own place in it (see
    `lightning_fedscale.aggregators.stacked`), which other ranks leave zero.

    Of nobody there is no aggregate: in a round in which no client's update counts, ``finish`` is not called, and the
    aggregated delta is zero under any rule. The server optimizer sees that zero as it sees any other delta.

    **Buffers.** A delta has ``cohort.trainable`` elements of trainable parameters, then those of averaged buffers and
    frozen parameters. Take norms and distances over the first part only: a counter may be longer than all weights.
    Return the whole: the server optimizer moves along the first part, and buffers are the server's minus the second
    one, so a rule gives some mean of the clients' there. What ``FederatedStrategy(buffers=...)`` keeps with clients or
    with the server, or takes from the largest client, never comes here.

    **State.** All four functions are pure: what one of them notes down elsewhere (a closure, an attribute) is in no
    checkpoint, and a run that is resumed would differ. What a rule keeps from round to round is the ``state`` that
    ``init_state`` makes and ``finish`` returns: tensors, numbers and strings, in dicts, lists and tuples. It is saved
    in checkpoints, restored on any number of ranks and made afresh by every ``fit``. All ranks compute the same one,
    since they read it off the same sum. A round that fails, or in which no update counts, leaves it as it was.

    Attributes:
        weigh: weight of a client, before normalisation: handed to ``accumulate`` and reported in
            ``RoundRecord.weights``.
        init: ``(like, cohort)``: a zero accumulator, one float64 vector, for deltas as long as ``like``.
        accumulate: ``(total, update, weight, cohort)``: add one client with its weight; may work in place and returns
            the accumulator. Clients whose update is not finite never come here.
        finish: ``(total, cohort)``: the aggregated delta, as long as the clients' ones; may work in place, the sum is
            not needed any more. Of a rule with ``init_state`` it is ``(total, cohort, state)``, and returns the delta
            and the next state.
        sees_all: whether it looks at all updates at once, to bear hostile ones; their sum alone would not do.
        call: how it was made, such as ``trimmed_mean(trim=0.2)``; for logs only.
        hides_clients: whether the server learns nothing but the sum, and so takes no buffer of a single client.
        needs: fewest clients of a round with which it bears what it promises. Where fewer are sampled, nobody trains.
        init_state: ``(like, cohort)``: the state before the first round; None keeps nothing between rounds.
        arguments: those of ``call`` by name; for logs only.

    Example:
        A change to a rule that there is:

        >>> from lightning_fedscale.aggregators import aggregate, mean
        >>> by_root = mean()._replace(weigh=lambda update: update.num_samples**0.5)  # large clients count less

        A rule from scratch, the mean of the updates' directions; the last element counts the clients:

        >>> import torch
        >>> def init(like, cohort):
        ...     return torch.zeros(len(like) + 1, dtype=like.dtype, device=like.device)
        >>> def accumulate(total, update, weight, cohort):
        ...     delta = update.delta.clone()  # others may look at what the client sent
        ...     delta[:cohort.trainable] /= max(update.norm, 1e-12)  # of the trainable part; buffers stay
        ...     total[:-1] += weight * delta
        ...     total[-1] += weight
        ...     return total
        >>> def finish(total, cohort):
        ...     return total[:-1] / total[-1]
        >>> directions = Aggregator(lambda update: 1.0, init, accumulate, finish)
        >>> rows = torch.tensor([[3.0, 4.0, 10.0], [0.0, 100.0, 20.0]])  # two parameters and a buffer
        >>> aggregate(directions, rows, trainable=2).tolist()
        [0.3, 0.9, 15.0]

        The same with a state: half of the step is that of the round before.

        >>> def init_state(like, cohort):
        ...     return torch.zeros_like(like[:cohort.trainable])
        >>> def finish_slowly(total, cohort, state):
        ...     delta = finish(total, cohort)
        ...     delta[:cohort.trainable] = 0.5 * state + 0.5 * delta[:cohort.trainable]
        ...     return delta, delta[:cohort.trainable]
        >>> slow = directions._replace(finish=finish_slowly, init_state=init_state)
        >>> aggregate(slow, rows, trainable=2).tolist()  # as in a first round
        [0.15, 0.45, 15.0]
    """

    weigh: Callable[[ClientUpdate], float]
    init: Callable[[Tensor, Cohort], Tensor]
    accumulate: Callable[[Tensor, ClientUpdate, float, Cohort], Tensor]
    finish: Finish | FinishWithState
    sees_all: bool = False
    call: str = ""
    hides_clients: bool = False
    needs: int = 0
    init_state: Callable[[Tensor, Cohort], Any] | None = None
    arguments: Mapping[str, Any] = Arguments()

    @property
    def kept(self) -> str | None:
        """What a rule with state is called; None for a rule that keeps nothing between rounds."""
        return None if self.init_state is None else self.call or "a custom rule"

    def fresh_state(self, like: Tensor, cohort: Cohort) -> Any:
        """Return the state before the first round, for deltas as long as ``like``; None without ``init_state``."""
        return None if self.init_state is None else self.init_state(like, cohort)

    def finish_with(self, total: Tensor, cohort: Cohort, state: Any) -> tuple[Tensor, Any]:
        """Call ``finish`` of a rule with or without state.

        Args:
            total: the accumulator over all ranks; used up.
            cohort: who takes part.
            state: what the round before left; ignored by a rule without state.

        Returns:
            The aggregated delta, and the next state.

        Raises:
            TypeError: if ``finish`` returns something else.
        """
        if self.init_state is not None:
            answer: Any = cast(FinishWithState, self.finish)(total, cohort, state)
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor)):
                raise TypeError(
                    f"aggregator: finish returned {type(answer).__name__}: return a tuple (delta, state), since it has"
                    " an init_state."
                )
            return answer
        delta: Any = cast(Finish, self.finish)(total, cohort)
        if not isinstance(delta, Tensor):
            raise TypeError(
                f"aggregator: finish returned {type(delta).__name__}: return the delta, a tensor. To keep a state"
                " between rounds, pass init_state=... to Aggregator."
            )
        return delta, state
