"""The few things that ranks say to each other."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(vector: Tensor) -> Tensor:
    """The element-wise sum over all ranks, the same bits everywhere; the vector itself with a single rank."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector, op=dist.ReduceOp.SUM)
    return vector


def send(value: Any, to: int, device: torch.device) -> None:
    """Send tensors and primitives to another rank, which must call `receive`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(device)
    dist.send(torch.tensor([data.numel()], dtype=torch.int64, device=device), to)
    dist.send(data, to)


def receive(sender: int, device: torch.device) -> Any:
    """Receive what another rank gives to `send`."""
    length = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(length, sender)
    data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.recv(data, sender)
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location=device, weights_only=True)


def gather_on_zero(value: Any) -> list[Any]:
    """Every rank's value on rank 0, in order of rank; an empty list elsewhere."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    here = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values if here else None, dst=0)
    return values if here else []
