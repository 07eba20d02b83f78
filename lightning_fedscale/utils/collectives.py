"""Communication between ranks."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.serialization import default_restore_location


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(vector: Tensor) -> Tensor:
    """Sum a vector over all ranks in place, bit-identical on every rank; a single rank leaves it unchanged."""
    if world_size() > 1:
        dist.all_reduce(vector, op=dist.ReduceOp.SUM)
    return vector


class JointBuffer:
    """A long vector followed by some numbers, in memory that is allocated once and summed in one collective.

    Args:
        vector: initial value of the vector.
        numbers: how many numbers follow it.

    Example:
        >>> joint = JointBuffer(torch.zeros(2), numbers=1)
        >>> vector, numbers = joint.sum_over_ranks(joint.vector.add_(1.0), torch.tensor([5.0]))
        >>> vector.tolist(), numbers.tolist()
        ([1.0, 1.0], [5.0])
    """

    def __init__(self, vector: Tensor, numbers: int) -> None:
        self._length = vector.numel()
        self._buffer = torch.cat([vector, vector.new_zeros(numbers)])

    @property
    def vector(self) -> Tensor:
        """The buffer's part for the vector; values that are written here need not be copied."""
        return self._buffer[: self._length]

    def sum_over_ranks(self, vector: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Sum both over all ranks, and return them as views of the buffer."""
        if vector.data_ptr() != self._buffer.data_ptr():
            self.vector.copy_(vector)
        self._buffer[self._length :].copy_(numbers)
        sum_over_ranks(self._buffer)
        return self.vector, self._buffer[self._length :]


def send(value: Any, to: int, device: torch.device) -> None:
    """Send tensors and primitives to another rank, which must call `receive`."""
    wire = _wire(device)
    data = _packed(value, wire)
    dist.send(torch.tensor([data.numel()], dtype=torch.int64, device=wire), to)
    dist.send(data, to)


def receive(sender: int, device: torch.device) -> Any:
    """Receive the value of another rank's `send`: CPU tensors stay on the CPU, others come to ``device``."""
    wire = _wire(device)
    length = torch.zeros(1, dtype=torch.int64, device=wire)
    dist.recv(length, sender)
    data = torch.empty(int(length), dtype=torch.uint8, device=wire)
    dist.recv(data, sender)
    return _unpacked(data, device)


def broadcast(value: Any, sender: int, device: torch.device) -> Any:
    """Return the sender's tensors and primitives on all ranks; all of them must call it."""
    if world_size() == 1:
        return value
    mine = dist.get_rank() == sender
    data = _packed(value, device) if mine else torch.empty(0, dtype=torch.uint8, device=device)
    length = int(sum_over_ranks(torch.tensor([len(data)], dtype=torch.int64, device=device)))
    return _unpacked(sum_over_ranks(data if mine else data.new_zeros(length)), device)


def _wire(device: torch.device) -> torch.device:
    """Return where tensors must be to be sent to one rank; gloo sends from the CPU only."""
    return torch.device("cpu") if dist.get_backend() == dist.Backend.GLOO else device


def _packed(value: Any, device: torch.device) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(device)


def _unpacked(data: Tensor, device: torch.device) -> Any:
    def place(storage: Any, was_on: str) -> Any:
        return storage if was_on == "cpu" else default_restore_location(storage, str(device))  # type: ignore[no-untyped-call]

    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location=place, weights_only=True)


def gather_over_ranks(value: Any, device: torch.device) -> list[Any]:
    """Return the values of all ranks in their order, passed as JSON; all ranks must call it.

    Example:
        >>> gather_over_ranks({"loss": False}, torch.device("cpu"))
        [{'loss': False}]
    """
    ranks, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    data = json.dumps(value).encode()
    sizes = torch.zeros(ranks, dtype=torch.int64, device=device)
    sizes[rank] = len(data)
    lengths = sum_over_ranks(sizes).tolist()
    rows = torch.zeros(ranks, max(lengths), dtype=torch.uint8, device=device)
    rows[rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = sum_over_ranks(rows).cpu().numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)]


def min_over_ranks(numbers: Tensor) -> Tensor:
    """Take the element-wise minimum over all ranks in place; a single rank leaves the numbers unchanged."""
    if world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return numbers
