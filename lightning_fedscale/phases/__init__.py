"""Detect critical phases of training from gradient norms, and scale updates outside of them.

Training is in a critical phase while its gradients change quickly. In such a phase the direction of single updates
matters, and errors cannot be repaired later (Achille et al., arXiv 1711.08856; for federated learning Yan et al., AAAI
2022). Outside of it, updates of large batches may be scaled up (Tyagi, arXiv 2509.10537). The detectors and scale rules
here are pure functions of numbers; `lightning_fedscale.callbacks.CriticalPhase` applies them.
"""

from lightning_fedscale.phases.detectors import (
    Decision,
    Detector,
    Observation,
    State,
    accordion,
    federated_gradient_norm,
    fisher_trace,
    page_hinkley,
    relative_change,
)
from lightning_fedscale.phases.registry import DETECTORS, detector_by_name
from lightning_fedscale.phases.run_length import alarm_limit, run_length_of
from lightning_fedscale.phases.scale_rules import (
    Phase,
    ScaleRule,
    adascale,
    capped,
    check_rule,
    linear_ramp,
    reads_noise,
    step,
)

__all__ = [
    "DETECTORS",
    "Decision",
    "Detector",
    "Observation",
    "Phase",
    "ScaleRule",
    "State",
    "accordion",
    "adascale",
    "alarm_limit",
    "capped",
    "check_rule",
    "detector_by_name",
    "federated_gradient_norm",
    "fisher_trace",
    "linear_ramp",
    "page_hinkley",
    "reads_noise",
    "relative_change",
    "run_length_of",
    "step",
]
