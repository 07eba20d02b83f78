"""What one rank sends to another, by the backend between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fedscale.utils import collectives

DEVICE = torch.device("meta")  # stands for a GPU: it is not the CPU


@pytest.mark.parametrize(("backend", "wire"), [("gloo", "cpu"), ("nccl", "meta")])
def test_gloo_sends_from_the_cpu(backend: str, wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "send", lambda tensor, to: sent.append(tensor))
    collectives.send({"a": torch.arange(3.0)}, 1, DEVICE)
    assert [tensor.device.type for tensor in sent] == [wire] * 2
    assert [tensor.dtype for tensor in sent] == [torch.int64, torch.uint8]


CPU, UNPACKED = torch.device("cpu"), collectives._unpacked


def test_what_gloo_receives_comes_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, placed = list[Tensor](), list[str]()

    def unpacked(data: Tensor, device: torch.device) -> Any:
        placed.append(device.type)
        return UNPACKED(data, CPU)

    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "send", lambda tensor, to: sent.append(tensor))
    monkeypatch.setattr(dist, "recv", lambda tensor, sender: tensor.copy_(sent.pop(0)))
    monkeypatch.setattr(collectives, "_unpacked", unpacked)
    collectives.send({"a": torch.arange(3.0), "b": 5}, 1, DEVICE)
    found = collectives.receive(0, DEVICE)
    assert found["a"].tolist() == [0.0, 1.0, 2.0]
    assert found["b"] == 5
    assert placed == ["meta"]
