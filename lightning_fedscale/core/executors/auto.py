"""The choice of the executor: the requested one, or the faster of the two."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.core.executors.round_context import RoundContext
from lightning_fedscale.core.executors.sequential import SequentialExecutor
from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.types import ClientUpdate

Kind = Literal["sequential", "vectorized"]

# Longer steps, in seconds, gain too little from being vectorized.
_LONGEST_STEP = 0.5
# Vectorized steps must be this many times as fast, so that clear cases are decided alike in every run.
_MARGIN = 1.25
_TRIAL_STEPS = 3


class ExecutorTiming(NamedTuple):
    """The measurements of a rank in a round; all ranks decide by the sum over ranks.

    Attributes:
        compared: 1 if the rank compared the two executors.
        able: 1 if its clients can be vectorized.
        sequential: seconds per local batch of the sequential executor.
        vectorized: seconds per local batch of the vectorized executor.
    """

    compared: float = 0.0
    able: float = 0.0
    sequential: float = 0.0
    vectorized: float = 0.0


class ExecutorChoice:
    """Runs rounds with the sequential or the vectorized executor.

    ``"auto"`` times both in the first round: it runs the first steps of a wave vectorized, discards these trial steps,
    and trains the round's clients sequentially. All later rounds use the faster executor, the same on every rank.

    Args:
        wanted: the strategy's argument.
        sequential: the sequential executor.
        vectorized: the vectorized executor.
    """

    def __init__(
        self, wanted: Literal["auto"] | Kind, sequential: SequentialExecutor, vectorized: VectorizedExecutor
    ) -> None:
        self._wanted = wanted
        self._sequential = sequential
        self._vectorized = vectorized
        self.kind: Kind | None = None if wanted == "auto" else wanted
        self.timing = ExecutorTiming()
        self.slots = 0

    def order(self, work: Sequence[LocalWork]) -> Iterator[tuple[int, int]] | None:
        """Return the batches in the order of use, as (number in ``work``, number of the batch); None if sequential."""
        return self._vectorized.order(work) if self.kind == "vectorized" else None

    @property
    def draws_from_globals(self) -> bool:
        """Whether clients draw from the process-wide generators rather than from their own streams."""
        return self.kind != "vectorized"

    def run(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the clients of this rank and yield their updates; the module holds the global weights on return.

        ``slots`` is then the number of local steps for which there was room.
        """
        self.timing, self.slots = ExecutorTiming(), sum(len(work.batches) for work in context.work)
        compare = self.kind is None and context.training and len(context.work) > 1
        if compare:
            self.timing = self._time_vectorized(context)
            context = context._replace(timed=self.timing.able > 0)
            times: list[float] = []
            for update in self._sequential.run(context):
                if update.steps:
                    times.append(update.seconds / update.steps)
                yield update
            # Without a batch nothing was timed, and the next round decides.
            self.timing = self.timing._replace(sequential=statistics.median(times)) if times else ExecutorTiming()
        elif self.kind != "vectorized":
            yield from self._sequential.run(context)
        elif not context.training:
            yield from self._vectorized.run_sequentially(context.restarted(None))
        else:
            yield from self._vectorized.run(context)
            self.slots = self._vectorized.slots
            if (reason := self._vectorized.reason) is not None:
                self.kind = "sequential"
                rank_zero_warn(
                    f"executor={self._wanted!r}: clients train sequentially from now on, with the same results, since"
                    f" they cannot be vectorized: {reason}."
                )

    def run_again(self, context: RoundContext) -> Iterator[ClientUpdate]:
        """Train the same clients once more in this round; keep the measurements of `run`."""
        vectorized = self.kind == "vectorized"
        context = context.restarted(self._vectorized.order(context.work) if vectorized else None)
        # If the round began vectorized, nobody kept the global generators.
        yield from (self._vectorized.run if vectorized else self._vectorized.run_sequentially)(context)

    def scaler_state(self) -> tuple[float, float]:
        """See `SequentialExecutor.scaler_state`."""
        return self._sequential.scaler_state()

    def set_scaler_state(self, scale: float, growth: float) -> None:
        """See `SequentialExecutor.set_scaler_state`."""
        self._sequential.set_scaler_state(scale, growth)

    def close(self) -> None:
        """Release resources at the end of the run; see `VectorizedExecutor.close`."""
        self._vectorized.close()

    def close_round(self) -> None:
        """See `SequentialExecutor.close_round`."""
        self._sequential.close_round()

    def rewind_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `SequentialExecutor.rewind_checkpoint`."""
        self._sequential.rewind_checkpoint(checkpoint)

    @property
    def gave_up(self) -> bool:
        """Whether clients train sequentially because they cannot be vectorized as requested."""
        return self._wanted == "vectorized" and self.kind == "sequential"

    def resume(self, kind: Kind | None, *, gave_up: bool) -> None:
        """Restore the choice made before the run was interrupted, so that results are bit-identical."""
        if self.kind is None:
            self.kind = kind
        elif self._wanted == "vectorized" and gave_up:
            self.kind = "sequential"

    def choose(self, timings: ExecutorTiming) -> None:
        """Choose the executor, given the sum of all ranks' timings."""
        if self.kind is not None or not timings.compared:
            return
        if timings.able < timings.compared:
            self.kind = "sequential"
            why = self._vectorized.reason or "the clients of another rank cannot be vectorized"
            rank_zero_info(f"Executor: 'sequential' is chosen: {why}.")
            return
        gain = timings.sequential / timings.vectorized
        self.kind = "vectorized" if gain > _MARGIN else "sequential"
        sequential, vectorized = (seconds / timings.compared * 1e3 for seconds in timings[2:])
        rank_zero_info(
            f"Executor: {self.kind!r} is chosen; a local batch took {sequential:.3g} ms sequentially and"
            f" {vectorized:.3g} ms vectorized ({gain:.2f} times as fast)."
        )

    def _time_vectorized(self, context: RoundContext) -> ExecutorTiming:
        seconds = self._vectorized.seconds_per_step(context, _TRIAL_STEPS, _LONGEST_STEP)
        return ExecutorTiming(1.0) if seconds is None else ExecutorTiming(1.0, 1.0, 0.0, seconds)
