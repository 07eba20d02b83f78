"""Copies of modules and batches, real or fake, for steps that must leave the originals alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_fedscale.devices.profiling.batches import TensorCopies
from lightning_fedscale.devices.profiling.stubs import TrainerView


def copied(module: nn.Module, view: TrainerView, mode: FakeTensorMode | None = None, *, to_cpu: bool = False) -> Any:
    """Copy a module with fake tensors in place of its tensors; without a mode, make a real copy.

    Args:
        module: the module; the Trainer, its strategy, callbacks, loggers and data module are not copied, wherever the
            module keeps them.
        view: replaces the Trainer in the copy.
        mode: makes fake tensors.
        to_cpu: bring the copy to the CPU; otherwise only fake tensors without a device are brought there.
    """
    try:
        with TensorCopies(_detached) if mode is None else FakeCopyMode(mode):
            made: Any = copy.deepcopy(module, view.outside())
    except Exception as error:
        raise TypeError(
            f"module={type(module).__name__} cannot be copied for a dry run ({type(error).__name__}: {error}): leave"
            " out what cannot be copied in __getstate__, or create it later."
        ) from error
    if mode is not None:
        _bring_to_cpu(made, whole=to_cpu)
    elif to_cpu:
        made.cpu()
    for name in ("forward", "training_step", "validation_step"):
        compiled = getattr(vars(made).get(name), "_torchdynamo_orig_callable", None)
        if compiled is not None and getattr(compiled, "__func__", None) is getattr(type(made), name, None):
            del vars(made)[name]  # of torch.compile, which Lightning puts into the instance: it runs the original
    for parameter in made.parameters():
        parameter.grad = None
    return made


def copy_of_batch(batch: Any, mode: FakeTensorMode | None = None, *, alias: bool = False) -> Any:
    """Copy a batch, and keep its structure and types.

    Args:
        batch: tensors in any container.
        mode: makes its tensors fake; None for real ones.
        alias: share the tensors' memory instead of copying it.
    """
    copies = TensorCopies(Tensor.detach if alias else _detached) if alias or mode is None else FakeCopyMode(mode)
    try:
        with copies:
            return copy.deepcopy(batch)
    except Exception:
        with copies:  # objects that cannot be copied, such as generators, stay the same
            return tree_map_only(Tensor, copy.deepcopy, batch)


def _detached(tensor: Tensor) -> Tensor | None:
    """Copy a tensor of a graph, such as the last loss in a metric, which `copy.deepcopy` rejects."""
    return None if tensor.is_leaf else tensor.detach().clone()


def _bring_to_cpu(module: nn.Module, *, whole: bool) -> None:
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            tensors: dict[str, Any] = own
            for name, tensor in tensors.items():
                if tensor is not None and (tensor.device.type == "meta" or (whole and tensor.device.type != "cpu")):
                    if id(tensor) not in placed:
                        placed[id(tensor)] = tensor, _on_cpu(tensor)
                    tensors[name] = placed[id(tensor)][1]


def _on_cpu(tensor: Tensor) -> Tensor:
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
