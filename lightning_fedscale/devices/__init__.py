"""Models of the clients' hardware: memory, time, device classes and populations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fedscale.devices.classes import CATALOGUE, DeviceClass, device_class
from lightning_fedscale.devices.probe import ProbeResult, probe
from lightning_fedscale.utils import late_imports

if TYPE_CHECKING:
    from lightning_fedscale.devices.memory import ON_CLIENT, SIMULATED, MemoryModel, estimate_memory
    from lightning_fedscale.devices.performance import PerformanceModel, StepTime, StepTimes, fit_step_time
    from lightning_fedscale.devices.population import Population
    from lightning_fedscale.devices.profiling.costs import StepCost

__all__ = [
    "CATALOGUE",
    "ON_CLIENT",
    "SIMULATED",
    "DeviceClass",
    "MemoryModel",
    "PerformanceModel",
    "Population",
    "ProbeResult",
    "StepCost",
    "StepTime",
    "StepTimes",
    "device_class",
    "estimate_memory",
    "fit_step_time",
    "probe",
]

__getattr__, __dir__ = late_imports.exports(
    __name__,  # device classes and probes need no torch, but these do
    {
        "ON_CLIENT": "memory",
        "SIMULATED": "memory",
        "MemoryModel": "memory",
        "PerformanceModel": "performance",
        "Population": "population",
        "StepCost": "profiling.costs",
        "StepTime": "performance",
        "StepTimes": "performance",
        "estimate_memory": "memory",
        "fit_step_time": "performance",
    },
)
