"""The default model and data of the command line: a perceptron on scikit-learn's handwritten digits."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale.utils.checks import integer, number

_TRAIN, _VAL = 1200, 297  # of 1,797 images in a fixed random order; the last 300 are for testing


class Digits(pl.LightningDataModule):
    """1,797 images of handwritten digits with eight by eight pixels, as vectors, with their labels.

    Args:
        batch_size: images in a training batch.

    Raises:
        ValueError: if scikit-learn, which provides the images, is not installed.

    Example:
        >>> data = Digits()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, len(data.val_dataloader().dataset)
        (torch.Size([8, 64]), 297)
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = integer("batch_size", batch_size)
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError(
                "the digits need scikit-learn: pip install 'lightning-fedscale[examples]', or name data and a model of"
                " your own, model._target_=my_package.MyModule data._target_=my_package.MyData"
            ) from None
        pixels, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        self.train, self.val, self.test = (
            TensorDataset(*parts)
            for parts in zip(
                images.tensor_split([_TRAIN, _TRAIN + _VAL]), labels.tensor_split([_TRAIN, _TRAIN + _VAL]), strict=True
            )
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches for training."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all validation images in one batch."""
        return DataLoader(self.val, len(self.val))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all test images in one batch."""
        return DataLoader(self.test, len(self.test))


class Classifier(pl.LightningModule):
    """A perceptron with one hidden layer.

    Args:
        width: width of the hidden layer; each unit has 75 parameters.
        lr: learning rate of SGD.

    Example:
        >>> sum(p.numel() for p in Classifier(width=32).parameters())
        2410
    """

    def __init__(self, width: int = 32, lr: float = 0.1) -> None:
        super().__init__()
        integer("width", width)
        self.lr = number("lr", lr, "pass a number of at least 0.", lambda lr: 0 <= lr < math.inf)
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Compute a logit for each digit."""
        values: Tensor = self.net(images)
        return values

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        values = self(images)
        accuracy = (values.argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{stage}_loss": F.cross_entropy(values, labels), f"{stage}_accuracy": accuracy},
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)
