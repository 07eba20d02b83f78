"""Messages of `attacks`."""

from __future__ import annotations

import torch

from lightning_fedscale import attacks
from lightning_fedscale.aggregators import aggregate
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: attacks.attacked("mean", 3, [1]),  # type: ignore[arg-type]
        TypeError,
        "attack=3: pass an attack such as attacks.sign_flip(), or a function of (stack, rows, cohort).",
    ),
    Row(
        lambda: attacks.attacked("mean", attacks.sign_flip(), 3),  # type: ignore[arg-type]
        TypeError,
        "attackers=3: pass the numbers of the hostile clients, such as [2, 5].",
    ),
    Row(
        lambda: aggregate(attacks.attacked("mean", attacks.sign_flip(), [7]), torch.zeros(4, 1)),
        ValueError,
        "attackers: client 7 does not exist: pass numbers from 0 to 3.",
    ),
    Row(
        lambda: attacks.gaussian(-1),
        ValueError,
        "std=-1: pass a number of at least 0.",
    ),
    Row(
        lambda: attacks.flip_labels([], [], 1),
        ValueError,
        "num_classes=1: pass the number of classes, at least 2.",
    ),
    Row(
        lambda: attacks.flip_labels([{"label": 1}], [0], 2)[0],
        TypeError,
        "flip_labels: sample 0 is a dict: pass a dataset of tuples (..., label).",
    ),
]
