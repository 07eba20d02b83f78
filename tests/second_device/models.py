"""Modules, cohorts and updates on the second device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lightning_fedscale.types import ClientUpdate, Cohort, PendingDelta
from tests.second_device.device import DEVICE

CLIENTS = np.arange(0, 14, 2)


class Net(nn.Module):
    """Parameters of several shapes, BatchNorm with its counter, and a frozen parameter.

    Args:
        unusual: whether there are also buffers of types that models seldom have.
    """

    def __init__(self, *, unusual: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        if unusual:
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
            self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
            self.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.norm(self.conv(x)).mean((2, 3)))
        return found


def net(*, unusual: bool = False) -> Net:
    with torch.device(DEVICE):
        return Net(unusual=unusual)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        backward(module)
        optimizer.step()


def backward(module: nn.Module) -> None:
    module.zero_grad()
    module(torch.empty(6, 3, 5, 5, device=DEVICE)).square().mean().backward()


def vector(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.float64, device=DEVICE)


def cohort(trainable: int) -> Cohort:
    return Cohort(0, CLIENTS, num_clients=30, trainable=trainable, seed=0)


def update(place: int, delta: Tensor | PendingDelta) -> ClientUpdate:
    """The update of the cohort's client at this place."""
    return ClientUpdate(
        client=int(CLIENTS[place]), delta=delta, norm=1.0 + place, num_samples=3 + place, samples=3, steps=2, loss=1.0,
        seconds=0.1, optimizer_steps=2,
    )  # fmt: skip
