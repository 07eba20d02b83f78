"""The arguments of `CriticalPhase`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fedscale.phases import Detector, ScaleRule, check_rule, detector_by_name, reads_noise, step
from lightning_fedscale.utils import checks


@dataclass
class PhaseOptions:
    """Arguments of `CriticalPhase`, with the detector and the scale rule as objects."""

    detector: Detector
    rule: ScaleRule
    action: str
    level: str
    target_batch: float | None
    noise: str | None
    noise_in: str
    scale_weight_decay: bool
    every_n_steps: int
    noise_every: int | None
    seed: int

    @property
    def needs_sampling_noise(self) -> str | None:
        """The part that needs the noise of single samples without clients, in words; None if none does."""
        if self.detector.needs == "fisher_trace":
            return "detector 'fisher_trace'"
        return "the scale rule" if self.action == "scale" and reads_noise(self.rule) else None


def option(name: str) -> Any:
    """Return a property of `CriticalPhase` that reads and sets one of its options."""

    def get(phase: Any) -> Any:
        return getattr(phase._options, name)

    def set_to(phase: Any, value: Any) -> None:
        setattr(phase._options, name, value)

    return property(get, set_to)


def checked_options(
    detector: str | Detector,
    threshold: float | None,
    scale: float | ScaleRule,
    action: str,
    level: str,
    target_batch: float | None,
    noise: str | None,
    noise_in: str,
    scale_weight_decay: bool,
    every_n_steps: int,
    noise_every: int | None,
    seed: int,
) -> PhaseOptions:
    """Return the arguments of `CriticalPhase`.

    Raises:
        TypeError, ValueError: for an invalid argument.
    """
    checks.one_of("action", action, ("observe", "scale", "noise"))
    checks.one_of("level", level, ("round", "step"))
    checks.one_of("noise_in", noise_in, ("critical", "all"))
    if noise not in ("reweighting", "diagonal", None):
        raise ValueError(f"noise={noise!r}: pass one of 'reweighting', 'diagonal', or None.")
    if action == "noise" and target_batch is None:
        raise ValueError(
            "target_batch=None: action='noise' needs it: pass the number of samples whose noise is wanted."
        )
    if action != "noise" and target_batch is not None:
        raise ValueError(
            f"target_batch={target_batch!r}: action={action!r} adds no noise: leave it out, or pass action='noise'."
        )
    if target_batch is not None and not (isinstance(target_batch, (int, float)) and target_batch > 0):
        raise ValueError(f"target_batch={target_batch!r}: pass a number of samples above 0.")
    if not isinstance(detector, (str, Detector)):
        raise TypeError(
            f"detector={detector!r}: pass a name, or a Detector from a function of lightning_fedscale.phases."
        )
    if threshold is not None and isinstance(detector, Detector):
        raise ValueError(
            f"threshold={threshold!r}: it applies to a detector given by name: pass it to the function that makes the"
            " Detector."
        )
    rule = scale if callable(scale) else step(scale)
    check_rule(rule)
    return PhaseOptions(
        detector_by_name(detector, threshold) if isinstance(detector, str) else detector,
        rule, action, level, target_batch, noise, noise_in, scale_weight_decay,
        checks.integer("every_n_steps", every_n_steps),
        None if noise_every is None else checks.integer("noise_every", noise_every),
        checks.integer("seed", seed, 0),
    )  # fmt: skip
