"""Messages of `local_rules`."""

from __future__ import annotations

from lightning_fedscale.local_rules import Ditto, scaffold
from lightning_fedscale.local_rules.schedules import in_stages
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: in_stages({5: 1}),
        ValueError,
        "stages={5: 1}: the first stage begins with round 0, as in in_stages({0: 1, 10: 4}).",
    ),
    Row(lambda: Ditto(-1.0), ValueError, "strength=-1.0: pass a number of at least 0, such as 0.1."),
    Row(lambda: scaffold("III"), ValueError, "option='III': pass one of 'I', 'II'."),
]
