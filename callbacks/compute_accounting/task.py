"""What a law needs to know of a task: whether it is language modelling, and the model's size as the law counts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_fedscale.callbacks.compute_accounting.parameter_counts import ParameterCounts, tables_of
from lightning_fedscale.scaling import Law

_INTEGERS = (torch.int32, torch.int64)


def has_targets_for_tokens(batch: Any) -> bool:
    """Return whether a batch consists of integers with an integer target for each.

    Categories of a table, and texts with one label each, are integers as well, but are not language modelling.
    """
    leaves = [leaf for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if _is_tensor(leaf)]
    if not leaves or not _is_text(leaves[0]):
        return False
    shape = leaves[0].shape
    # There are as many targets as tokens, or one less if the module shifts them itself; or targets are the tokens.
    targets = [leaf for leaf in leaves[1:] if _is_text(leaf) and leaf.shape[0] == shape[0]]
    has_targets = any(abs(leaf.shape[1] - shape[1]) <= 1 for leaf in targets)
    return has_targets or all(leaf.ndim == 2 and not leaf.is_floating_point() for leaf in leaves)


def predicts_its_tokens(module: nn.Module, size: ParameterCounts) -> bool:
    """Return whether a module scores every row of a table that it reads, as one does for a vocabulary.

    Args:
        module: the module.
        size: current size of the module.
    """
    return bool(_heads(module) or _tied(module, size))


def size_by(law: Law, active: float, module: nn.Module, size: ParameterCounts) -> float:
    """Return a model's size as a law counts it (`Law.counts`).

    Args:
        law: the law.
        active: trained parameters outside of embedding tables, averaged over tokens.
        module: the module.
        size: current size of the module.
    """
    if law.counts == "all":
        return active + max(0, min(size.total - size.non_embedding, size.trainable - size.active))
    if law.counts == "blocks":
        heads = sum(parameter.numel() * parameter.requires_grad for parameter in _heads(module))
        return active - min(heads + _tied(module, size), 0.99 * active)
    return active


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _is_text(leaf: Tensor) -> bool:
    return leaf.dtype in _INTEGERS and leaf.ndim == 2


def _heads(module: nn.Module) -> list[Tensor]:
    """Return weights of linear layers over the vocabulary of an embedding table, or the table itself if it is tied."""
    rows = {part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)}
    found = {id(part.weight): part.weight for part in module.modules() if isinstance(part, nn.Linear)}
    return [weight for weight in found.values() if weight.shape[0] in rows]


def _tied(module: nn.Module, size: ParameterCounts) -> int:
    """Return the number of parameters of tables that the module's code multiplies and no other layer shares."""
    return max(0, sum(table.numel() for table in tables_of(module).values()) - (size.total - size.non_embedding))
