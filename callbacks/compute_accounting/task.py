"""What a law must be told of a task: whether it is language modelling, and how large the model is as the law counts."""

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
    """Whether a batch is integers with an integer target for each.

    Categories of a table, and texts with a label each, are integers as well, and no language.
    """
    leaves = [leaf for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if _is_tensor(leaf)]
    if not leaves or not _is_text(leaves[0]):
        return False
    shape = leaves[0].shape
    # Targets are as many as tokens, or one less where the module shifts them itself; or they are the tokens.
    targets = [leaf for leaf in leaves[1:] if _is_text(leaf) and leaf.shape[0] == shape[0]]
    has_targets = any(abs(leaf.shape[1] - shape[1]) <= 1 for leaf in targets)
    return has_targets or all(leaf.ndim == 2 and not leaf.is_floating_point() for leaf in leaves)


def predicts_its_tokens(module: nn.Module, size: ParameterCounts) -> bool:
    """Whether a module has a score for each row of a table that it reads: the vocabulary, and not so many labels.

    Args:
        module: the module.
        size: of the module, as it is now.
    """
    return bool(_heads(module) or _tied(module, size))


def size_by(law: Law, active: float, module: nn.Module, size: ParameterCounts) -> float:
    """A model's size as a law counts it (`Law.counts`).

    Args:
        law: the law.
        active: parameters that are trained, outside of embedding tables, averaged over tokens.
        module: the module.
        size: of the module, as it is now.
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
    """Weights of linear layers over the vocabulary of an embedding table; the table itself where they share it."""
    rows = {part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)}
    found = {id(part.weight): part.weight for part in module.modules() if isinstance(part, nn.Linear)}
    return [weight for weight in found.values() if weight.shape[0] in rows]


def _tied(module: nn.Module, size: ParameterCounts) -> int:
    """Parameters of tables that the module's code multiplies, with no layer that shares them."""
    return max(0, sum(table.numel() for table in tables_of(module).values()) - (size.total - size.non_embedding))
