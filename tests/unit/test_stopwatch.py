"""Times of a device that runs its work later than the host launches it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fedscale.callbacks.max_batch_probe.step_timing import StepTiming
from lightning_fedscale.utils.stopwatch import Stopwatch

CUDA = torch.device("cuda", 0)
STEP = 0.25  # seconds that the device spends on each step


class Device:
    """Has been given some work, and has done some of it."""

    def __init__(self) -> None:
        self.launched = self.done = 0

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0

    def record(self, stream: Any) -> None:
        self.at = self.device.launched

    def query(self) -> bool:
        return self.device.done >= self.at

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return (other.at - self.at) * STEP * 1e3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_work_is_timed_when_the_device_has_done_it(device: Device) -> None:
    watch = Stopwatch[str](CUDA)
    for note in "abc":
        begun = watch.start()
        device.launched += 1 + (note == "b")
        watch.stop(begun, note)
        assert list(watch.read()) == []
    device.done = 1
    assert list(watch.read()) == [("a", STEP)]
    assert list(watch.read()) == []
    assert list(watch.read(wait=True)) == [("b", 2 * STEP), ("c", STEP)]


def test_steps_of_a_run_are_timed_by_the_device(device: Device) -> None:
    timing, trainer = StepTiming(None), SimpleNamespace(strategy=SimpleNamespace(root_device=CUDA))
    for batch_idx in range(8):
        timing.begin(trainer)  # type: ignore[arg-type]
        device.launched += 1
        timing.end(trainer, torch.zeros(16, 2), batch_idx)  # type: ignore[arg-type]
    times = timing.times
    assert times.measurements == 5
    assert times.fit().seconds(16) == pytest.approx(STEP)
