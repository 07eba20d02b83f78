"""Device classes: the kinds of hardware that clients run on."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lightning_fedscale.utils import checks
from lightning_fedscale.utils.memory import parse_bytes

_GB = 10**9
_GBIT = _GB / 8
_MBIT = _GBIT / 1000


@dataclass(frozen=True)
class DeviceClass:
    """A kind of device, by the figures that determine its largest batch and its time per step.

    Attributes:
        name: its name in populations, tables and logs.
        memory: maximum bytes for training.
        flops: floating-point operations per second that it reaches.
        memory_bandwidth: bytes per second between its memory and its processor.
        up: bytes per second that it sends.
        down: bytes per second that it receives.
        latency: seconds before the first byte of a message arrives.
        availability: probability that a client of this class is available in a round, above 0 and at most 1.
        source: source of the figures.

    Raises:
        TypeError, ValueError: if a figure is invalid; names it.

    Example:
        >>> import dataclasses
        >>> half_free = dataclasses.replace(device_class("phone"), name="busy phone", memory=4 * 10**9)
        >>> half_free.memory
        4000000000
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    up: float
    down: float
    latency: float = 0.0
    availability: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"DeviceClass: name={self.name!r}: pass a name, such as 'phone'.")
        for field in ("memory", "flops", "memory_bandwidth", "up", "down"):
            remedy = "pass a number above 0." if field == "memory" else "pass a number above 0; math.inf is allowed."
            checks.number(f"DeviceClass {self.name!r}: {field}", getattr(self, field), remedy, lambda found: found > 0)
        if not math.isfinite(self.memory):
            raise ValueError(f"DeviceClass {self.name!r}: memory={self.memory!r}: pass a finite number of bytes.")
        if not checks.is_number(self.latency) or not 0 <= self.latency < math.inf:
            raise ValueError(
                f"DeviceClass {self.name!r}: latency={self.latency!r}: pass a finite number of seconds, at least 0."
            )
        if not checks.is_number(self.availability) or not 0 < self.availability <= 1:
            raise ValueError(
                f"DeviceClass {self.name!r}: availability={self.availability!r}: pass a probability in (0, 1]."
            )
        object.__setattr__(self, "memory", int(self.memory))


def device_class(which: str | DeviceClass) -> DeviceClass:
    """Return the class of this name in the `CATALOGUE`; a class itself is returned unchanged.

    Raises:
        ValueError: if the name is unknown; lists the known ones.

    Example:
        >>> device_class("T4").memory
        16000000000
    """
    if isinstance(which, DeviceClass):
        return which
    if not isinstance(which, str):
        raise TypeError(f"device_class={which!r}: pass a DeviceClass, or one of {', '.join(map(repr, CATALOGUE))}.")
    if (found := CATALOGUE.get(which.lower())) is not None:
        return found
    raise ValueError(f"{checks.unknown('device_class', which, CATALOGUE)} For other hardware, pass a DeviceClass.")


def budget_in_bytes(name: str, budget: int | str | DeviceClass) -> int | None:
    """Return a budget of memory in bytes; None for "auto".

    Args:
        name: name of the argument.
        budget: bytes, an amount such as "8GiB", "auto", or a device class, by its name or as it is.

    Raises:
        ValueError: if it is none of them, or not above 0; names the argument.

    Example:
        >>> budget_in_bytes("budget", "8GiB"), budget_in_bytes("budget", "phone"), budget_in_bytes("budget", "auto")
        (8589934592, 8000000000, None)
    """
    if isinstance(budget, DeviceClass):
        return budget.memory
    if isinstance(budget, str) and budget.lower() in CATALOGUE:
        return CATALOGUE[budget.lower()].memory
    try:
        amount = parse_bytes(name, budget)
    except ValueError:
        raise ValueError(
            f"{name}={budget!r}: pass bytes, an amount such as '8GiB', 'auto', or a device class."
            f"{checks.did_you_mean(budget, CATALOGUE)} Known: {', '.join(map(repr, CATALOGUE))}."
        ) from None
    if amount is not None and amount <= 0:
        raise ValueError(f"{name}={budget!r}: pass more than 0 bytes.")
    return amount


