"""The tensors of a module that server and clients exchange."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedscale.core.executors.frozen_parameters import version_of
from lightning_fedscale.core.executors.irregular_buffers import IrregularBuffers
from lightning_fedscale.core.executors.module_walk import Binding, ModuleWalk
from lightning_fedscale.core.executors.personal_tensors import PersonalPatterns
from lightning_fedscale.types import ClientUpdate, Params, PendingDelta
from lightning_fedscale.utils.buffers import DEFAULTS, FITTED, BufferPolicies, Fit, Kind, refit
from lightning_fedscale.utils.flat_view import FlatView, as_real


class SharedTensors(NamedTuple):
    """The tensors of a module that server and clients exchange in a round, and those that stay with each client.

    Attributes:
        view: all shared tensors as one vector: trainable parameters, buffers, and frozen parameters that training
            writes to.
        names: names of the shared trainable parameters, in the vector's order.
        trainable: the trainable parameters: shared ones, then personal ones.
        buffers: the buffers in the same order, then the personal frozen parameters.
        frozen: the shared frozen parameters that training writes to, in the vector's order.
        untouched: where the module holds the other shared frozen parameters, which are in no vector.
        trainable_bytes: size of the shared trainable parameters in their own precision.
        buffer_bytes: size of the shared buffers, which a client receives. Frozen parameters do not count, even those
            in the vector.
        sent_buffer_bytes: size of the buffers that a client sends.
        bindings: where the module holds the tensors, except ``untouched``.
        parameters: all parameters, and whether each was trainable when the round began.
        personal: the part of ``trainable`` and ``buffers``, by name, that stays with each client and is not in the
            vector. A tensor with several names is listed under its first one.
        kinds: the policy of each buffer, under all its names.
        largest: shared buffers by name that take the value of the client with the most samples.
        unsure: shared buffers by name that are averaged only by default, with their number in the vector.
        unmoved: shared buffers whose deltas are not summed: the number and elements of each in the vector.
        fits: how to update vectors that depend on weights.
        irregular: the buffers that were added, removed or reshaped since the round began.
    """

    view: FlatView
    names: list[str]
    trainable: Sequence[Tensor]
    buffers: Sequence[Tensor]
    frozen: Sequence[Tensor]
    untouched: list[Binding]
    trainable_bytes: int
    buffer_bytes: int
    sent_buffer_bytes: int
    bindings: list[Binding]
    parameters: list[tuple[nn.Parameter, bool]]
    personal: dict[str, Tensor]
    kinds: dict[str, Kind]
    largest: dict[str, Tensor]
    unsure: dict[str, int]
    unmoved: dict[int, slice]
    fits: list[Fit]
    irregular: IrregularBuffers

    @property
    def all_names(self) -> list[str]:
        """The paths of the trainable parameters, then of the buffers; for messages."""
        paths = {id(binding.tensor): binding.path for binding in reversed(self.bindings)}
        return [paths[id(tensor)] for tensor in (*self.trainable, *self.buffers)]

    @property
    def message_bytes(self) -> int:
        """Bytes that a client sends, before compression."""
        return self.trainable_bytes + self.sent_buffer_bytes

    @property
    def trainable_shared(self) -> Sequence[Tensor]:
        """The trainable parameters that are shared."""
        return self.trainable[: len(self.names)]

    def trainable_views(self, vector: Tensor) -> list[Tensor]:
        """Split a vector of only the shared trainable elements into the parameters' shapes, complex ones as pairs."""
        shapes = [as_real(parameter).shape for parameter in self.trainable_shared]
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def named(self, vector: Tensor) -> Params:
        """Return the trainable part of ``vector`` by parameter name, without a copy."""
        views = self.view.views(vector)[: len(self.names)]
        return dict(zip(self.names, views, strict=True))

    @torch.no_grad()
    def write_personal(self, values: Mapping[str, Tensor]) -> None:
        """Write these values of personal tensors to the module."""
        self._write(self.personal, values)

    def copy_personal(self) -> dict[str, Tensor]:
        """Return copies of the module's personal tensors."""
        own = {name: tensor.detach().clone() for name, tensor in self.personal.items()}
        irregular = self.irregular.with_policy("client")
        return {**own, **{name: value.clone() for name, value in irregular.items() if value is not None}}

    def of_personal(self, state: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the personal entries of a module's state dict, with these values."""
        known = {name: value for name, value in values.items() if name in self.personal}
        addresses = {self.personal[name].data_ptr(): value for name, value in known.items()}
        tensors = {name: entry for name, entry in state.items() if isinstance(entry, Tensor)}
        own = {name: addresses[t.data_ptr()] for name, t in tensors.items() if t.data_ptr() in addresses}
        return {**own, **{name: value for name, value in values.items() if name not in known}}

    def rebind(self) -> None:
        """Restore tensors that training replaced, as in ``self.average = ...`` or ``parameter.data = ...``.

        The new value is copied into the shared tensor, which is put back. A buffer of another shape stays.
        """
        for binding in self.bindings:
            if binding.is_replaced and (now := binding.owner[binding.name]).shape == binding.memory.shape:
                binding.memory.copy_(now.detach())
                binding.put_back()

    def strip(self, update: ClientUpdate) -> None:
        """Zero the elements of a client's delta that are not summed on the server."""
        if isinstance(source := update.source, PendingDelta):
            source.clear(self.unmoved.values())
            return
        for elements in self.unmoved.values():
            update.delta[elements].zero_()

    def copy_largest(self) -> dict[str, Tensor | None]:
        """Return copies of the module's `largest` buffers, and of such buffers that are new, removed or reshaped."""
        irregular = self.irregular.with_policy("largest")
        return {
            **{name: buffer.detach().clone() for name, buffer in self.largest.items()},
            **{name: None if value is None else value.clone() for name, value in irregular.items()},
        }

    @torch.no_grad()
    def write_largest(self, values: Mapping[str, Tensor | None]) -> None:
        """Write these values of `largest` to the module; buffers without a value are unchanged."""
        self._write(self.largest, values)

    def _write(self, known: Mapping[str, Tensor], values: Mapping[str, Tensor | None]) -> None:
        for path, value in values.items():
            if value is not None and path in known and known[path].shape == value.shape:
                known[path].copy_(value)
            else:
                self.irregular.put(path, value)

    def refit(self) -> None:
        """Update the vectors that depend on weights to the module's present weights."""
        refit(self.fits)
        self.rebind()

    def changed_unsure(self, server: FlatView) -> list[str]:
        """Return the names in `unsure` of buffers that differ from these copies."""

        def changed(number: int) -> bool:
            now, before = self.view.tensors[number], server.tensors[number]
            return not bool(((now == before) | (now.isnan() & before.isnan())).all())

        return [name for name, number in self.unsure.items() if changed(number)]

    def put_back(self) -> None:
        """Restore tensors that training replaced, with their original values."""
        self.irregular.restore(with_caches=True)
        for binding in self.bindings:
            binding.put_back()

    def state_of_frozen(self) -> list[tuple[int, int]]:
        """Return the versions and addresses of the frozen parameters; most writes change them."""
        tensors = (*self.frozen, *(binding.tensor for binding in self.untouched))
        return [(version_of(tensor), tensor.data_ptr()) for tensor in tensors]

    def trainable_now(self) -> list[bool]:
        """Return which parameters are trainable now; a client's training may freeze and unfreeze some."""
        return [parameter.requires_grad for parameter, _ in self.parameters]

    def set_trainable(self, flags: Iterable[bool] | None = None) -> None:
        """Set which parameters are trainable; None restores the start of the round."""
        for i, flag in enumerate([at_start for _, at_start in self.parameters] if flags is None else flags):
            if self.parameters[i][0].requires_grad != flag:
                self.parameters[i][0].requires_grad_(flag)

    def origin(self, server: Tensor) -> Tensor:
        """Return the origin of deltas: the global model, with zeros where a carried tensor is not finite.

        A difference would be meaningless there: a mask of -inf minus itself is NaN, and a running minimum that starts
        at inf would be infinitely far from any other value.
        """
        carried = server[self.view.trainable :]
        # If the sum is finite, so is every element; the sum takes no memory.
        if carried.sum().isfinite() or carried.isfinite().all():
            return server
        origin = server.clone()
        origin[self.view.trainable :].nan_to_num_(0.0, 0.0, 0.0)
        return origin


def shared_tensors_of(
    module: nn.Module,
    personal: Sequence[str] = (),
    policies: BufferPolicies = DEFAULTS,
    caches: Collection[str] = (),
    written: Collection[str] | None = None,
) -> SharedTensors:
    """Return the parameters and buffers of ``module``, except those of torchmetrics, whose state Lightning manages.

    Call this every round, since callbacks freeze and unfreeze parameters and pruning replaces them.

    Args:
        module: the user's module.
        personal: patterns of names (`fnmatch`, as in a shell) of parameters and buffers that stay with each client.
        policies: the policies of the other buffers.
        caches: names of buffers that are not exchanged.
        written: names of frozen parameters that training writes to, in the vector's order; None for all. Those that
            ``policies`` name come first.

    Raises:
        ValueError: if a personal tensor is shared under another name.
    """
    walk, patterns = ModuleWalk(module, caches), PersonalPatterns(module, personal)
    moving, own = patterns.divide({name: p for name, p in walk.parameters.items() if p.requires_grad})
    frozen, own_frozen = patterns.divide({name: p for name, p in walk.parameters.items() if not p.requires_grad})
    policies = policies.with_personal(personal)
    kinds = walk.kinds(policies)
    own_buffers = {name: buffer for name, buffer in walk.buffers.items() if kinds[name].policy == "client"}
    buffers = {name: buffer for name, buffer in walk.buffers.items() if name not in own_buffers}
    personal_tensors = {**own, **own_buffers, **own_frozen}
    patterns.check_memory(personal_tensors, {**moving, **buffers, **frozen})
    carried = _carried(frozen, policies, written, others=bool(moving or buffers))
    untouched = {id(tensor) for name, tensor in frozen.items() if name not in carried}
    view = FlatView(list(moving.values()), [*buffers.values(), *carried.values()])
    numbers = {name: number for number, name in enumerate(buffers, len(moving))}
    with_policy = {policy: {n: b for n, b in buffers.items() if kinds[n].policy == policy} for policy in _SENT}
    fitting = {id(buffer) for name, buffer in buffers.items() if kinds[name].policy == FITTED}
    return SharedTensors(
        view=view,
        names=list(moving),
        trainable=[*moving.values(), *own.values()],
        buffers=[*buffers.values(), *own_buffers.values(), *own_frozen.values()],
        frozen=list(carried.values()),
        untouched=[binding for binding in walk.bindings if id(binding.tensor) in untouched],
        trainable_bytes=_bytes_of(moving),
        buffer_bytes=_bytes_of(buffers),
        sent_buffer_bytes=sum(map(_bytes_of, with_policy.values())),
        bindings=[binding for binding in walk.bindings if id(binding.tensor) not in untouched],
        parameters=[(p, p.requires_grad) for p in walk.parameters.values()],
        personal=personal_tensors,
        kinds=kinds,
        largest=with_policy["largest"],
        unsure={name: number for name, number in numbers.items() if not kinds[name].sure},
        unmoved={number: view.elements(number) for name, number in numbers.items() if name not in with_policy["mean"]},
        fits=[fit for fit in walk.fits if any(id(buffer) in fitting for buffer in fit.buffers)],
        irregular=IrregularBuffers(walk.submodules, kinds, policies),
    )


def _carried(
    frozen: Mapping[str, Tensor], policies: BufferPolicies, written: Collection[str] | None, *, others: bool
) -> Mapping[str, Tensor]:
    """Return the frozen parameters that are in the vector."""
    if written is None:
        return frozen
    named = [name for name in frozen if policies.chosen([name]) == "mean"]
    names = dict.fromkeys([*named, *(name for name in written if name in frozen)])
    if not (names or others) and frozen:  # a vector has elements
        names = {min(frozen, key=lambda name: frozen[name].numel()): None}
    return {name: frozen[name] for name in names}


_SENT = ("mean", "largest")  # policies of buffers that clients send


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
