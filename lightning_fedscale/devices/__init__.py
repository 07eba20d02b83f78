"""Models of the clients' hardware: memory, time, device classes and populations."""

from lightning_fedscale.devices.classes import CATALOGUE, DeviceClass, device_class
from lightning_fedscale.devices.memory import ON_CLIENT, SIMULATED, MemoryModel, estimate_memory
from lightning_fedscale.devices.performance import PerformanceModel, StepTime, StepTimes, fit_step_time
from lightning_fedscale.devices.population import Population
from lightning_fedscale.devices.probe import ProbeResult, probe
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
