"""Small networks of the usual kinds, as LightningModules with the usual things in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Classifier(pl.LightningModule):
    """Cross-entropy over the last dimension of whatever the network returns."""

    def __init__(self, network: nn.Module, optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> None:
        super().__init__()
        self.network = network
        self._make = optimizer
        self._options = {"lr": 1e-3, **options}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.network(inputs)
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self._make([p for p in self.parameters() if p.requires_grad], **self._options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        same = stride == 1 and before == after
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.body(inputs) + self.skip(inputs))


def resnet18(width: int = 64, classes: int = 10, stages: int = 4, blocks: int = 2) -> nn.Module:
    """The layers of He et al. 2015 (1512.03385), table 1; ``width`` 64 and 4 stages of 2 blocks are the original."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    before = width
    for stage in range(stages):
        after = width * 2**stage
        layers.append(_Block(before, after, 1 if stage == 0 else 2))
        layers += [_Block(after, after, 1) for _ in range(blocks - 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class GPT(nn.Module):
    """A decoder with learned positions and causal attention; ``saving`` recomputes every block in backward."""

    def __init__(
        self, vocabulary: int = 100, length: int = 32, width: int = 64, layers: int = 2, saving: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList([_Decoder(width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.saving = saving

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.tokens(inputs) + self.positions[: inputs.shape[1]]
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.saving else block(hidden)
        return self.head(hidden)


class _Decoder(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.mix(self.before(hidden)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.feed(self.after(hidden))


class Recurrent(nn.Module):
    def __init__(self, features: int = 16, hidden: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.LSTM(features, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs)[0][:, -1])


def images(samples: int, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, size, size), torch.randint(10, (samples,))


def tokens(samples: int, length: int = 32, vocabulary: int = 100) -> tuple[Tensor, Tensor]:
    text = torch.randint(vocabulary, (samples, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def vectors(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, *(shape or (64,))), torch.randint(10, (samples,))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (mlp, vectors),
    "resnet18": (lambda: resnet18(width=16), images),
    "gpt": (GPT, tokens),
    "gpt with checkpointing": (lambda: GPT(layers=4, saving=True), tokens),
    "lstm": (Recurrent, lambda samples: vectors(samples, 20, 16)),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
            nn.Flatten(),
            nn.Linear(32 * 8, 10),
        ),
        lambda samples: vectors(samples, 8, 32),
    ),
}
"""Networks and batches of so many samples for them, by name."""
