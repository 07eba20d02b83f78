"""Modules and data of the laws: an MLP with dropout, a CNN with BatchNorm, a GPT with fused attention, and noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_fedscale import Partition
from tests.laws import reference
from tests.networks import GPT

CLASSES, WORDS, LENGTH = 4, 16, 12


class Project(reference.Classifier):
    """The module of the laws with another network; no operator of it lacks a deterministic kernel on CUDA."""

    def __init__(self, kind: str, momentum: float) -> None:
        super().__init__()
        self.momentum, self.lr = momentum, 0.01 if kind == "gpt" else 0.1
        self.noise = 0.1 if kind == "noise" else 0.0
        self.net = NETWORKS[kind]()  # type: ignore[assignment]  # any network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, of inputs with noise if there is any."""
        inputs, labels = batch
        if self.noise:
            inputs = inputs + self.noise * torch.randn_like(inputs)
        return super().training_step([inputs, labels], batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class WordsToClasses(nn.Module):
    """A GPT whose mean output over positions is classified; its dropout is outside of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(WORDS, LENGTH, width=32)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(WORDS, CLASSES))

    def forward(self, words: Tensor) -> Tensor:
        classes: Tensor = self.head(self.gpt(words).mean(1))
        return classes


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": perceptron,
    "noise": perceptron,
    "cnn": convolutions,
    "gpt": WordsToClasses,
}
SHAPES = {"mlp": (12,), "noise": (12,), "cnn": (3, 8, 8)}


def project(kind: str, dtype: torch.dtype, momentum: float) -> Project:
    """The module, with the same weights on every call."""
    torch.manual_seed(0)
    return Project(kind, momentum).to(dtype)


def dataset(kind: str, samples: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Samples of classes that can be learned, the same on every call."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, samples)
    if kind == "gpt":
        words = (labels[:, None] + rng.integers(0, WORDS // 2, (samples, LENGTH))) % WORDS
        return TensorDataset(torch.tensor(words), torch.tensor(labels))
    means = rng.normal(size=(CLASSES, *SHAPES[kind]))
    inputs = means[labels] + rng.normal(size=(samples, *SHAPES[kind]))
    return TensorDataset(torch.tensor(inputs, dtype=dtype), torch.tensor(labels))


def clients(samples: int, number: int = 8) -> Partition:
    """Clients of very different sizes."""
    return reference.unequal_clients(samples, number)
