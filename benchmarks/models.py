"""The models of the tasks, in plain torch, so that every environment with torch can build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CharacterTransformer(nn.Module):
    """Predicts at every position the character that follows; ``(batch, length)`` to ``(batch, characters, length)``."""

    def __init__(self, characters: int, length: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.character = nn.Embedding(characters, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        states = self.character(characters) + self.place
        for block in self.blocks:
            states = block(states, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(states)).mT


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """FedAvg's CNN (arXiv 1602.05629) for 3x32x32 images: 0.88 million parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def small_cnn() -> nn.Sequential:
    """A CNN of 20,000 parameters for 3x32x32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions beside a shortcut, with group norm: federated clients see too few samples for batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(32, outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(32, outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.path(images) + self.shortcut(images))


def resnet18() -> nn.Sequential:
    """ResNet18 for 3x32x32 images: 11 million parameters."""
    widths = (64, 64, 128, 256, 512)
    blocks = [
        Residual(inputs if first else outputs, outputs, 2 if first and inputs != outputs else 1)
        for inputs, outputs in pairwise(widths)
        for first in (True, False)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def build(settings: Mapping[str, Any]) -> nn.Module:
    """The model that a task's settings name."""
    kind, *sizes = settings["model"]
    kinds: dict[str, Callable[..., nn.Module]] = {
        "mlp": mlp, "cnn": cnn, "small_cnn": small_cnn, "resnet18": resnet18, "transformer": CharacterTransformer
    }  # fmt: skip
    return kinds[kind](*sizes)


def load(model: nn.Module, weights: Mapping[str, np.ndarray]) -> nn.Module:
    """Put weights into a model, in place."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    return model


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """A copy of a model's weights, for `benchmarks.contest.Contest.finish`."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy; classes are dimension 1."""
    return F.cross_entropy(outputs, labels)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(256), labels.split(256), strict=True))
    return right / labels.numel()
