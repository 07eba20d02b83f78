"""What callbacks change of a module and its optimizers besides values: what is frozen or pruned, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import prune
from torch.optim import Optimizer


def flags_of(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any],
    trainable: Mapping[int, bool],
    training: Mapping[str, bool],
) -> dict[str, Any]:
    """All of it by name, in primitives and tensors.

    Args:
        module: the user's.
        optimizers: its optimizers.
        state: its state dict.
        trainable: parameters, by id, that count as trainable or frozen whatever they are now.
        training: submodules, by name, that count as in training or evaluation mode whatever they are now.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "pruned": {
            f"{path}.{tensor}".lstrip("."): [state[f"{path}.{tensor}_{kind}".lstrip(".")] for kind in ("orig", "mask")]
            for path, part in module.named_modules()
            for tensor in _pruned(part)
        },
        "trainable": {name: trainable.get(id(p), p.requires_grad) for name, p in module.named_parameters()},
        "training": {name: training.get(name, part.training) for name, part in module.named_modules()},
        "statistics": {name: part.track_running_stats for name, part in _norms(module)},
        "groups": [
            [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
            for optimizer in optimizers
        ],
    }


def restore_pruning(flags: Mapping[str, Any], module: nn.Module) -> None:
    """Prune again what was pruned; Lightning's `ModelPruning` saves models in which pruning is permanent."""
    for name, (original, mask) in flags.get("pruned", {}).items():
        path, _, tensor = name.rpartition(".")
        part = module.get_submodule(path)
        if tensor not in _pruned(part):
            parameter = getattr(part, tensor)
            parameter.data.copy_(original)
            prune.custom_from_mask(part, tensor, mask.to(parameter.device))  # type: ignore[no-untyped-call]


def restore_groups(flags: Mapping[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Give the optimizers the groups of parameters that they had; options and state are loaded into these."""
    parameters = dict(module.named_parameters())
    for optimizer, saved in zip(optimizers, flags["groups"], strict=False):
        now = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        known = all(name in parameters for names in saved for name in names)
        if known and now != [[id(parameters[name]) for name in names] for names in saved]:
            optimizer.param_groups = [{"params": [parameters[name] for name in names]} for names in saved]


def restore_flags(flags: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Freeze, unfreeze and set modes as they were.

    Returns:
        Names of parameters that were trainable and are not in the module as it was built, or the other way round.
    """
    changed = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad != flags["trainable"].get(name, parameter.requires_grad):
            parameter.requires_grad_(not parameter.requires_grad)
            changed.append(name)
    for name, part in module.named_modules():
        part.training = flags["training"].get(name, part.training)
    for name, part in _norms(module):
        part.track_running_stats = flags["statistics"].get(name, part.track_running_stats)
    return changed


def _pruned(part: nn.Module) -> list[str]:
    """Names of the tensors of this part of a module that torch prunes in every forward pass."""
    hooks: Any = part._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def _norms(module: nn.Module) -> list[tuple[str, _NormBase]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _NormBase)]
