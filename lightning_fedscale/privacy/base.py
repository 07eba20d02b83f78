"""The shape of a rule that keeps clients private."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_fedscale.types import ClientUpdate, Cohort


class Privacy(NamedTuple):
    """Clipping, noise and accounting of differential privacy for clients.

    Attributes:
        init: state before the first round.
        weigh: weight of a client, at most 1.
        clip: ``(delta, state) -> within``: bounds the trainable part of an update in place.
        finish: ``(total, within, state, cohort, expected, generator) -> (delta, state)``.
        epsilon: ``(rounds, rate) -> epsilon``.
    """

    init: Callable[[], Any]
    weigh: Callable[[ClientUpdate], float]
    clip: Callable[[Tensor, Any], bool]
    finish: Callable[[Tensor, float, Any, Cohort, float, np.random.Generator], tuple[Tensor, Any]]
    epsilon: Callable[[int, float], float]
