"""Messages, word for word: this is the one test that a better sentence changes."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from tests import wording

ROOMS = [each.name for each in pkgutil.iter_modules(wording.__path__)]
ROWS = [
    pytest.param(row, id=f"{room}-{place}")
    for room in ROOMS
    for place, row in enumerate(importlib.import_module(f"tests.wording.{room}").ROWS)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_a_message_says(row: wording.Row) -> None:
    if issubclass(row.kind, Warning):
        with pytest.warns(row.kind) as found:
            row.call()
        assert row.message in [str(each.message) for each in found]
        return
    with pytest.raises(row.kind) as raised:
        row.call()
    assert type(raised.value) is row.kind
    assert str(raised.value) == row.message
