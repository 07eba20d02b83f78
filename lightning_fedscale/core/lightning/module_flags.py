"""Changes by callbacks besides values: frozen and pruned parameters, modes, and parameter groups of optimizers."""

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
    """Return all flags by name, as primitives and tensors.

    Args:
        module: the user's module.
        optimizers: its optimizers.
        state: its state dict.
        trainable: by parameter id, whether it counts as trainable, overriding its present flag.
        training: by submodule name, whether it counts as in training mode, overriding its present mode.
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
    """Restore pruning, which Lightning's `ModelPruning` makes permanent in saved models."""
    for name, (original, mask) in flags.get("pruned", {}).items():
        path, _, tensor = name.rpartition(".")
        part = module.get_submodule(path)
        if tensor not in _pruned(part):
            parameter = getattr(part, tensor)
            parameter.data.copy_(original)
            prune.custom_from_mask(part, tensor, mask.to(parameter.device))  # type: ignore[no-untyped-call]


def restore_groups(flags: Mapping[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Restore the optimizers' parameter groups, into which options and state are then loaded."""
    parameters = dict(module.named_parameters())
    for optimizer, saved in zip(optimizers, flags["groups"], strict=False):
        now = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        known = all(name in parameters for names in saved for name in names)
        if known and now != [[id(parameters[name]) for name in names] for names in saved]:
            optimizer.param_groups = [{"params": [parameters[name] for name in names]} for names in saved]


def restore_flags(flags: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Restore which parameters are frozen, and the modes of submodules.

    Returns:
        Names of parameters that were trainable but are frozen in the newly built module, or the other way round.
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
    """Return the names of this submodule's tensors that torch prunes in every forward pass."""
    hooks: Any = part._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def _norms(module: nn.Module) -> list[tuple[str, _NormBase]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _NormBase)]
