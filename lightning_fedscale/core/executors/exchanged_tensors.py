"""The tensors of a module that server and clients exchange."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedscale.types import Params
from lightning_fedscale.utils.buffers import DEFAULTS, FITTED, BufferPolicies, Fit, Kind, fits_of, refit
from lightning_fedscale.utils.flat_view import FlatView, as_real


class _Place(NamedTuple):
    """A tensor of a module, its memory, and where the module holds it."""

    owner: MutableMapping[str, Any]
    name: str
    tensor: Tensor
    memory: Tensor
    path: str


class _Part(NamedTuple):
    """A submodule, and each of its buffers with its memory when the round began; None for a buffer that was None."""

    module: nn.Module
    buffers: dict[str, tuple[Tensor, Tensor] | None]

    def odd(self) -> list[str]:
        """Return the names of buffers that were removed, added, or have another shape."""
        now, before = self.module._buffers, self.buffers
        if len(now) == len(before) and all(name in now and _same(now[name], entry) for name, entry in before.items()):
            return []
        now = dict(now.items())
        return [name for name in {**before, **now} if not _same(now.get(name), before.get(name))]

    def is_cache(self, name: str) -> bool:
        """Return whether the module can recompute a buffer."""
        return name in self.module._non_persistent_buffers_set

    def restore(self, name: str) -> None:
        """Restore a buffer from the start of the round."""
        if (entry := self.buffers.get(name)) is not None:
            tensor, memory = entry
            tensor.data = memory
            self.module._buffers[name] = tensor
        elif name in self.buffers:
            self.module._buffers[name] = None
        else:
            del self.module._buffers[name]

    def put(self, name: str, value: Tensor | None) -> None:
        """Set a buffer to a tensor of any shape, or to None, whatever it is now."""
        if value is not None and (entry := self.buffers.get(name)) is not None:
            entry[0].data = value.to(entry[0].dtype, copy=True)
            value = entry[0]
        elif value is not None:
            value = value.clone()
        if name in self.module._buffers:
            self.module._buffers[name] = value
        else:
            self.module.register_buffer(name, value)


def _same(now: Tensor | None, entry: tuple[Tensor, Tensor] | None) -> bool:
    return now is None if entry is None else now is entry[0] and now.shape == entry[1].shape


class _Home(NamedTuple):
    """The submodule that holds a buffer, its name there, and its names in the module."""

    part: nn.Module
    name: str
    names: list[str]


class Exchange(NamedTuple):
    """The exchanged tensors of a module at the start of a round.

    Attributes:
        view: all shared tensors as one vector: trainable parameters, buffers, frozen parameters.
        names: names of the shared trainable parameters, in the vector's order.
        trainable: the trainable parameters: shared ones, then personal ones.
        buffers: the buffers in the same order, then the personal frozen parameters.
        frozen: the shared frozen parameters.
        trainable_bytes: size of the shared trainable parameters in their own precision.
        buffer_bytes: size of the shared buffers, which a client receives. Frozen parameters are in the vector (some
            modules write to them) but are not sent.
        sent_buffer_bytes: size of the buffers that a client sends.
        places: where the module holds the tensors.
        parameters: all parameters, and whether each was trainable when the round began.
        personal: the part of ``trainable`` and ``buffers``, by name, that stays with each client and is not in the
            vector. A tensor with several names is listed under its first one.
        kinds: the policy of each buffer, under all its names.
        largest: shared buffers by name that take the value of the client with the most samples.
        unsure: shared buffers by name that are averaged only by default, with their number in the vector.
        unmoved: shared buffers whose deltas are not summed: the number and elements of each in the vector.
        fits: how to update vectors that depend on weights.
        parts: the submodules by name, with their buffers.
        policies: decide about buffers that first appear in training.
    """

    view: FlatView
    names: list[str]
    trainable: Sequence[Tensor]
    buffers: Sequence[Tensor]
    frozen: Sequence[Tensor]
    trainable_bytes: int
    buffer_bytes: int
    sent_buffer_bytes: int
    places: list[_Place]
    parameters: list[tuple[nn.Parameter, bool]]
    personal: dict[str, Tensor]
    kinds: dict[str, Kind]
    largest: dict[str, Tensor]
    unsure: dict[str, int]
    unmoved: dict[int, slice]
    fits: list[Fit]
    parts: dict[str, _Part]
    policies: BufferPolicies

    @property
    def all_names(self) -> list[str]:
        """The paths of the trainable parameters, then of the buffers; for messages."""
        paths = {id(place.tensor): place.path for place in reversed(self.places)}
        return [paths[id(tensor)] for tensor in (*self.trainable, *self.buffers)]

    @property
    def message_bytes(self) -> int:
        """Bytes that a client sends, before compression."""
        return self.trainable_bytes + self.sent_buffer_bytes

    @property
    def shared(self) -> Sequence[Tensor]:
        """The trainable parameters that are shared."""
        return self.trainable[: len(self.names)]

    def trainable_views(self, vector: Tensor) -> list[Tensor]:
        """Split a vector of only the shared trainable elements into the parameters' shapes, complex ones as pairs."""
        shapes = [as_real(parameter).shape for parameter in self.shared]
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def named(self, vector: Tensor) -> Params:
        """Return the trainable part of ``vector`` by parameter name, without a copy."""
        views = self.view.views(vector)[: len(self.names)]
        return dict(zip(self.names, views, strict=True))

    @torch.no_grad()
    def write_personal(self, values: Mapping[str, Tensor]) -> None:
        """Write these values of personal tensors to the module."""
        self._show(self.personal, values)

    def copy_personal(self) -> dict[str, Tensor]:
        """Return copies of the module's personal tensors."""
        own = {name: tensor.detach().clone() for name, tensor in self.personal.items()}
        return {**own, **{name: value.clone() for name, value in self._odd("client").items() if value is not None}}

    def of_personal(self, state: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the personal entries of a module's state dict, with these values."""
        known = {name: value for name, value in values.items() if name in self.personal}
        addresses = {self.personal[name].data_ptr(): value for name, value in known.items()}
        tensors = {name: entry for name, entry in state.items() if isinstance(entry, Tensor)}
        own = {name: addresses[t.data_ptr()] for name, t in tensors.items() if t.data_ptr() in addresses}
        return {**own, **{name: value for name, value in values.items() if name not in known}}

    def settle(self) -> None:
        """Restore tensors that training replaced, as in ``self.average = ...`` or ``parameter.data = ...``.

        The new value is copied into the exchanged tensor, which is put back. A buffer of another shape stays.
        """
        for owner, name, tensor, memory, _ in self.places:
            now = owner[name] if name in owner else None  # noqa: SIM401 (scripted modules' have no `get`)
            if now is None or (now is tensor and now.data_ptr() == memory.data_ptr()) or now.shape != memory.shape:
                continue
            memory.copy_(now.detach())
            tensor.data = memory
            owner[name] = tensor

    def strip(self, delta: Tensor) -> None:
        """Zero the elements of a client's delta that are not summed on the server."""
        for elements in self.unmoved.values():
            delta[elements].zero_()

    def copy_largest(self) -> dict[str, Tensor | None]:
        """Return copies of the module's `largest` buffers, and of such buffers that are new, removed or reshaped."""
        odd = {name: None if value is None else value.clone() for name, value in self._odd("largest").items()}
        return {**{name: buffer.detach().clone() for name, buffer in self.largest.items()}, **odd}

    @torch.no_grad()
    def write_largest(self, values: Mapping[str, Tensor | None]) -> None:
        """Write these values of `largest` to the module; buffers without a value are unchanged."""
        self._show(self.largest, values)

    def odd(self) -> list[str]:
        """Return the names of all buffers that were added, removed or reshaped since the round began."""
        return [f"{path}.{name}" if path else name for path, part in self.parts.items() for name in part.odd()]

    def caches(self) -> list[str]:
        """Return the names in `odd` that the module recomputes; each rank has its own, and they are not exchanged."""
        return [path for path in self.odd() if self._policy(path) is None]

    def restore(self) -> None:
        """Restore the buffers from the start of the round, except `caches`, which the next client may use."""
        for path in self.odd():
            if self._policy(path) is not None:
                part, name = self._find(path)
                part.restore(name)

    def regular(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a module's state dict with the buffers from the start of the round."""
        state = dict(state)
        for path in self.odd():
            part, name = self._find(path)
            if (entry := part.buffers.get(name)) is not None:
                state[path] = entry[1]
            else:
                state.pop(path, None)
        return state

    def _show(self, known: Mapping[str, Tensor], values: Mapping[str, Tensor | None]) -> None:
        for path, value in values.items():
            if value is not None and path in known and known[path].shape == value.shape:
                known[path].copy_(value)
            else:
                part, name = self._find(path)
                part.put(name, value)

    def _odd(self, policy: str) -> dict[str, Tensor | None]:
        found = {path: self._find(path) for path in self.odd() if self._policy(path) == policy}
        return {path: part.module._buffers.get(name) for path, (part, name) in found.items()}

    def _policy(self, path: str) -> str | None:
        """Return the policy of a buffer whose shape varies; None for a cache."""
        part, name = self._find(path)
        if self.policies.chosen([path]) is None and part.is_cache(name):
            return None
        tensor = part.module._buffers.get(name)
        if path in self.kinds or tensor is None:
            policy = self.kinds[path].policy if path in self.kinds else "largest"
        else:
            policy = self.policies.kind([path], part.module, name, tensor, fitted=False).policy
        private = self.policies.sums_only or self.policies.parameters_only
        return policy if policy in ("client", "server") else "server" if private else "largest"

    def _find(self, path: str) -> tuple[_Part, str]:
        owner, _, name = path.rpartition(".")
        return self.parts[owner], name

    def refit(self) -> None:
        """Update the vectors that depend on weights to the module's present weights."""
        refit(self.fits)
        self.settle()

    def changed_unsure(self, server: Tensor) -> list[str]:
        """Return the names in `unsure` of buffers that differ from this vector."""
        views = self.view.views(server)

        def changed(number: int) -> bool:
            now, before = self.view.value(number), views[number]
            return not bool(((now == before) | (now.isnan() & before.isnan())).all())

        return [name for name, number in self.unsure.items() if changed(number)]

    def put_back(self) -> None:
        """Restore tensors that training replaced, with their original values."""
        for path in self.odd():
            part, name = self._find(path)
            part.restore(name)
        for owner, name, tensor, memory, _ in self.places:
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            if name not in owner or owner[name] is not tensor:
                owner[name] = tensor

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


def exchange_of(
    module: nn.Module,
    personal: Sequence[str] = (),
    policies: BufferPolicies = DEFAULTS,
    caches: Collection[str] = (),
) -> Exchange:
    """Return the parameters and buffers of ``module``, except those of torchmetrics, whose state Lightning manages.

    Call this every round, since callbacks freeze and unfreeze parameters and pruning replaces them.

    Args:
        module: the user's module.
        personal: patterns of names (`fnmatch`, as in a shell) of parameters and buffers that stay with each client.
        policies: the policies of the other buffers.
        caches: names of buffers that are not exchanged.

    Raises:
        ValueError: if a personal tensor is shared under another name.
    """
    places: list[_Place] = []
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    homes: dict[int, _Home] = {}
    seen: set[int] = set()
    left_out: set[int] = set()
    fits: list[Fit] = []
    parts: dict[str, _Part] = {}
    metrics: set[nn.Module] = set()
    # The order is that of `named_parameters` and `buffers`, each of which would walk through all modules.
    for path, part in module.named_modules():
        if isinstance(part, Metric):
            left_out |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
            metrics.update(part.modules())
        prefix = f"{path}." if path else ""
        fits += fits_of(part)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.append(_Place(part._parameters, name, parameter, parameter.detach(), prefix + name))
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[prefix + name] = parameter
        for name, buffer in part._buffers.items():
            if buffer is not None:
                if _is_constant(buffer) or prefix + name in caches:
                    left_out.add(id(buffer))
                homes.setdefault(id(buffer), _Home(part, name, [])).names.append(prefix + name)
                places.append(_Place(part._buffers, name, buffer, buffer.detach(), prefix + name))
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    buffers[prefix + name] = buffer
        if part not in metrics:
            parts[path] = _Part(part, {n: None if b is None else (b, b.detach()) for n, b in part._buffers.items()})
    if left_out:
        places = [place for place in places if id(place.tensor) not in left_out]
        parameters = {name: p for name, p in parameters.items() if id(p) not in left_out}
        buffers = {name: b for name, b in buffers.items() if id(b) not in left_out}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    own_ids = _own(module, personal) if personal else set()
    moving, own = _apart(trainable, own_ids)
    frozen, own_frozen = _apart({name: p for name, p in parameters.items() if not p.requires_grad}, own_ids)
    policies = policies.with_personal(personal)
    fitted = {id(buffer) for fit in fits for buffer in fit.buffers}
    kinds: dict[str, Kind] = {}
    for buffer in buffers.values():
        home = homes[id(buffer)]
        kind = policies.kind(home.names, home.part, home.name, buffer, id(buffer) in fitted)
        kinds |= dict.fromkeys(home.names, kind)
    own_buffers = {name: buffer for name, buffer in buffers.items() if kinds[name].policy == "client"}
    kept = {name: buffer for name, buffer in buffers.items() if name not in own_buffers}
    if personal:
        _check_apart(personal, {**own, **own_buffers, **own_frozen}, {**moving, **kept, **frozen})
    view = FlatView(list(moving.values()), [*kept.values(), *frozen.values()])
    numbers = {name: number for number, name in enumerate(kept, len(moving))}
    unmoved = {name for name in kept if kinds[name].policy != "mean"}
    sent = {name: buffer for name, buffer in kept.items() if kinds[name].policy in ("mean", "largest")}
    fitting = {id(buffer) for name, buffer in kept.items() if kinds[name].policy == FITTED}
    return Exchange(
        view,
        list(moving),
        [*moving.values(), *own.values()],
        [*kept.values(), *own_buffers.values(), *own_frozen.values()],
        list(frozen.values()),
        _bytes_of(moving),
        _bytes_of(kept),
        _bytes_of(sent),
        places,
        [(p, p.requires_grad) for p in parameters.values()],
        {**own, **own_buffers, **own_frozen},
        kinds,
        {name: buffer for name, buffer in kept.items() if kinds[name].policy == "largest"},
        {name: numbers[name] for name in kept if not kinds[name].sure},
        {numbers[name]: view.elements(numbers[name]) for name in unmoved},
        [fit for fit in fits if any(id(buffer) in fitting for buffer in fit.buffers)],
        parts,
        policies,
    )


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _apart(tensors: dict[str, Any], own: set[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split tensors into shared and personal ones."""
    mine = {name: tensor for name, tensor in tensors.items() if id(tensor) in own}
    return {name: tensor for name, tensor in tensors.items() if name not in mine}, mine


def _own(module: nn.Module, personal: Sequence[str]) -> set[int]:
    """Return the ids of the tensors of which all names match the patterns."""
    names: dict[int, dict[str, bool]] = {}
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names.setdefault(id(tensor), {})[name] = any(fnmatchcase(name, pattern) for pattern in personal)
    for matches in names.values():
        if len(set(matches.values())) > 1:
            own, shared = (next(name for name, match in matches.items() if match is which) for which in (True, False))
            raise ValueError(
                f"personal={list(personal)!r} matches {own!r}, which is one tensor with {shared!r}, and that is not"
                f" matched: add {shared!r} to keep the tensor with each client under all its names, or untie them."
            )
    return {number for number, matches in names.items() if all(matches.values())}


def _check_apart(personal: Sequence[str], own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raise an error if personal and shared tensors overlap: parameters tied by their ``.data``, or views."""
    reach = {True: (0, ""), False: (0, "")}  # end of the personal and of the shared memory so far
    tensors = [(tensor, name, mine) for mine, part in ((True, own), (False, others)) for name, tensor in part.items()]
    for start, end, name, mine in sorted((*_span(tensor), name, mine) for tensor, name, mine in tensors):
        until, other = reach[not mine]
        if start < until:
            kept, shared = (name, other) if mine else (other, name)
            raise ValueError(
                f"personal={list(personal)!r} matches {kept!r}, which lies in one memory with {shared!r}, and that is"
                f" not matched: add {shared!r} to keep both with each client, or give them memory of their own."
            )
        reach[mine] = max(reach[mine], (end, name))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's start and end."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _is_constant(buffer: Tensor) -> bool:
    """Return whether training cannot write to a buffer in place: it is sparse, or expanded with shared elements."""
    if buffer.layout != torch.strided:
        return True
    return any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
