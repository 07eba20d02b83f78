"""Where the checks run: the device, how much is run, and the means to time and to train there."""

from __future__ import annotations

import itertools
import platform
import subprocess
import time
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch

from tests.laws import reference


class Machine(NamedTuple):
    """The device that the checks run on.

    Attributes:
        type: "cuda", or "cpu" to test the script itself.
        fast: whether sizes are tiny.
    """

    type: str
    fast: bool

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device."""
        return self.type == "cuda"

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def trainer(self, **options: Any) -> pl.Trainer:
        """A Trainer on it that says nothing."""
        return reference.quiet_trainer(**{"accelerator": "gpu" if self.cuda else "cpu", **options})

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def facts(self) -> dict[str, str]:
        """Names and versions."""
        found = {"device": self.type, "torch": torch.__version__, "lightning": lightning.__version__}
        found["python"] = platform.python_version()
        if self.cuda:
            found["device"] = torch.cuda.get_device_name(0)
            found["cuda"] = str(torch.version.cuda)
            found["driver"] = driver()
        return found


def driver() -> str:
    """The version of the driver, or "unknown"."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Stopwatch(pl.Callback):
    """Seconds from the start of a step or round to that of the next, on the device's own clock."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._marks: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A step or round begins."""
        if self._machine.cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, warm_up: int) -> list[float]:
        """Seconds of each, without the first few."""
        self._machine.wait()
        marks = self._marks[warm_up:]
        if self._machine.cuda:
            return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
        return [after - before for before, after in itertools.pairwise(marks)]
