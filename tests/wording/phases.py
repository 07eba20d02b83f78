"""Messages of `phases`."""

from __future__ import annotations

import numpy as np

from lightning_fedscale import phases
from lightning_fedscale.phases import Phase, noise
from tests.wording import Row


class _Negative:
    """A rule that returns no positive number."""

    def __call__(self, phase: Phase) -> float:
        return -1.0

    def __repr__(self) -> str:
        return "negative"


ROWS: list[Row] = [
    Row(lambda: phases.relative_change(alpha=1.0), ValueError, "alpha=1.0: pass a number in [0, 1)."),
    Row(
        lambda: phases.page_hinkley(false_alarms=500),
        ValueError,
        "false_alarms=500: pass at most 66 in 1,000 observations.",
    ),
    Row(
        lambda: phases.adascale(64, 128),
        ValueError,
        "reference=128: pass at most batch=64, the samples of one update.",
    ),
    Row(
        lambda: phases.detector_by_name("page-hinkley"),
        ValueError,
        "detector='page-hinkley' is not known. Did you mean 'page_hinkley'? Known: 'relative_change', 'accordion',"
        " 'page_hinkley', 'federated_gradient_norm', 'fisher_trace'.",
    ),
    Row(
        lambda: phases.detector_by_name("page_hinkley", 500),
        ValueError,
        "threshold=500 of detector='page_hinkley': false_alarms=500: pass at most 66 in 1,000 observations.",
    ),
    Row(
        lambda: phases.check_rule(_Negative()),
        ValueError,
        "scale=negative: it returns -1.0 for Phase(critical=True, quiet=0, noise_scale=nan): pass a number above 0, or"
        " a function that returns one for a Phase, such as lightning_fedscale.phases.step(2.0).",
    ),
    Row(
        lambda: noise.estimate_from_members(np.ones(1), np.ones(1), 1.0, np.ones(1)),
        ValueError,
        "weights=array([1.]): pass at least two weights above 0, since noise is the difference of gradients.",
    ),
    Row(
        lambda: noise.reweighting_strength(np.ones(1), 8, 4),
        ValueError,
        "weights=array([1.]): pass at least two weights above 0, since reweighting changes their proportion.",
    ),
    Row(
        lambda: noise.reweighting_strength(np.full(2, 0.5), 8, 16),
        ValueError,
        "target_batch=16: pass a number of samples above 0 and at most 8, the batch size.",
    ),
    Row(lambda: noise.noise_scale([], decay=0), ValueError, "decay=0: pass a number in (0, 1]."),
    Row(lambda: noise.noise_scale([], confidence=95), ValueError, "confidence=95: pass a number in (0, 1)."),
]
