"""Sizes of a model: one definition for each number that is called its size."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn


class ParameterCounts(NamedTuple):
    """Sizes of a model; shared parameters count once.

    Scaling laws use ``active``, averaged over tokens (`Ledger.average_params`), since a model may be pruned, frozen or
    unfrozen while it trains. With LoRA, the adapters are active; if clients have personal layers, as in FedPer, these
    are active too.

    Attributes:
        total: all parameters.
        trainable: parameters with ``requires_grad``.
        non_embedding: parameters outside of embedding tables, frozen or not. The rows of a table are looked up and not
            multiplied; a table that the head shares, by a layer or in its code, is multiplied and counts.
        active: parameters that are trainable, outside of embedding tables, and not pruned by a mask of
            ``torch.nn.utils.prune``.
    """

    total: int
    trainable: int
    non_embedding: int
    active: int


def tables_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the embedding tables that no other layer shares, by name."""
    tables, others = set[int](), set[int]()
    for part in module.modules():
        own = (id(parameter) for parameter in part._parameters.values() if parameter is not None)
        (tables if isinstance(part, nn.Embedding | nn.EmbeddingBag) else others).update(own)
    return {name: p for name, p in module.named_parameters() if id(p) in tables and id(p) not in others}


def count_parameters(module: nn.Module, multiplied: Collection[str] = ()) -> ParameterCounts:
    """Count a model's parameters.

    Args:
        module: the model.
        multiplied: names of embedding tables that its code multiplies, as in ``F.linear(hidden, embedding.weight)``.

    Example:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2), nn.Linear(2, 2, bias=False).requires_grad_(False))
        >>> count_parameters(net)
        ParameterCounts(total=54, trainable=50, non_embedding=14, active=10)
    """
    tables = {id(parameter) for name, parameter in tables_of(module).items() if name not in multiplied}
    pruned: dict[int, int] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            mask = part._buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
            if mask is not None and parameter is not None:
                pruned[id(parameter)] = mask.numel() - int(mask.count_nonzero())
    total = trainable = non_embedding = active = 0
    for parameter in module.parameters():
        size = parameter.numel()
        total += size
        trainable += size * parameter.requires_grad
        if id(parameter) not in tables:
            non_embedding += size
            active += (size - pruned.get(id(parameter), 0)) * parameter.requires_grad
    return ParameterCounts(total, trainable, non_embedding, active)
