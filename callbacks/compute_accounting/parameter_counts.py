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


class CurrentParameters:
    """The present parameters of a module, and its size for every choice of trainable ones.

    Args:
        module: the module.

    Attributes:
        multiplied: names of embedding tables that the module's code was seen to multiply.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: list[nn.Parameter] = []
        self._sizes: dict[tuple[bool, ...], ParameterCounts] = {}
        self.multiplied: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Update the list of parameters, which may have been added, removed or pruned."""
        named = dict(self._module.named_parameters())
        pruned = any(name.endswith("_orig") for name in named)
        if pruned or list(map(id, self._parameters)) != list(map(id, named.values())):
            self._parameters, self._sizes = list(named.values()), {}

    @property
    def flags(self) -> tuple[bool, ...]:
        """Which parameters are trainable."""
        return tuple([parameter.requires_grad for parameter in self._parameters])

    @property
    def size(self) -> ParameterCounts:
        """The module's size, with the parameters that are currently trainable."""
        return self.size_of(self.flags)

    def size_of(self, flags: tuple[bool, ...]) -> ParameterCounts:
        """Return the module's size; ``flags`` are the current ones."""
        if (size := self._sizes.get(flags)) is None:
            size = self._sizes[flags] = count_parameters(self._module, self.multiplied)
        return size

    def tables(self) -> dict[str, nn.Parameter]:
        """Return the embedding tables that are only looked up, by name."""
        return {name: table for name, table in tables_of(self._module).items() if name not in self.multiplied}

    def multiply(self, names: Collection[str]) -> None:
        """Record that the module's code multiplies these tables."""
        self.multiplied.update(names)
        self._sizes = {}
