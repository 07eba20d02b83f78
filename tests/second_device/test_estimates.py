"""The memory of clients' own devices does not depend on the device that simulates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale.devices import estimate_memory
from tests.networks import Classifier, images, mlp, resnet18, vectors
from tests.second_device.device import DEVICE

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (mlp, vectors),
    "resnet18": (lambda: resnet18(width=4), lambda samples: images(samples, 16)),
}
PLACES: set[str] = set()  # where steps of a copy ran


class Noting(Classifier):
    """Notes where its steps run."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        PLACES.update(tensor.device.type for tensor in (*batch, *self.parameters()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("device", ["other", "cpu"])
@pytest.mark.parametrize("kind", ["mlp", "resnet18"])
def test_a_client_s_own_device(kind: str, device: str) -> None:
    make, batch_of = KINDS[kind]
    module = Noting(make())
    expected = estimate_memory(module, batch_of(2), device=device).peak(8)
    module.to_empty(device=DEVICE)
    PLACES.clear()
    found = estimate_memory(module, batch_of(2), device=device)
    assert found.peak(8) == expected
    assert {"cpu"} == PLACES
    assert torch.device(DEVICE).type == next(module.parameters()).device.type
