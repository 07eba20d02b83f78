"""The tensors of a module, and where the module holds them."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchmetrics import Metric

from lightning_fedscale.utils.buffers import BufferPolicies, Fit, Kind, fits_of


class Binding(NamedTuple):
    """A tensor of a module, its memory, and where the module holds it."""

    owner: MutableMapping[str, Any]
    name: str
    tensor: Tensor
    memory: Tensor
    path: str

    @property
    def is_replaced(self) -> bool:
        """Whether the module has another tensor there, or the tensor has other memory, as after ``p.data = ...``."""
        now = self.owner[self.name] if self.name in self.owner else None  # noqa: SIM401 (scripted modules' have no `get`)
        return now is not None and (now is not self.tensor or now.data_ptr() != self.memory.data_ptr())

    def present(self) -> Binding:
        """Return the tensor that the module has there now, if any."""
        now = self.owner[self.name] if self.name in self.owner else None  # noqa: SIM401
        return self if now is None else self._replace(tensor=now, memory=now.detach())

    def put_back(self) -> None:
        """Restore the tensor and its memory in the module."""
        if self.tensor.data_ptr() != self.memory.data_ptr():
            self.tensor.data = self.memory
        if self.name not in self.owner or self.owner[self.name] is not self.tensor:
            self.owner[self.name] = self.tensor


class _Home(NamedTuple):
    """The submodule that holds a buffer, its name there, and its names in the module."""

    submodule: nn.Module
    name: str
    names: list[str]


class ModuleWalk:
    """The parameters and buffers of a module, except those of torchmetrics, constants and caches.

    Constants are tensors that training cannot write to in place; frozen parameters are constants if they are sparse or
    tensor subclasses that wrap others, as quantized weights are.

    All are found in one walk, in the order of `named_parameters` and `named_buffers`, each of which would walk through
    all submodules.

    Args:
        module: the user's module.
        caches: names of buffers that are left out.

    Attributes:
        bindings: where the module holds the tensors.
        parameters: the parameters by their first names.
        buffers: the buffers by their first names.
        fits: how to update vectors that depend on weights.
        submodules: the submodules by name, except those of torchmetrics.
    """

    def __init__(self, module: nn.Module, caches: Collection[str] = ()) -> None:
        self.bindings: list[Binding] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self.fits: list[Fit] = []
        self.submodules: dict[str, nn.Module] = {}
        self._homes: dict[int, _Home] = {}
        known: set[int] = set()
        left_out: set[int] = set()
        metrics: set[nn.Module] = set()
        for path, part in module.named_modules():
            if isinstance(part, Metric):
                left_out |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
                metrics.update(part.modules())
            prefix = f"{path}." if path else ""
            self.fits += fits_of(part)
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if not parameter.requires_grad and not _has_memory(parameter):
                        left_out.add(id(parameter))
                    self._bind(part._parameters, name, parameter, prefix, self.parameters, known)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    if _is_constant(buffer) or prefix + name in caches:
                        left_out.add(id(buffer))
                    self._homes.setdefault(id(buffer), _Home(part, name, [])).names.append(prefix + name)
                    self._bind(part._buffers, name, buffer, prefix, self.buffers, known)
            if part not in metrics:
                self.submodules[path] = part
        if left_out:
            self.bindings = [binding for binding in self.bindings if id(binding.tensor) not in left_out]
            self.parameters = {name: p for name, p in self.parameters.items() if id(p) not in left_out}
            self.buffers = {name: b for name, b in self.buffers.items() if id(b) not in left_out}

    def _bind(
        self,
        owner: MutableMapping[str, Any],
        name: str,
        tensor: Any,
        prefix: str,
        by_name: dict[str, Any],
        known: set[int],
    ) -> None:
        self.bindings.append(Binding(owner, name, tensor, tensor.detach(), prefix + name))
        if id(tensor) not in known:
            known.add(id(tensor))
            by_name[prefix + name] = tensor

    def kinds(self, policies: BufferPolicies) -> dict[str, Kind]:
        """Return the policy of each buffer, under all its names."""
        fitted = {id(buffer) for fit in self.fits for buffer in fit.buffers}
        kinds: dict[str, Kind] = {}
        for buffer in self.buffers.values():
            home = self._homes[id(buffer)]
            kind = policies.kind(home.names, home.submodule, home.name, buffer, id(buffer) in fitted)
            kinds |= dict.fromkeys(home.names, kind)
        return kinds


def _is_constant(buffer: Tensor) -> bool:
    """Return whether training cannot write to a buffer in place: it has no memory, or elements that share it."""
    if not _has_memory(buffer):
        return True
    return any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has its own memory: it is not sparse, and no subclass that wraps other tensors."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
