"""What clients' hardware can hold and how long it takes: memory model, time model, device classes, populations."""

from lightning_fedscale.devices.classes import DeviceClass
from lightning_fedscale.devices.costs import StepCost
from lightning_fedscale.devices.memory import ON_CLIENT, SIMULATED, MemoryModel, estimate_memory

__all__ = ["ON_CLIENT", "SIMULATED", "DeviceClass", "MemoryModel", "StepCost", "estimate_memory"]
