"""Networks of whose steps libraries keep much, and what that is in a process that has run nothing before.

``python -m tests.keepers BATCH...`` says in JSON what they keep, what `estimate_memory` predicts, and which of these
batches of `promised` fit its budget. Every step runs in a copy of that process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedscale.devices import MemoryModel, estimate_memory
from lightning_fedscale.devices.profiling import libraries
from lightning_fedscale.devices.profiling.dry_run import DryRun
from lightning_fedscale.devices.profiling.real_step import real_step
from tests.networks import Classifier

BATCHES = 5, 40
BUDGET = 2**27


class Network(nn.Module):
    """Layers in a row, their outputs flattened to ten numbers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head: nn.Linear = nn.LazyLinear(10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs).flatten(1))


class Last(nn.Module):
    """A recurrent layer whose states are left out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)[0]


class Case(NamedTuple):
    """Layers, and the shape of a sample."""

    make: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]

    def project(self) -> tuple[Classifier, Any]:
        """A module, and a batch of two; nothing has been run."""
        with torch.device("meta"):
            numbers = nn.Sequential(*self.make())(torch.zeros(2, *self.shape))[0].numel()
        network = Network(*self.make())
        network.head = nn.Linear(numbers, 10)
        return Classifier(network), (torch.zeros(2, *self.shape), torch.zeros(2, dtype=torch.long))

    def model(self) -> MemoryModel:
        """The memory model of a new module."""
        return estimate_memory(*self.project())


def mobile(width: int, size: int) -> list[nn.Module]:
    """What MobileNet, ShuffleNet and ResNeXt are made of."""
    return [
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU6(),
        nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width), nn.Hardswish(),
        nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=4), nn.Conv2d(2 * width, width, 1), nn.AvgPool2d(size // 2),
    ]  # fmt: skip


KEEPERS = {
    "one by one": Case(lambda: [nn.Conv2d(7, 34, 1), nn.ReLU(), nn.Conv2d(34, 9, 1)], (7, 13, 13)),
    "depthwise": Case(lambda: [nn.Conv2d(36, 36, 3, groups=36), nn.Conv2d(36, 36, 5, 2, 2, groups=36)], (36, 13, 13)),
    "grouped": Case(lambda: [nn.Conv2d(44, 44, 3, groups=11), nn.Conv2d(44, 44, 3, groups=4)], (44, 13, 13)),
    "twice the same": Case(lambda: [nn.Conv2d(38, 38, 3, padding=1), nn.Conv2d(38, 38, 3, padding=1)], (38, 11, 11)),
    "transposed": Case(lambda: [nn.ConvTranspose2d(14, 22, 3), nn.Conv2d(22, 14, 4, 2, bias=False)], (14, 11, 11)),
    "one dimension": Case(lambda: [nn.Conv1d(14, 46, 5), nn.Conv1d(46, 46, 3, groups=2)], (14, 37)),
    "lstm": Case(lambda: [Last(nn.LSTM(18, 44, batch_first=True))], (13, 18)),
    "inverted residuals": Case(lambda: mobile(20, 22), (3, 22, 22)),
    "no libraries": Case(lambda: [nn.Linear(12, 12), nn.ReLU()], (12,)),
}
PROMISED = Case(lambda: mobile(28, 26), (3, 26, 26))


def _kept(case: Case, batch: int) -> list[int]:
    """Growth of executable memory in two real steps, and MKL's buffers after them."""
    reading, writing = os.pipe()
    step = DryRun(*case.project()).real_step(batch)

    def watched() -> None:
        before = libraries.executable_bytes()
        step()
        os.write(writing, json.dumps([libraries.executable_bytes() - before, libraries.buffer_bytes()]).encode())

    done = real_step(watched, 2**30)
    assert done.fits, done.reason
    os.close(writing)
    with os.fdopen(reading) as pipe:
        kept: list[int] = json.load(pipe)
    return kept


def main(batches: list[int]) -> None:
    torch.set_num_threads(1)
    kept = {kind: [_kept(case, batch) for batch in BATCHES] for kind, case in KEEPERS.items()}
    step_of = DryRun(*PROMISED.project()).real_step
    fits = [real_step(step_of(batch), BUDGET).fits for batch in batches]
    model = PROMISED.model()
    print(json.dumps({"kept": kept, "fits": fits, "peaks": [model.peak(batch) for batch in BATCHES]}))


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]])
