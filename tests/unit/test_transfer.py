"""Batches that are copied to a CUDA device while the present one is used, on streams that only count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fedscale.core.executors import transfer

DEVICE = torch.device("cuda", 0)


class Stream:
    """Counts the steps that were launched on it, and knows how many of another stream's it waits for."""

    def __init__(self, device: Any = None) -> None:
        self.launched = self.waits_for = 0

    def wait_stream(self, other: Stream) -> None:
        self.waits_for = other.launched

    def record_event(self) -> int:
        return self.launched

    def wait_event(self, event: int) -> None:
        self.waits_for = event


@dataclass
class Batch:
    """No pytree, like those of tokenizers and of graphs: torch does not find its tensors."""

    x: Tensor


@pytest.mark.parametrize("make", [lambda x: x, lambda x: {"x": x}, Batch], ids=["tensor", "dict", "dataclass"])
def test_a_copy_waits_for_the_steps_whose_batches_it_may_overwrite(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    present, made, missed = Stream(), list[Stream](), list[int]()

    def stream(device: torch.device) -> Stream:
        made.append(Stream())
        return made[-1]

    def copied(batch: Any, device: torch.device) -> Any:
        missed.append(present.launched - made[0].waits_for)
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    monkeypatch.setattr(transfer, "pin_memory", lambda batch: batch)
    monkeypatch.setattr(transfer, "move_data_to_device", copied)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    batches: Iterator[Any] = (make(torch.ones(2)) for _ in range(6))
    for _ in transfer._ahead(batches, DEVICE):
        present.launched += 1
    assert present.launched == 6
    assert missed == [0] * 6
