"""Energy from this machine's counters: NVML for NVIDIA devices, RAPL for processors; None if neither can be read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Measures joules since the last reading.

    A device's counter covers all processes on it, and that of a processor's package covers everything that runs on it:
    the energy is that of the hardware during the run, not of the run alone.

    Args:
        device: UUID of the CUDA device ("GPU-..."), None without one.
        processor: whether to read processors too; one process per machine does.
        powercap: folder in which Linux exposes RAPL.

    Example:
        >>> EnergyMeter(device=None, processor=False).read() is None
        True
    """

    def __init__(self, device: str | None, processor: bool, powercap: Path = POWERCAP) -> None:
        self._counters: list[_Counter] = []
        if device is not None and (read := _nvml(device)) is not None:
            self._add(_Counter(read, 1e-3))
        for zone in sorted(powercap.glob("*-rapl:*")) if processor else ():
            with suppress(OSError, ValueError):
                # Other zones are parts of a package, or the whole platform.
                if (zone / "name").read_text().startswith("package"):
                    span = int((zone / "max_energy_range_uj").read_text())
                    self._add(_Counter(_reader(zone / "energy_uj"), 1e-6, span))

    def read(self) -> float | None:
        """Return the joules since the last reading or the creation of the meter; None if nothing can be read."""
        spent = [found for counter in self._counters if (found := counter.spent()) is not None]
        return sum(spent) if spent else None

    def _add(self, counter: _Counter) -> None:
        if counter.spent() is not None:
            self._counters.append(counter)


class _Counter:
    """A counter that only grows, and wraps around at its maximum."""

    def __init__(self, read: Callable[[], int], unit: float, span: int = 0) -> None:
        self._read, self._unit, self._span = read, unit, span
        self._last: int | None = None

    def spent(self) -> float | None:
        try:
            now = self._read()
        except Exception:  # a driver may raise any error
            return None
        before, self._last = self._last, now
        if before is None:
            return 0.0
        return (now - before + (self._span if now < before else 0)) * self._unit


def _reader(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text())


def _nvml(device: str) -> Callable[[], int] | None:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(device)
    except Exception:  # the package or the driver may be missing
        return None
    return lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
