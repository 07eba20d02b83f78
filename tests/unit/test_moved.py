"""Names of modules from before 0.1.0, which are kept for one release."""

from __future__ import annotations

import pickle
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_fedscale
from lightning_fedscale.core.client_state.states import StateStore
from lightning_fedscale.devices.fleet import ClientWorkload
from lightning_fedscale.utils.moved import MOVED
from tests.unit.test_imports import files

PACKAGE = "lightning_fedscale"
ENTRIES = 22


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_it_has_become(old: str) -> None:
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"{PACKAGE}.{MOVED[old]} now"):
        found = import_module(f"{PACKAGE}.{old}")
    assert found is import_module(f"{PACKAGE}.{MOVED[old]}")


def test_an_old_name_hides_no_module_that_there_is() -> None:
    there = {name.removesuffix(".__init__") for name in files()}
    assert not there & set(MOVED)


def test_what_was_pickled_before_is_read() -> None:
    """A checkpoint names classes by their modules."""
    old = pickle.dumps(StateStore, 0).replace(b"core.client_state.states", b"clients.states")
    sys.modules.pop(f"{PACKAGE}.clients.states", None)
    with pytest.warns(DeprecationWarning, match=r"clients\.states is"):
        assert pickle.loads(old) is StateStore


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("phases.noise", "Look", "NoiseEstimate"),
        ("phases.noise", "look_at_halves", "estimate_from_half_batches"),
        ("phases.noise", "look_at_members", "estimate_from_members"),
        ("phases.noise", "MOST_LOOKS", "MAX_ESTIMATES"),
        ("phases.tracker", "PhaseKeeper", "PhaseTracker"),
        ("server.asynchrony", "Arrivals", "AsyncSimulation"),
        ("server.asynchrony", "Flush", "BufferedRound"),
        ("devices.fleet", "Duty", "ClientWorkload"),
        ("callbacks.client_metrics.module_copy", "ValidationTwin", "ValidationCopy"),
        ("callbacks.compute_accounting.flop_meter", "Tally", "callbacks.compute_accounting.client_costs.ClientTally"),
        ("callbacks.compute_accounting.report", "ComputeCurves", "callbacks.compute_accounting.curves.ComputeCurves"),
        ("utils.checks", "whole", "integer"),
        ("scaling.base", "Spread", "ConstantsCovariance"),
        ("scaling.made_for", "Given", "scaling.partition_id.PartitionId"),
        ("scaling.made_for", "partition_given", "scaling.partition_id.partition_id"),
        ("scaling.made_for", "mixed", "scaling.selection.mixed_settings"),
        ("scaling.made_for", "only", "scaling.selection.select"),
        ("scaling.tuning", "NOT_TOLD", "NOT_RECORDED"),
        ("devices.profiling.batches", "Form", "BatchSignature"),
        ("devices.profiling.batches", "form_of", "signature_of"),
        ("devices.profiling.dry_run", "Rehearsal", "DryRun"),
        ("devices.profiling.dry_run", "Rehearsed", "DryRunResult"),
        ("core.options.algorithm_options", "Rules", "AlgorithmOptions"),
        ("utils.factory_repr", "told", "record_call"),
    ],
)
def test_a_renamed_class_or_function_is_found_by_its_old_name(module: str, old: str, new: str) -> None:
    found = import_module(f"{PACKAGE}.{module}")
    home, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{old} is called {'' if home == '' else f'{PACKAGE}.'}{new} now"):
        assert getattr(found, old) is getattr(import_module(f"{PACKAGE}.{home or module}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        found.nothing  # noqa: B018


@pytest.mark.parametrize(
    "old",
    ["core.client_state.ownership", "core.lightning.half_batches", "core.round.run_settings", "core.round.sums"],
)
def test_a_module_that_was_renamed_within_a_room_has_its_old_name(old: str) -> None:
    assert old in MOVED


def test_the_work_of_clients_is_made_and_read_by_the_old_name_of_a_field() -> None:
    new = ClientWorkload(5, 2.0, 8, 16, model_bytes=100, update_bytes=50)
    with pytest.warns(DeprecationWarning, match="message_bytes is model_bytes now"):
        old = ClientWorkload(5, 2.0, 8, 16, message_bytes=100, update_bytes=50)  # type: ignore[call-arg]
    assert old == new
    with pytest.warns(DeprecationWarning, match="message_bytes is model_bytes now"):
        assert old.message_bytes == 100  # type: ignore[attr-defined]


def test_the_front_door_is_narrow() -> None:
    folder = Path(lightning_fedscale.__file__).parent
    # A folder that holds nothing but compiled files is what a move left behind on this machine.
    entries = {
        path.name
        for path in folder.iterdir()
        if path.is_file() or any(each.suffix != ".pyc" for each in path.rglob("*") if each.is_file())
    }
    assert len(entries) <= ENTRIES, f"{len(entries)} entries: put a new module into a room, or make one"
