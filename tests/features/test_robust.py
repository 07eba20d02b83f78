"""Robust aggregation where it counts: digits, a fifth of the clients hostile."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fedscale.aggregators import (
    Aggregator,
    centered_clipping,
    geometric_median,
    krum,
    mean,
    median,
    multi_krum,
    norm_clipped,
    trimmed_mean,
)
from lightning_fedscale.attacks import a_little_is_enough, attacked, flip_labels, gaussian, model_replacement, sign_flip
from lightning_fedscale.partitioners import IidPartitioner, Partition
from tests.strategies import sequential

CLIENTS, ATTACKERS = 10, [1, 6]


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@cache
def data() -> tuple[TensorDataset, Partition, Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    partitioner = IidPartitioner(CLIENTS)
    partitioner.dataset = dataset = TensorDataset(images[train], labels[train])
    return dataset, partitioner.partition, images[test], labels[test]


def accuracy(aggregator: Aggregator, dataset: Any = None, rounds: int = 12) -> float:
    """Percent of unseen digits that the global model knows in the end."""
    clean, partition, images, labels = data()
    torch.manual_seed(0)
    module = Digits()
    trainer = pl.Trainer(
        strategy=sequential(partitioner=partition, aggregator=aggregator, local_epochs=2),
        max_epochs=rounds,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(dataset or clean, batch_size=16))
    return 100 * float((module.net(images).argmax(1) == labels).float().mean())


@cache
def untroubled() -> float:
    return accuracy(mean())


ROBUST = {
    "median": median(),
    "trimmed_mean": trimmed_mean(0.2),
    "krum": krum(2),
    "multi_krum": multi_krum(2, keep=8),
    "geometric_median": geometric_median(),
    "centered_clipping": centered_clipping(0.5),
}


def test_the_mean_collapses_under_sign_flippers() -> None:
    assert untroubled() > 92
    assert accuracy(attacked(mean(), sign_flip(5.0), ATTACKERS)) < 30


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_stay_near_no_attack(name: str) -> None:
    # Krum follows one client, which costs some points with and without attackers.
    without = accuracy(krum(2)) if name == "krum" else untroubled()
    assert accuracy(attacked(ROBUST[name], sign_flip(5.0), ATTACKERS)) > without - 3
    assert without > 88


@pytest.mark.parametrize(
    ("attack", "harm"),
    [(gaussian(2.0), 20), (model_replacement(boost=-20.0), 50)],
    ids=["gaussian", "model replacement"],
)
def test_other_attacks_on_the_mean_and_the_trimmed_mean(attack: Any, harm: float) -> None:
    assert accuracy(attacked(mean(), attack, ATTACKERS)) < untroubled() - harm
    assert accuracy(attacked(trimmed_mean(0.2), attack, ATTACKERS)) > untroubled() - 3
    # Alone it does not bear them, but it bounds their harm.
    assert accuracy(attacked(norm_clipped(0.5), attack, ATTACKERS)) > untroubled() - 10


def test_a_little_is_enough_passes_for_honest() -> None:
    attack = a_little_is_enough(z=1.5)
    assert accuracy(attacked(krum(2), attack, ATTACKERS)) > 50  # it harms less, and is not thrown out either


def test_flipped_labels_train_as_any_others() -> None:
    dataset, partition, *_ = data()
    hostile = [index for client in ATTACKERS for index in partition.client(client).tolist()]
    flipped = flip_labels(dataset, hostile, num_classes=10)
    boosted = attacked(mean(), model_replacement(), ATTACKERS)
    assert accuracy(boosted, flipped) < untroubled() - 30
    assert accuracy(attacked(median(), model_replacement(), ATTACKERS), flipped) > untroubled() - 3
    assert len(Subset(flipped, hostile)) == len(hostile)
