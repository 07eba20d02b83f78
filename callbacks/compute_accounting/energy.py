"""Energy that this machine's counters tell: NVIDIA devices by NVML, processors by RAPL; nothing where neither reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was last read.

    A device's counter tells what all processes on it take together, and a processor's package that of its whole
    machine: the figure is that of the hardware while the run had it, not of the run alone.

    Args:
        device: UUID of the CUDA device ("GPU-..."), None without one.
        processor: read processors too; one process of a machine does.
        powercap: where Linux shows RAPL.

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
        """Joules since the last time, or since it was made; None where nothing can be read."""
        spent = [found for counter in self._counters if (found := counter.spent()) is not None]
        return sum(spent) if spent else None

    def _add(self, counter: _Counter) -> None:
        if counter.spent() is not None:
            self._counters.append(counter)


class _Counter:
    """A counter that only grows, up to where it begins anew."""

    def __init__(self, read: Callable[[], int], unit: float, span: int = 0) -> None:
        self._read, self._unit, self._span = read, unit, span
        self._last: int | None = None

    def spent(self) -> float | None:
        try:
            now = self._read()
        except Exception:  # a driver may fail in ways of its own
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
    except Exception:  # neither the package nor the driver need be there
        return None
    return lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
