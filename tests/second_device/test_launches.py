"""How many operators a client takes besides its training, and how often it waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_fedscale import aggregators, local_rules
from lightning_fedscale.core.client_state import ClientStore
from lightning_fedscale.core.executors.client_delta import Deltas
from lightning_fedscale.core.executors.shared_tensors import shared_tensors_of
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.round.client_pipeline import RULE, ClientPipeline
from lightning_fedscale.local_rules import LocalRule
from tests.second_device.device import DEVICE, second_device
from tests.second_device.models import cohort, update, vector

LAYERS = 20


def deep() -> nn.Module:
    """20 convolutions with BatchNorm, as ResNet18 has: 8 million parameters."""
    with torch.device(DEVICE):
        layers = [nn.Sequential(nn.Conv2d(210, 210, 3, bias=False), nn.BatchNorm2d(210)) for _ in range(LAYERS)]
        return nn.Sequential(*layers)


RULES: dict[str, tuple[LocalRule | None, int, int]] = {
    "without a rule": (None, 30, 1),
    "scaffold": (local_rules.scaffold(), 60, 2),
    "fed_nova": (local_rules.fed_nova(), 60, 2),
}


@pytest.mark.parametrize("name", RULES)
def test_launches_of_a_client_do_not_grow_with_layers(name: str) -> None:
    rule, most, waits = RULES[name]
    with second_device() as seen:
        module = deep()
        shared, mean = shared_tensors_of(module), aggregators.mean()
        start = shared.view.copy()
        deltas = Deltas(shared, start)
        who, trainable = cohort(shared.view.trainable), shared.view.trainable
        total = mean.init(shared.view.zeros(), who)
        states = {} if rule is None else {RULE: rule.init(vector(trainable))}
        pipeline = ClientPipeline(
            AlgorithmOptions(rule, None, None, mean), ClientStore(), shared, who, SGD(module.parameters(), lr=0.1),
            states, starts={}, scales={}, gradient_of=lambda client, tally: vector(trainable),
        )  # fmt: skip
        for place in range(2):
            seen.clear()  # the first client makes what later ones use
            delta = deltas.of(None)
            delta.norm()
            sent = pipeline.send(update(place, delta))
            total = mean.accumulate(total, sent.update, sent.weight, who)
            shared.view.write_copy(start)
        assert seen.launches.total() <= most, seen.launches.most_common(5)
        assert len(seen.reads) <= waits, seen.reads
        assert not seen.copies
