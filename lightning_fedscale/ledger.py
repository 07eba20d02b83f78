"""What a run has spent: FLOPs by purpose and by client, samples and tokens, bytes, seconds."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from lightning_fedscale.types import RoundRecord

KINDS = ("forward_backward", "optimizer", "aggregation", "evaluation")


class ParameterCounts(NamedTuple):
    """Sizes of a model.

    Attributes:
        total: all parameters.
        trainable: those with ``requires_grad``.
        non_embedding: trainable ones outside of embedding tables, whose rows are looked up and not multiplied; a table
            that the head shares counts.
    """

    total: int
    trainable: int
    non_embedding: int


def count_parameters(module: nn.Module) -> ParameterCounts:
    """Count a model's parameters, each once.

    Example:
        >>> count_parameters(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)))
        ParameterCounts(total=50, trainable=50, non_embedding=10)
    """
    tables, others = set[int](), set[int]()
    for part in module.modules():
        (tables if isinstance(part, nn.Embedding | nn.EmbeddingBag) else others).update(
            id(parameter) for parameter in part._parameters.values() if parameter is not None
        )
    every = list(module.parameters())
    trainable = [parameter for parameter in every if parameter.requires_grad]
    return ParameterCounts(
        sum(parameter.numel() for parameter in every),
        sum(parameter.numel() for parameter in trainable),
        sum(parameter.numel() for parameter in trainable if id(parameter) in others or id(parameter) not in tables),
    )


class Ledger:
    """Adds up what a run spends; the same on every rank, and never twice.

    Attributes:
        flops: by kind, over all clients and ranks.
        clients: training FLOPs of each client.
        samples: trained on, every pass counted.
        tokens: the same in tokens.
        upload_bytes: sent by clients.
        download_bytes: sent to clients.
        seconds: of training, on the slowest rank.
        size_tokens: sum of parameters times tokens, for the average size of a model that grows or shrinks.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add_step(flops=6e6, optimizer=0.0, samples=8, tokens=8, params=1000, seconds=0.1)
        >>> ledger.training_flops, ledger.average_params
        (6000000.0, 1000.0)
    """

    def __init__(self) -> None:
        self.flops: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.clients: Counter[int] = Counter()
        self.samples = self.tokens = self.seconds = self.size_tokens = 0.0
        self.upload_bytes = self.download_bytes = 0.0

    @property
    def training_flops(self) -> float:
        """Forward, backward and optimizer: what scaling laws mean by compute."""
        return self.flops["forward_backward"] + self.flops["optimizer"]

    @property
    def average_params(self) -> float:
        """Parameters, averaged over tokens (the average size of arXiv 2501.12486)."""
        return self.size_tokens / self.tokens if self.tokens else 0.0

    def add_step(
        self, *, flops: float, optimizer: float, samples: float, tokens: float, params: int, seconds: float
    ) -> None:
        """A step without clients, on all ranks together."""
        self.flops["forward_backward"] += flops
        self.flops["optimizer"] += optimizer
        self.samples += samples
        self.tokens += tokens
        self.size_tokens += params * tokens
        self.seconds += seconds

    def add_round(self, record: RoundRecord, params: int, exchanged: int) -> None:
        """A round: what its record says of each client, and a multiplication and an addition per number received."""
        for client, flops in zip(record.clients.tolist(), record.flops.tolist(), strict=True):
            self.clients[client] += flops
        self.flops["aggregation"] += 2.0 * exchanged * len(record.clients)
        self.upload_bytes += record.upload_bytes
        self.download_bytes += record.download_bytes
        self.add_step(
            flops=float(record.flops.sum()), optimizer=0.0, samples=float(record.samples.sum()),
            tokens=float(record.tokens.sum()), params=params, seconds=record.seconds,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {**vars(self), "flops": {**self.flops}, "clients": [list(item) for item in self.clients.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self).update({**state, "flops": {**state["flops"]}, "clients": Counter(dict(state["clients"]))})
