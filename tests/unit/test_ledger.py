"""Sums of what was spent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lightning_fedscale.scaling.ledger import PURPOSES, Ledger

amounts = st.fixed_dictionaries(
    {name: st.integers(0, 2**40).map(float) for name in (*PURPOSES, "samples", "tokens", "size", "seconds", "updates")}
)


def filled(spent: list[dict[str, Any]]) -> Ledger:
    ledger = Ledger()
    for each in spent:
        ledger.add(**each)
        ledger.add_clients([(int(each["size"]) % 3, each["forward"] + each["backward"])])
    return ledger


@given(st.lists(amounts, max_size=8), st.integers(0, 8))
def test_however_it_is_divided_among_ranks_the_sum_is_the_same(spent: list[dict[str, Any]], cut: int) -> None:
    whole, first, second = filled(spent), filled(spent[:cut]), filled(spent[cut:])
    first.add_numbers(second.numbers())
    assert first.flops == whole.flops
    assert first.tokens == whole.tokens
    assert sum(whole.clients.values()) == whole.training_flops
    assert abs(first.size_tokens - whole.size_tokens) <= 1e-12 * whole.size_tokens


@given(st.lists(amounts, max_size=8), st.integers(0, 8))
def test_saved_and_loaded_it_goes_on(spent: list[dict[str, Any]], cut: int) -> None:
    resumed = Ledger()
    resumed.load_state_dict(json.loads(json.dumps(filled(spent[:cut]).state_dict())))
    for each in spent[cut:]:
        resumed.add(**each)
        resumed.add_clients([(int(each["size"]) % 3, each["forward"] + each["backward"])])
    assert resumed.state_dict() == filled(spent).state_dict()


def test_sizes_are_averaged_over_tokens() -> None:
    ledger = Ledger()
    ledger.add(tokens=1e9, size=4e8)
    ledger.add(tokens=3e9, size=2e8)
    assert ledger.average_params == 2.5e8
    assert ledger.joules is None
    ledger.add(energy=0.0, meters=1.0)
    assert ledger.joules == 0.0


def test_a_ledger_of_an_older_checkpoint_goes_on() -> None:
    old = {name: value for name, value in Ledger().state_dict().items() if name not in ("steps", "counted", "error")}
    ledger = Ledger()
    ledger.load_state_dict({**old, "tokens": 5.0})
    assert (ledger.tokens, ledger.steps, ledger.counted, ledger.error) == (5.0, 0.0, 0.0, 0.0)