def usable_bytes(budget: int, headroom: float) -> int:
    """Return the usable bytes of a budget.

    Raises:
        ValueError: if the budget is not positive or the headroom is outside [0, 1).
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not budget > 0:
        raise ValueError(f"budget={budget!r}: pass a positive number of bytes.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom!r}: pass the share of the budget to leave free, at least 0 and below 1.")
    return int(budget * (1 - headroom))


_LTE = "link: nominal LTE category 4 (3GPP TS 36.306)"
_ETHERNET = "link: nominal Gigabit Ethernet (IEEE 802.3ab)"
_TEN_GIGABIT = "link: nominal 10 Gigabit Ethernet (IEEE 802.3ae), not a figure of the card"

_ENTRIES = (
    DeviceClass(
        "phone", 8 * _GB, 1.7203e12, 51.2e9, up=50 * _MBIT, down=150 * _MBIT,
        source="Samsung Galaxy S21 (2021), Snapdragon 888: 8 GB LPDDR5 at 3200 MHz on 64 bits; FP32 of its Adreno 660,"
        f" 840 MHz x 1024 x 2 (Wikipedia, Adreno); {_LTE}",
    ),
    DeviceClass(
        "old-phone", 4 * _GB, 0.727e12, 29.9e9, up=50 * _MBIT, down=150 * _MBIT,
        source="Google Pixel 3 (2018), Snapdragon 845: 4 GB LPDDR4X at 1866 MHz on 64 bits; FP32 of its Adreno 630,"
        f" 710 MHz x 512 x 2 (Wikipedia, Adreno); {_LTE}",
    ),
    DeviceClass(
        "raspberry-pi-5", 8 * _GB, 153.6e9, 17.1e9, up=_GBIT, down=_GBIT,
        source="Raspberry Pi 5, 8 GB, product brief: LPDDR4X-4267 on 32 bits; four Cortex-A76 at 2.4 GHz, each two"
        f" 128-bit multiply-adds per cycle in FP32 (Arm Cortex-A76 software optimization guide); {_ETHERNET}",
    ),
    DeviceClass(
        "jetson-nano", 4 * _GB, 235.9e9, 25.6e9, up=_GBIT, down=_GBIT,
        source="NVIDIA Jetson Nano module datasheet: 4 GB LPDDR4, 25.6 GB/s; FP32 of 128 Maxwell cores at 921.6 MHz;"
        f" {_ETHERNET}",
    ),
    DeviceClass(
        "jetson", 8 * _GB, 1.28e12, 68e9, up=_GBIT, down=_GBIT,
        source="NVIDIA Jetson Orin Nano 8GB datasheet: 8 GB LPDDR5, 68 GB/s; FP32 of 1024 Ampere cores at 625 MHz;"
        f" {_ETHERNET}",
    ),
    DeviceClass(
        "jetson-agx", 64 * _GB, 5.32e12, 204.8e9, up=10 * _GBIT, down=10 * _GBIT,
        source="NVIDIA Jetson AGX Orin 64GB technical brief: 64 GB LPDDR5, 204.8 GB/s; FP32 of 2048 Ampere cores at"
        " 1.3 GHz; link: nominal 10 Gigabit Ethernet of its developer kit",
    ),
    DeviceClass(
        "laptop", 8 * _GB, 2.6e12, 68.25e9, up=150e6, down=150e6,
        source="Apple MacBook Air M1 (2020), 8 GB: LPDDR4X-4266 on 128 bits; 2.6 TFLOPS FP32 of its GPU (Apple press"
        " release, 2020-11-10); link: nominal 1200 Mbit/s of Wi-Fi 6",
    ),
    DeviceClass(
        "t4", 16 * _GB, 8.1e12, 300e9, up=10 * _GBIT, down=10 * _GBIT,
        source=f"NVIDIA T4 datasheet: 16 GB GDDR6, 300 GB/s, 8.1 TFLOPS FP32; {_TEN_GIGABIT}",
    ),
    DeviceClass(
        "a100", 80 * _GB, 19.5e12, 2039e9, up=10 * _GBIT, down=10 * _GBIT,
        source=f"NVIDIA A100 80GB SXM datasheet: 80 GB HBM2e, 2,039 GB/s, 19.5 TFLOPS FP32; {_TEN_GIGABIT}",
    ),
    DeviceClass(
        "h100", 80 * _GB, 67e12, 3.35e12, up=10 * _GBIT, down=10 * _GBIT,
        source=f"NVIDIA H100 SXM datasheet: 80 GB HBM3, 3.35 TB/s, 67 TFLOPS FP32; {_TEN_GIGABIT}",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, DeviceClass] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Real devices by name, with published peak figures in FP32 and their sources.

Memory is the device's total: subtract what its system takes (``dataclasses.replace``, or the headroom). Peaks are never
reached: they are better for comparing classes than for predicting seconds. Latencies are not published and set to zero;
availability is one.
"""
