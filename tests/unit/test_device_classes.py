"""Device classes and their catalogue."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lightning_fedscale.devices import CATALOGUE, DeviceClass, device_class

FIGURES: dict[str, Any] = {"memory": 10**9, "flops": 1e12, "memory_bandwidth": 1e10, "up": 1e6, "down": 1e6}


def test_every_entry_says_where_its_figures_are_from() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name == name.lower()
        assert "FP32" in entry.source
        assert "link:" in entry.source
        assert 10**9 <= entry.memory <= 10**11
        # No device of these years computes a number for less than a hundredth of a byte of memory traffic.
        assert 1 < entry.flops / entry.memory_bandwidth < 100


@pytest.mark.parametrize(("name", "floats", "bandwidth"), [("h100", 67e12, 3.35e12), ("a100", 19.5e12, 2.039e12)])
def test_known_figures(name: str, floats: float, bandwidth: float) -> None:
    assert (device_class(name).flops, device_class(name).memory_bandwidth) == (floats, bandwidth)


def test_by_name_or_as_it_is() -> None:
    own = DeviceClass("mine", **FIGURES)
    assert device_class(own) is own
    assert device_class("PHONE") is CATALOGUE["phone"]
    with pytest.raises(ValueError, match="Did you mean 'laptop'"):
        device_class("laptopp")
    with pytest.raises(TypeError, match="device_class=3: "):
        device_class(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        CATALOGUE["phone"] = own  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", 0), ("memory", math.inf), ("flops", -1.0), ("flops", math.nan), ("memory_bandwidth", 0),
        ("up", "fast"), ("down", True), ("latency", -0.1), ("latency", math.inf), ("availability", 0),
        ("availability", 1.5),
    ],
)  # fmt: skip
def test_bad_figures(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"DeviceClass 'd': {field}="):
        DeviceClass("d", **{**FIGURES, field: value})
    change: dict[str, Any] = {field: value}
    with pytest.raises((TypeError, ValueError), match=f"{field}="):
        dataclasses.replace(CATALOGUE["phone"], **change)


def test_a_name_is_needed() -> None:
    with pytest.raises(TypeError, match="name=''"):
        DeviceClass("", **FIGURES)
