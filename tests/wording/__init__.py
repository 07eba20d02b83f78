"""What messages say, word for word: one file a room, whose `ROWS` are read by `tests/unit/test_wording.py`.

Other tests ask for the class of an exception and for the name of the argument: a sentence is improved in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """A call, and the exception (or the class of warning) with the whole message that it gives."""

    call: Callable[[], object]
    kind: type[Exception]
    message: str
