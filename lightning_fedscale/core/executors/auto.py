"""The choice of the executor: the requested one, or the one that should be faster."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.core.executors.round_context import RoundContext
from lightning_fedscale.core.executors.sequential import SequentialExecutor
from lightning_fedscale.core.executors.step_model import Forecast
from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.types import ClientUpdate

Kind = Literal["sequential", "vectorized"]

# Vectorized steps must be predicted to be this many times as fast.
_MARGIN = 1.25
# Measured times contradict the choice if the other executor is this many times as fast.
_FAR = 1.5
_CONFIRMING_ROUNDS = 5


class ExecutorTiming(NamedTuple):
    """What a rank predicts and measures in the first round; all ranks decide by the sum over ranks.

    Attributes:
        compared: 1 if the rank compared the two executors.
        able: 1 if its clients can be vectorized.
        sequential: predicted seconds of a sequential local batch.
        vectorized: predicted seconds of a vectorized local batch.
        measured: seconds that sequential local batches took.
        trial: seconds that vectorized local batches took in a dry run; not less than they would take in training.
    """

    compared: float = 0.0
    able: float = 0.0
    sequential: float = 0.0
    vectorized: float = 0.0
    measured: float = 0.0
    trial: float = 0.0


class ExecutorChoice:
    """Runs rounds with the sequential or the vectorized executor.

    ``"auto"`` trains the first round's clients sequentially, and predicts the times of both executors from the
    operators of a local batch, see `StepModel`. All later rounds use the executor that should be faster, the same on
    every rank and in every run. Measured times decide nothing; a warning says if they contradict the choice.

    Args:
        wanted: the strategy's argument.
        sequential: the sequential executor.
        vectorized: the vectorized executor.

    Attributes:
        kind: the executor of all further rounds; None before it is chosen.
        reason: why it is this one.
        timing: what this rank predicted and measured in the last round.
        slots: the number of local steps for which there was room in the last round.
    """

    def __init__(
        self, wanted: Literal["auto"] | Kind, sequential: SequentialExecutor, vectorized: VectorizedExecutor
    ) -> None:
        self._wanted = wanted
        self._sequential = sequential
        self._vectorized = vectorized
        self._forecast: Forecast | None = None
        self._sequential_seconds = 0.0  # of a local batch in the first round, while vectorized ones are measured
        self._vectorized_seconds: list[float] = []
        self.kind: Kind | None = None if wanted == "auto" else wanted
        self.reason = "the executor is named"
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
            timing = self._predict(context)
            context = context._replace(timed=timing.able > 0)
            times: list[float] = []
            for update in self._sequential.run(context):
                if update.steps:
                    times.append(update.seconds / update.steps)
                yield update
            # The first client's steps take longer than later ones. Without a batch the next round decides.
            if times:
                self.timing = timing._replace(measured=statistics.median(times[1:] or times))
        elif self.kind != "vectorized":
            yield from self._sequential.run(context)
        elif not context.training:
            yield from self._vectorized.run_sequentially(context.restarted(None))
        else:
            times = []
            for update in self._vectorized.run(context):
                if update.steps:
                    times.append(update.seconds / update.steps)
                yield update
            self._confirm(times)
            self.slots = self._vectorized.slots
            if (reason := self._vectorized.reason) is not None:
                self.kind = "sequential"
                self._vectorized.close()
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

    @property
    def kept_width(self) -> int | None:
        """See `VectorizedExecutor`."""
        return self._vectorized.kept_width

    def resume(self, kind: Kind | None, *, gave_up: bool, width: int | None = None) -> None:
        """Restore the choice made before the run was interrupted, so that results are bit-identical."""
        self._vectorized.kept_width = width
        if self.kind is None and kind is not None:
            self.kind, self.reason = kind, "it was chosen before the run was interrupted"
        elif self._wanted == "vectorized" and gave_up:
            self.kind = "sequential"

    @property
    def chosen(self) -> tuple[str, str] | None:
        """The executor of all further rounds, and why it is this one; None before it is chosen."""
        return None if self.kind is None else (self.kind, self.reason)

    def choose(self, timings: ExecutorTiming) -> None:
        """Choose the executor, given the sum of all ranks' timings."""
        if self.kind is not None or not timings.compared:
            return
        if timings.able < timings.compared:
            self.kind = "sequential"
            self.reason = self._vectorized.reason or "the clients of another rank are not to be vectorized"
        else:
            gain = timings.sequential / timings.vectorized
            self.kind = "vectorized" if gain > _MARGIN else "sequential"
            self.reason = f"vectorized steps should be {gain:.2f} times as fast as sequential ones"
            self._sequential_seconds = timings.measured / timings.compared
        if self.kind == "sequential":
            self._vectorized.close()
        rank_zero_info(f"Executor: {self.kind!r} is chosen: {self.reason}{self._details()}.")
        if self.kind == "sequential" and timings.trial and timings.measured > _FAR * timings.trial:
            self._warn("vectorized", timings.measured / timings.compared, timings.trial / timings.compared)

    def _predict(self, context: RoundContext) -> ExecutorTiming:
        self._forecast = forecast = self._vectorized.forecast(context, _MARGIN)
        self._vectorized.release_wave()  # this round's clients train sequentially, and need the memory
        if forecast is None:
            return ExecutorTiming(1.0)
        return ExecutorTiming(1.0, 1.0, forecast.sequential, forecast.vectorized, trial=forecast.trial)

    def _details(self) -> str:
        if (forecast := self._forecast) is None:
            return ""
        captured = "" if forecast.captured else ", which cannot be captured"
        return (
            f" ({forecast.model.described()}, {forecast.clients:.3g} clients a vectorized step{captured};"
            f" {forecast.model.machine.source})"
        )

    def _confirm(self, times: list[float]) -> None:
        """Compare the times of the first vectorized rounds with that of the first round, which was sequential."""
        if not self._sequential_seconds or not times:
            return
        self._vectorized_seconds.append(statistics.median(times))
        if len(self._vectorized_seconds) < _CONFIRMING_ROUNDS:
            return
        sequential, vectorized = self._sequential_seconds, min(self._vectorized_seconds)
        self._sequential_seconds = 0.0
        if vectorized > _FAR * sequential:
            self._warn("sequential", sequential, vectorized)

    def _warn(self, faster: Kind, sequential: float, vectorized: float) -> None:
        rank_zero_warn(
            f"executor='auto': {self.kind!r} was chosen, but a local batch took {sequential * 1e3:.3g} ms sequentially"
            f" and {vectorized * 1e3:.3g} ms vectorized. The choice stays, so that a seed gives the same results in"
            f" every run; pass executor={faster!r} to train faster."
        )
