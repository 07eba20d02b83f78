"""Which executor trains the clients: the one that was asked for, or the one that proves faster."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.core.executors.sequential import RoundContext, SequentialExecutor
from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.types import ClientUpdate

Kind = Literal["sequential", "vectorized"]

# Steps that take longer are too large to gain from being taken together.
_LONGEST_STEP = 0.5
# Side by side must be so many times as fast: a clear case is decided alike in every run.
_MARGIN = 1.25
_REHEARSED_STEPS = 3


class Ballot(NamedTuple):
    """What a rank found out in a round; the sum over ranks makes all of them decide alike.

    Attributes:
        votes: 1 if it compared the two executors.
        able: 1 if its clients can train side by side.
        sequential: seconds per local batch, one client after the other.
        vectorized: seconds per local batch, side by side.
    """

    votes: float = 0.0
    able: float = 0.0
    sequential: float = 0.0
    vectorized: float = 0.0


class ExecutorChoice:
    """Runs rounds with one executor or the other.

    ``"auto"`` measures both in the first round: it rehearses the first steps of a wave side by side, forgets them, and
    trains the round's clients one after the other. From then on the faster one trains, the same on every rank.

    Args:
        wanted: the strategy's argument.
        sequential: one client after the other.
        vectorized: side by side.
    """

    def __init__(
        self, wanted: Literal["auto"] | Kind, sequential: SequentialExecutor, vectorized: VectorizedExecutor
    ) -> None:
        self._wanted = wanted
        self._sequential = sequential
        self._vectorized = vectorized
        self.kind: Kind | None = None if wanted == "auto" else wanted
        self.ballot = Ballot()
        self.slots = 0

    def order(self, work: Sequence[LocalWork]) -> Iterator[tuple[int, int]] | None:
        """The batches as they are needed, as (number in ``work``, number of the batch); None for client by client."""
        return self._vectorized.order(work) if self.kind == "vectorized" else None

    @property
    def draws_from_globals(self) -> bool:
        """Whether clients draw from the process-wide generators, rather than from streams of their own."""
        return self.kind != "vectorized"

    def run(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the clients of this rank and yield their updates; the module holds the global weights on return.

        ``slots`` then says how many local steps there was room for.
        """
        self.ballot, self.slots = Ballot(), sum(len(work.batches) for work in context.work)
        compare = self.kind is None and context.training and len(context.work) > 1
        if compare:
            self.ballot = self._rehearse(context)
            context = context._replace(timed=self.ballot.able > 0)
            times: list[float] = []
            for update in self._sequential.run(context):
                if update.steps:
                    times.append(update.seconds / update.steps)
                yield update
            # Clients without a batch say nothing: then the next round decides.
            self.ballot = self.ballot._replace(sequential=statistics.median(times)) if times else Ballot()
        elif self.kind != "vectorized":
            yield from self._sequential.run(context)
        elif not context.training:
            yield from self._vectorized.one_by_one(context.restarted(None))
        else:
            yield from self._vectorized.run(context)
            self.slots = self._vectorized.slots
            if (obstacle := self._vectorized.obstacle) is not None:
                self.kind = "sequential"
                rank_zero_warn(
                    f"executor={self._wanted!r}: clients train one after the other from now on, with the same results,"
                    f" since side by side they cannot: {obstacle}."
                )

    def run_again(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the same clients once more in this round; what `run` found out stays."""
        vectorized = self.kind == "vectorized"
        context = context.restarted(self._vectorized.order(context.work) if vectorized else None)
        # The round may have begun side by side, when nobody kept the global generators.
        yield from (self._vectorized.run if vectorized else self._vectorized.one_by_one)(context)

    def scaler_state(self) -> tuple[float, float]:
        """See `SequentialExecutor.scaler_state`."""
        return self._sequential.scaler_state()

    def set_scaler_state(self, scale: float, growth: float) -> None:
        """See `SequentialExecutor.set_scaler_state`."""
        self._sequential.set_scaler_state(scale, growth)

    def close(self) -> None:
        """The run is over; see `VectorizedExecutor.close`."""
        self._vectorized.close()

    def close_round(self) -> None:
        """See `SequentialExecutor.close_round`."""
        self._sequential.close_round()

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `SequentialExecutor.rewind_checkpoint`."""
        self._sequential.rewind_checkpoint(checkpoint)

    @property
    def gave_up(self) -> bool:
        """Whether clients that were to train side by side train one after the other, since they cannot."""
        return self._wanted == "vectorized" and self.kind == "sequential"

    def resume(self, kind: Kind | None, *, gave_up: bool) -> None:
        """Go on with what was found out before the run was interrupted, which decides about the bits."""
        if self.kind is None:
            self.kind = kind
        elif self._wanted == "vectorized" and gave_up:
            self.kind = "sequential"

    def settle(self, ballots: Ballot) -> None:
        """Decide, given the sum of all ranks' ballots."""
        if self.kind is not None or not ballots.votes:
            return
        if ballots.able < ballots.votes:
            self.kind = "sequential"
            why = self._vectorized.obstacle or "their clients on another rank cannot"
            rank_zero_info(f"Executor: clients train one after the other, since side by side they cannot: {why}.")
            return
        gain = ballots.sequential / ballots.vectorized
        self.kind = "vectorized" if gain > _MARGIN else "sequential"
        rank_zero_info(
            f"Executor: clients train {'side by side' if self.kind == 'vectorized' else 'one after the other'};"
            f" a local batch took {ballots.sequential / ballots.votes * 1e3:.3g} ms one after the other and"
            f" {ballots.vectorized / ballots.votes * 1e3:.3g} ms side by side ({gain:.2f} times as fast)."
        )

    def _rehearse(self, context: RoundContext) -> Ballot:
        seconds = self._vectorized.seconds_per_step(context, _REHEARSED_STEPS, _LONGEST_STEP)
        return Ballot(1.0) if seconds is None else Ballot(1.0, 1.0, 0.0, seconds)
