"""The decisions of `CriticalPhase`: whether training is critical, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.callbacks.critical_phase.history import PhaseRecord
from lightning_fedscale.callbacks.critical_phase.options import PhaseOptions
from lightning_fedscale.phases import Decision, Observation
from lightning_fedscale.phases.tracker import PhaseTracker


class PhaseJudge:
    """Judges steps or rounds, and keeps the history of the decisions.

    A round is judged before the server steps and may still fail; its decision becomes final once the Trainer has
    counted the round, and until then the state for a checkpoint is that from its beginning.

    Args:
        options: the arguments of `CriticalPhase`.

    Attributes:
        options: the same.
        tracker: the phase and the noise of gradients.
        record: history of norms and decisions.
    """

    def __init__(self, options: PhaseOptions) -> None:
        self.options = options
        self.tracker = PhaseTracker(options.detector, options.rule)
        self.record = PhaseRecord()
        self._norm = math.nan
        self._round: _OpenRound | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_round": None}

    @property
    def critical(self) -> bool:
        """Whether training is in a critical phase."""
        return self.tracker.phase.critical

    @property
    def scale(self) -> float:
        """Current factor of updates."""
        return self.tracker.scale if self.options.action == "scale" else 1.0

    @property
    def adds_noise(self) -> bool:
        """Whether noise is currently added."""
        return self.options.action == "noise" and (self.options.noise_in == "all" or self.critical)

    def begin_round(self, trainer: pl.Trainer, watch: dict[str, Any]) -> None:
        """Open a round that is about to be judged.

        Args:
            trainer: the Trainer.
            watch: the present state of the object that watches rounds.
        """
        self._round = _OpenRound(trainer, trainer.global_step, self._state(watch))

    def drop_round(self) -> None:
        """Discard a round that did not complete."""
        self._round = None

    def judge(self, at: int, norm: float, decisions: list[Decision]) -> None:
        """Record the detectors' decisions on a step or round.

        Args:
            at: its number.
            norm: L2 norm of its gradient.
            decisions: one decision, or those for several clients or optimizers.
        """
        self._norm = norm
        self.tracker.decide(decisions)
        decision = self.tracker.decision
        row = (at, norm, decision.statistic, decision.threshold, self.scale, decision.critical)
        if self._round is None:
            self.record.add(*row)
        else:
            self._round.row = row

    def observe(self, at: int, observation: Observation) -> None:
        """Judge a step or round by one observation."""
        norm = math.sqrt(math.fsum(n * n for n in observation.layer_norms))
        self.judge(at, norm, [self.tracker.detect(observation)])

    def finish_round(self) -> None:
        """Make the judgement of a round final, if the Trainer has counted it."""
        if self._round is not None and self._round.trainer.global_step > self._round.number:
            if self._round.row is not None:
                self.record.add(*self._round.row)
            self._round = None

    def metrics(self) -> dict[str, float]:
        """Return the logged numbers, without unknown ones."""
        norm = {"phase/grad_norm": self._norm} if math.isfinite(self._norm) else {}
        return {**self.tracker.metrics(), "phase/scale": self.scale, **norm}

    def state_dict(self, watch: dict[str, Any]) -> dict[str, Any]:
        """Return the state for an exact resume; within a round, the state from its beginning."""
        self.finish_round()
        state = self._state(watch) if self._round is None else self._round.before
        return {**state, "record": self.record.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.tracker.load_state_dict(state["keeper"])
        self.record.load_state_dict(state["record"])
        self._norm = state["norm"]

    def _state(self, watch: dict[str, Any]) -> dict[str, Any]:
        return {"keeper": self.tracker.state_dict(), "watch": watch, "norm": self._norm}


@dataclass
class _OpenRound:
    """A round that was judged and may still fail."""

    trainer: pl.Trainer
    number: int
    before: dict[str, Any]
    row: tuple[int, float, float, float, float, bool] | None = None
