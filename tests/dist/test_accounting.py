"""The ledger in one process and in two, never killed and killed by SIGKILL: the same."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import accounting, processes

DEATHS = (3, 14, 12, 5)  # batches into each stretch, of which ten are an epoch


@pytest.fixture(scope="module", params=[1, 2])
def ledgers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ranks, folder = request.param, tmp_path_factory.mktemp("accounting")
    deaths = {"never": [0], "often": [*DEATHS, 0]}
    for name in deaths:
        (folder / name).mkdir()
    runs = [("accounting.py", ranks, folder / name, ranks, death, "plain") for name in deaths for death in deaths[name]]
    for (*_, death, _), ended in zip(runs, processes.run_ranks(runs, folder), strict=True):
        for one in ended:
            assert one.code in ((-signal.SIGKILL, 1) if death else (0,)), one.output
    return [torch.load(folder / name / f"{rank}.pt", weights_only=True) for name in deaths for rank in range(ranks)]


def test_all_ledgers_are_those_of_a_count_by_hand(ledgers: list[dict[str, Any]]) -> None:
    first, second = 2 * 12 * 16, 2 * 16 * 4  # of a sample; nobody asks for the gradient of the inputs
    samples, parameters = accounting.SAMPLES * accounting.EPOCHS, 12 * 16 + 16 + 16 * 4 + 4
    updates = samples / accounting.BATCH / 2
    for ledger in ledgers:
        assert ledger["flops"]["forward"] == samples * (first + second)
        assert ledger["flops"]["backward"] == samples * (first + 2 * second)
        assert ledger["flops"]["evaluation"] == accounting.HELD_OUT * accounting.EPOCHS * (first + second)
        assert ledger["samples"] == ledger["tokens"] == samples
        assert ledger["updates"] == updates
        # SGD with momentum: v = m v + g, twice an operation, and p -= lr v; at first v is g.
        assert ledger["flops"]["optimizer"] == (updates * 3 - 2) * parameters
        assert 0 < ledger["counted"] < ledger["steps"]
        assert ledger == ledgers[0]


@pytest.mark.parametrize(("kind", "passes"), [("federated", 1), ("besides", 2)])
def test_clients_cost_the_same_on_any_number_of_ranks(kind: str, passes: int, tmp_path: Path) -> None:
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
    runs = [("accounting.py", ranks, tmp_path / str(ranks), ranks, 0, kind) for ranks in (1, 2)]
    for ended in processes.run_ranks(runs, tmp_path):
        processes.assert_well(ended)
    ledgers = [torch.load(tmp_path / of, weights_only=True) for of in ("1/0.pt", "2/0.pt", "2/1.pt")]
    # Validated after every round: what a round did not tell the other ranks, the end does.
    samples = accounting.HELD_OUT * accounting.EPOCHS
    assert ledgers[0]["flops"]["evaluation"] == samples * (2 * 12 * 16 + 2 * 16 * 4)
    first, second, trained = 2 * 12 * 16, 2 * 16 * 4, accounting.SAMPLES * accounting.EPOCHS
    assert ledgers[0]["flops"]["forward"] == passes * trained * (first + second)
    assert ledgers[0]["flops"]["backward"] == passes * trained * (first + 2 * second)
    assert ledgers[0]["clients"]["ids"] == [0, 1, 2, 3, 4]
    assert ledgers[1] == ledgers[2]
    # Each rank counts the first steps of its own.
    assert {**ledgers[0], "counted": 0} == {**ledgers[1], "counted": 0}
