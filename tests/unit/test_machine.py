"""The constants of a machine: measured once, kept whole or not at all, and never measured anew in a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_fedscale.core.executors import machine
from lightning_fedscale.core.executors.machine import BUILT_IN, Machine, cache_folder, machine_of, measured
from tests import clock as clocks

CPU = torch.device("cpu")
FIRST, SECOND = Machine(1 / 3e6, 1 / 7e12, 1 / 9e10), Machine(2e-6, 2e-12, 2e-11)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_fedscale"


def measures(monkeypatch: pytest.MonkeyPatch, *machines: Machine) -> list[torch.device]:
    """Each measurement finds the next of these; returns the devices measured."""
    left, asked = list(machines), list[torch.device]()

    def measure(device: torch.device) -> Machine:
        asked.append(device)
        return left.pop(0)

    monkeypatch.setattr(machine, "measured", measure)
    return asked


def seconds(found: Machine) -> tuple[float, float, float]:
    return found.launch, found.flop, found.byte


def test_constants_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measures(monkeypatch, FIRST, SECOND)
    found = [machine_of(CPU) for _ in range(3)]
    assert asked == [CPU]
    assert [seconds(each) for each in found] == [seconds(FIRST)] * 3  # to the last bit, from a file
    (path,) = folder.iterdir()
    assert str(path) in found[0].source
    kept = json.loads(path.read_text())
    assert kept["machine"]["threads"] == 1
    assert kept["machine"]["torch"] == torch.__version__


def test_another_number_of_threads_is_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch, FIRST, SECOND)
    assert seconds(machine_of(CPU)) == seconds(FIRST)
    torch.set_num_threads(2)
    assert seconds(machine_of(CPU)) == seconds(SECOND)
    torch.set_num_threads(1)
    assert seconds(machine_of(CPU)) == seconds(FIRST)
    assert len(list(folder.iterdir())) == 2


def test_of_two_processes_that_measure_the_first_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process measures, another one finishes."""

    def slowly(device: torch.device) -> Machine:
        monkeypatch.setattr(machine, "measured", lambda device: FIRST)
        machine_of(device)
        return SECOND

    monkeypatch.setattr(machine, "measured", slowly)
    assert seconds(machine_of(CPU)) == seconds(FIRST)


def broken(path: Path) -> None:
    path.write_text('{"machine": {"ver')


def of_another_machine(path: Path) -> None:
    kept = json.loads(path.read_text())
    kept["machine"]["processor"] = "another one"
    path.write_text(json.dumps(kept))


def with_impossible_times(path: Path) -> None:
    kept = json.loads(path.read_text())
    kept["seconds"]["flop"] = 0
    path.write_text(json.dumps(kept))


def without_times(path: Path) -> None:
    path.write_text('{"machine": {}}')


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [broken, of_another_machine, with_impossible_times, without_times, a_folder])
def test_a_spoilt_file_leaves_the_built_in_constants(
    spoil: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measures(monkeypatch, FIRST)
    machine_of(CPU)
    (path,) = folder.iterdir()
    spoil(path)
    for _ in range(2):
        found = machine_of(CPU)
        assert seconds(found) == seconds(BUILT_IN["cpu"])
        assert path.name in found.source
    assert len(asked) == 1, "measured anew, runs would choose differently"


def test_without_a_place_to_keep_them_nothing_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measures(monkeypatch)
    folder.parent.write_text("a file where the folder of caches should be")
    found = machine_of(CPU)
    assert seconds(found) == seconds(BUILT_IN["cpu"])
    assert "built-in" in found.source
    assert not asked


def test_a_user_without_a_home_has_the_built_in_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    asked = measures(monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert seconds(machine_of(CPU)) == seconds(BUILT_IN["cpu"])
    assert not asked


def test_a_file_system_without_links_has_the_built_in_constants(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError("not supported")

    measures(monkeypatch, FIRST)
    monkeypatch.setattr(os, "link", no_link)
    assert seconds(machine_of(CPU)) == seconds(BUILT_IN["cpu"])
    assert list(folder.iterdir()) == []


def test_nothing_is_left_behind_when_measuring_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch)
    with pytest.raises(IndexError):
        machine_of(CPU)
    assert list(folder.iterdir()) == []


def test_measuring_draws_no_random_numbers_and_leaves_the_modes_alone(clock: clocks.Clock) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        found = measured(CPU)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert seconds(found) == pytest.approx((clock.tick / 62, clock.tick / 2**25, clock.tick / (3 * 2**20)))


def test_the_folder_is_in_the_users_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    at_home = Path.home() / ".cache" / "lightning_fedscale"
    assert cache_folder() == at_home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == at_home, "constants must not depend on the working directory"


def test_a_device_that_nobody_waits_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work would end after the clock has stopped."""
    asked = measures(monkeypatch)
    found = machine_of(torch.device("mps"))
    assert seconds(found) == seconds(BUILT_IN["cuda"])
    assert found.overlaps
    assert "'mps'" in found.source
    assert not asked


def test_calls_and_work_overlap_on_a_device() -> None:
    one = Machine(1.0, 0.5, 0.25)
    assert one.seconds(2, 4, 8) == 2 + 2 + 2
    assert one._replace(overlaps=True).seconds(2, 4, 8) == 4
