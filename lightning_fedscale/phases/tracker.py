"""Track the phase of training and the scale that follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_fedscale.phases import Decision, Detector, Observation, Phase, ScaleRule, State
from lightning_fedscale.phases.noise import (
    MAX_ESTIMATES,
    UNKNOWN,
    NoiseEstimate,
    NoiseScale,
    estimate_from_members,
    noise_scale,
)
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"PhaseKeeper": "PhaseTracker"})


def joined(decisions: Sequence[Decision]) -> Decision:
    """Join several decisions into one: critical if any of them is, with the highest statistic."""
    known = [decision for decision in decisions if not math.isnan(decision.statistic)]
    shown = max(known or decisions, key=lambda decision: decision.statistic)
    return shown._replace(critical=any(decision.critical for decision in decisions))


class PhaseTracker:
    """Update detector, scale rule and noise scale with every observation.

    Args:
        detector: detects critical phases.
        rule: returns the factor of updates.

    Attributes:
        decision: the last decision; critical before the first.
        phase: the phase of training.
        scale: the rule's factor for updates.
        sampling: noise of single samples, from the two halves of batches.
        members: noise of whole clients, from their updates; unknown without clients.

    Example:
        >>> from lightning_fedscale.phases import relative_change, step
        >>> tracker = PhaseTracker(relative_change(window=1), step(2.0))
        >>> for norm in (1.0, 1.0):
        ...     tracker.decide([tracker.detect(Observation([norm]))])
        >>> tracker.phase, tracker.scale
        (Phase(critical=False, quiet=1, noise_scale=nan), 2.0)
    """

    def __init__(self, detector: Detector, rule: ScaleRule) -> None:
        self._detector = detector
        self._rule = rule
        self._states: dict[int, State] = {}
        self._quiet = 0
        self._estimates: dict[str, list[NoiseEstimate]] = {"sampling": [], "members": []}
        self.decision = Decision(True, math.nan, math.nan)
        self.sampling = self.members = UNKNOWN

    @property
    def phase(self) -> Phase:
        """The phase of training."""
        return Phase(self.decision.critical, self._quiet, self.noise.scale)

    @property
    def noise(self) -> NoiseScale:
        """Noise of clients' updates if there are clients, else of single samples."""
        return self.members if self.members.estimates else self.sampling

    @property
    def scale(self) -> float:
        """The rule's factor for updates."""
        return float(self._rule(self.phase))

    def detect(self, observation: Observation, sequence: int = -1) -> Decision:
        """Run the detector, which has one state for each watched sequence, such as a client or an optimizer."""
        state = self._states.get(sequence)
        decision, self._states[sequence] = self._detector.update(
            self._detector.init() if state is None else state, observation
        )
        return decision

    def decide(self, decisions: list[Decision]) -> None:
        """Set the phase from the decisions for each sequence."""
        self.decision = joined(decisions)
        self._quiet = 0 if self.decision.critical else self._quiet + 1

    def add_estimate(self, kind: str, estimate: NoiseEstimate) -> None:
        """Add an estimate of gradient noise; ``kind`` is "sampling" or "members"."""
        estimates = self._estimates[kind]
        estimates.append(estimate)
        del estimates[:-MAX_ESTIMATES]
        setattr(self, kind, noise_scale(estimates))

    def estimate_from_updates(self, record: RoundRecord) -> None:
        """Estimate the noise of clients from a round's updates, at no cost; this needs two or more updates."""
        used = record.weights > 0
        if used.sum() > 1:
            squares, samples = record.delta_norms[used] ** 2, record.samples[used].astype(np.float64)
            self.add_estimate(
                "members", estimate_from_members(squares, record.weights[used], record.delta_norm**2, samples)
            )

    def metrics(self) -> dict[str, float]:
        """Return the logged numbers, without unknown ones."""
        noise = self.noise
        values = {
            "phase/critical": float(self.decision.critical),
            f"phase/{self._detector.statistic}": self.decision.statistic,
            "phase/threshold": self.decision.threshold,
            "phase/noise_scale": noise.scale,
            "phase/noise_scale_low": noise.low if noise.estimates else math.nan,
            "phase/noise_scale_high": noise.high,
            "phase/critical_batch": self.sampling.critical_batch,
            "phase/critical_cohort": self.members.critical_cohort,
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as tensors and primitives only."""
        return {
            "states": [[sequence, state] for sequence, state in self._states.items()],
            "quiet": self._quiet,
            "decision": list(self.decision),
            "looks": {kind: [list(each) for each in estimates] for kind, estimates in self._estimates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self._states = dict(state["states"])
        self._quiet = state["quiet"]
        self.decision = Decision(*state["decision"])
        for kind, estimates in state["looks"].items():
            self._estimates[kind] = [NoiseEstimate(*each) for each in estimates]
            setattr(self, kind, noise_scale(self._estimates[kind]) if estimates else UNKNOWN)
