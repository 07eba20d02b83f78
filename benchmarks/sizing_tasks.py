"""Projects whose best setting is known by trying all: what `benchmarks.sizing` asks `fedscale size` about."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.tasks import Unavailable, speech_by_role
from lightning_fedscale.partitioners import DirichletPartitioner, Partition, Partitioner

FASHION = "FASHION_MNIST"
"""Environment variable: a folder with the four files of Fashion-MNIST."""


class Task(NamedTuple):
    """A question for a study.

    Attributes:
        module: makes the module of a width.
        data: makes the data.
        partition: makes the partition, or the partitioner.
        flops: of a run, of all clients together.
        space: arguments of `size`, which are the axes of the grid as well.
    """

    module: Callable[..., pl.LightningModule]
    data: Callable[[], pl.LightningDataModule]
    partition: Callable[[], Partition | Partitioner]
    flops: float
    space: dict[str, Sequence[Any]]


class Samples(pl.LightningDataModule):
    """Tensors in memory."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Training samples and labels, validation samples and labels."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Split them."""
        x, y, test_x, test_y = self.tensors()
        self.train, self.val = TensorDataset(x, y), TensorDataset(test_x, test_y)

    def train_dataloader(self) -> Any:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        """In large batches."""
        return DataLoader(self.val, 1000)


class Hospitals(Samples):
    """Images of 16 x 16 pixels, labelled at random by a teacher's probabilities."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """3,000 to train, 4,000 to validate."""
        generator = torch.Generator().manual_seed(7)
        first = torch.randn(256, 32, generator=generator) / 8
        second = torch.randn(32, 10, generator=generator)
        x = torch.randn(7000, 256, generator=generator)
        y = torch.multinomial((torch.tanh(x @ first) @ second).softmax(-1), 1, generator=generator)[:, 0]
        return x[:3000], y[:3000], x[3000:], y[3000:]


class Digits(Samples):
    """scikit-learn's digits."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """1,397 to train, 400 to validate."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        x, y = torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
        return x[400:], y[400:], x[:400], y[:400]


class Fashion(Samples):
    """Fashion-MNIST at 14 x 14 pixels."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """6,000 to train, 2,000 to validate.

        Raises:
            Unavailable: if it is not there.
        """
        return fashion(Path(os.environ.get(FASHION, "/usr/share/datasets/fashion-mnist")))


@cache
def fashion(folder: Path) -> tuple[torch.Tensor, ...]:
    """Pooled images and labels of Fashion-MNIST; unpacked once."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise Unavailable(
            f"Fashion-MNIST is missing ({missing[0]}): apt-get install dataset-fashion-mnist, or {FASHION}=FOLDER"
        )
    found = []
    for images, labels, number in ((*names[:2], 6000), (*names[2:], 2000)):
        pixels = torch.tensor(_array(folder / images)[:number, None] / 255.0, dtype=torch.float32)
        found += [F.avg_pool2d(pixels, 2).flatten(1), torch.tensor(_array(folder / labels)[:number].astype(int))]
    return tuple(found)


def _array(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array of an IDX file: bytes after a head that tells the shape."""
    held = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(held, ">u4", count=held[3], offset=4).astype(int)
    return np.frombuffer(held, np.uint8, offset=4 + 4 * held[3]).reshape(shape)


ROLES, CONTEXT, EACH = 12, 32, 12_000
"""The roles that speak most, the characters that the model sees, and how many of each role's train."""


class Shakespeare(Samples):
    """Windows of what roles say; the last tenth of each role's words validates."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Characters, and the characters that follow."""
        parts = [windows for role in roles() for windows in role]
        train, test = torch.cat(parts[::2]), torch.cat(parts[1::2])
        return train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:]


@cache
def roles() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows of ``CONTEXT + 1`` characters of each role, to train and to validate."""
    texts = sorted(speech_by_role(), key=len, reverse=True)[:ROLES]
    letters = {letter: place for place, letter in enumerate(sorted(set("".join(texts))))}
    found = []
    for place, text in enumerate(texts):
        ids = torch.tensor([letters[each] for each in text[: EACH // (1 + place % 4)]])
        windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        cut = len(windows) * 9 // 10
        found.append((windows[:cut], windows[cut:]))
    return found


def by_role() -> Partition:
    """A client for each role."""
    sizes = [len(train) for train, _ in roles()]
    ends = np.cumsum(sizes)
    return Partition.from_lists([np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)])


class Perceptron(pl.LightningModule):
    """One hidden layer."""

    inputs = 256

    def __init__(self, width: int = 256, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(self.inputs, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x: torch.Tensor) -> Any:
        """Logits, classes last."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, -2), y.flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val_loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), self.lr)


class OfDigits(Perceptron):
    """8 x 8 pixels."""

    inputs = 64


class OfFashion(Perceptron):
    """14 x 14 pixels, by Adam."""

    inputs = 196

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.lr / 100)


class Speaker(Perceptron):
    """A transformer of one block that predicts the next character."""

    def __init__(self, width: int = 64, lr: float = 0.3) -> None:
        super().__init__(1, lr)
        self.net = nn.Sequential()
        self.letters, self.places = nn.Embedding(96, width), nn.Parameter(torch.randn(CONTEXT, width) / 50)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 96)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits of the next character."""
        here = self.letters(x) + self.places
        query, key, value = self.attention(self.norms[0](here)).chunk(3, -1)
        here = here + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return self.head(self.norms[2](here + self.feed(self.norms[1](here))))

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.lr / 100)


_OF_SGD = ["fed_avg", "scaffold", "fed_prox", "fed_avgm"]
_OF_ADAM = ["fed_avg", "kept_optimizer", "scaffold", "diloco"]

TASKS = {
    "hospitals": Task(
        Perceptron, Hospitals, lambda: DirichletPartitioner(num_partitions=8, alpha=0.1, seed=3), 1e10,
        {"sizes": [32, 64, 128, 256, 512], "methods": _OF_SGD, "batch_sizes": [32, 128], "local_steps": [5, 20],
         "rates": [0.25, 1.0, 4.0]},
    ),
    "digits": Task(
        OfDigits, Digits, lambda: DirichletPartitioner(num_partitions=10, alpha=0.3, seed=3), 7e8,
        {"sizes": [16, 32, 64, 128, 256], "methods": _OF_SGD, "batch_sizes": [16, 64], "local_steps": [5, 20],
         "rates": [0.25, 1.0, 4.0]},
    ),
    "fashion": Task(
        OfFashion, Fashion, lambda: DirichletPartitioner(num_partitions=10, alpha=0.3, seed=3), 6e9,
        {"sizes": [16, 32, 64, 128, 256], "methods": _OF_ADAM, "batch_sizes": [32], "local_steps": [5, 20],
         "rates": [0.25, 1.0, 4.0]},
    ),
    "shakespeare": Task(
        Speaker, Shakespeare, by_role, 4e10,
        {"sizes": [16, 32, 64, 128], "methods": _OF_ADAM, "batch_sizes": [16], "local_steps": [5, 20],
         "rates": [0.25, 1.0, 4.0]},
    ),
}  # fmt: skip
"""By name."""
