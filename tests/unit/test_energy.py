"""Energy counters as Linux and NVIDIA's library show them, made here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_fedscale.callbacks.compute_accounting.energy import EnergyMeter


def zone(folder: Path, name: str, kind: str, microjoules: int) -> Path:
    made = folder / name
    made.mkdir()
    (made / "name").write_text(f"{kind}\n")
    (made / "max_energy_range_uj").write_text("10000000\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made / "energy_uj"


def test_packages_add_up_and_begin_anew(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    for name, kind in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, name, kind, 5).write_text("7000000")
    meter = EnergyMeter(None, processor=True, powercap=tmp_path)
    first.write_text("9500000")
    second.write_text("250000")
    assert meter.read() == pytest.approx(0.75)
    first.write_text("500000")  # past its range
    assert meter.read() == pytest.approx(1.0)
    assert meter.read() == 0.0


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    assert EnergyMeter(None, processor=True, powercap=tmp_path / "absent").read() is None
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    counter.unlink()
    counter.mkdir()  # cannot be read, as without privileges
    assert EnergyMeter(None, processor=True, powercap=tmp_path).read() is None
    assert EnergyMeter(None, processor=False, powercap=tmp_path).read() is None


def test_devices_tell_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([5000, 6500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(spent),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert EnergyMeter("GPU-1", processor=False).read() == pytest.approx(1.5)


def test_a_driver_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    assert EnergyMeter("GPU-1", processor=False).read() is None
