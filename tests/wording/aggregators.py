"""Messages of `aggregators`."""

from __future__ import annotations

from lightning_fedscale import aggregators
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: aggregators.trimmed_mean(0.7),
        ValueError,
        "trim=0.7: pass a share of the clients in [0, 0.5), cut off at each end, or an int.",
    ),
]
