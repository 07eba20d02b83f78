"""Names of parametrized cases that are the same in every process; pytest-xdist compares them."""

from __future__ import annotations

import re


def stable(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
