"""Writes of local training to frozen parameters that server and clients do not exchange."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedscale.core.executors.module_walk import Binding
from lightning_fedscale.core.executors.personal_tensors import span_of
from lightning_fedscale.utils.checks import enumerated
from lightning_fedscale.utils.flat_view import as_real

_SAMPLED = 16  # elements of a parameter that are compared, since a write through `.data` changes no version


class FrozenWritten(RuntimeError):
    """Raised when training writes to frozen parameters and can be undone: the round must start again with these.

    Attributes:
        names: their names.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"training writes to frozen parameters: {', '.join(names)}")
        self.names = names


class FrozenGuard:
    """Notices writes to frozen parameters that are in no vector, so that clients need neither read nor restore them.

    While training is watched, a parameter is copied before the first operator that writes to it, so that the write can
    be undone. At other times, versions, addresses and a few elements of each parameter are compared after each client.

    Args:
        bindings: where the module holds these parameters.
        others: the tensors that are exchanged, which training writes to.
        round: index of the round.
        watched_before: how many batches of a client were watched in earlier rounds; 0 watches the whole round. Later
            batches are watched, and, on each rank, the first optimizer step of the first client.
        watches: False if clients cannot be watched; see `can_watch`.
    """

    def __init__(
        self,
        bindings: Sequence[Binding] = (),
        others: Iterable[Tensor] = (),
        round: int = 0,
        *,
        watched_before: int = 0,
        watches: bool = True,
    ) -> None:
        self.whole_round = watched_before == 0
        self._watched_before = watched_before
        self._watches = watches and bool(bindings)
        self._bindings = list(bindings)
        self._others = list(others) if bindings else []
        self._round = round
        self._copies: dict[str, Tensor] = {}
        self._mode: _CopyOnWrite | None = None
        self.open()

    def open(self) -> None:
        """Take the present values as those that clients must leave; call this just before they train."""
        self._bindings = [binding.present() for binding in self._bindings]  # the server may have replaced some
        # A tensor with several names is listed under its first one.
        self._named = list({id(binding.tensor): binding for binding in reversed(self._bindings)}.values())[::-1]
        # Views of one tensor may have one version, which a write to any of them raises.
        in_storage = Counter(map(_storage_of, (*self._others, *(binding.memory for binding in self._named))))
        self._has_version = [in_storage[_storage_of(binding.memory)] == 1 for binding in self._named]
        self._versions = self._versions_now()
        self._samples = _Samples([binding.memory for binding in self._named])
        self._copies.clear()

    @contextmanager
    def watching(self, *, wanted: bool = True) -> Iterator[None]:
        """Copy each parameter before it is written to inside the context, if this is wanted."""
        if not wanted or not self._watches or self._mode is not None:
            yield
            return
        self._mode = _CopyOnWrite(self._named, self._copies)
        try:
            with self._mode:
                yield
        finally:
            self._mode = None

    @contextmanager
    def watching_step(self, client: int | None, batch_idx: int, *, first: bool = False) -> Iterator[None]:
        """Watch a local batch, and check afterwards, if that is due in this round.

        Args:
            client: the client; None for several.
            batch_idx: number of the batch within the client's round.
            first: whether the batch belongs to the first optimizer step of this rank's first client.
        """
        if not self._bindings or not (first or batch_idx >= self._watched_before):
            yield
            return
        with self.watching():
            yield
        if client is not None:
            self.check(client)

    def changed(self) -> bool:
        """Return whether training has written to a parameter since `open`."""
        return any(self._changes())

    def check(self, client: int | None = None) -> None:
        """Raise an error if training has written to a parameter since `open`.

        Args:
            client: the client that trained; None for several.

        Raises:
            FrozenWritten: if the value before is known.
            RuntimeError: if it is lost.
        """
        known, lost = self._changes()
        if lost:
            who = "a client" if client is None else f"client {client}"
            raise RuntimeError(
                f"frozen parameters: {who} wrote to {enumerated(lost)} in round {self._round}, but no client did so"
                " when these parameters were first watched, so their values from before are lost and the global"
                f" model is spoilt: pass FederatedStrategy(buffers={{{lost[0]!r}: 'mean'}}), so that they are exchanged"
                " from the start and the global model takes the mean over clients."
            )
        if known:
            raise FrozenWritten(known)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo all writes whose value before is known."""
        for binding in self._bindings:
            binding.put_back()
        for binding in self._named:
            if (before := self._copies.get(binding.path)) is not None:
                binding.memory.copy_(before)

    def undo(self) -> None:
        """Undo all writes of an attempt that failed.

        Raises:
            RuntimeError: if a value is lost.
        """
        if self._changes()[1]:
            self.check()
        self.restore()
        self.open()

    def _changes(self) -> tuple[list[str], list[str]]:
        """Return the names of parameters that were written to, with known and with lost values before."""
        replaced = {id(binding.tensor) for binding in self._bindings if binding.is_replaced}
        now, sampled = self._versions_now(), self._samples.changed()
        if not replaced and not self._copies and now == self._versions and not any(sampled):
            return [], []
        known = [b.path for b in self._named if id(b.tensor) in replaced or b.path in self._copies]
        changed = zip(self._named, now, self._versions, sampled, strict=True)
        return known, [b.path for b, new, old, s in changed if (new != old or s) and b.path not in self._copies]

    def _versions_now(self) -> list[int]:
        pairs = zip(self._named, self._has_version, strict=True)
        return [version_of(binding.tensor) if has else 0 for binding, has in pairs]


class _Samples:
    """A few elements of each of some tensors, bit by bit."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._views = [_sample(tensor.detach()) for tensor in tensors]
        self._groups: dict[Any, list[int]] = defaultdict(list)
        for number, view in enumerate(self._views):
            self._groups[view.dtype, view.device].append(number)
        self._before = [self._bits(numbers) for numbers in self._groups.values()]

    def changed(self) -> list[bool]:
        """Return for each tensor whether an element has changed."""
        changed = [False] * len(self._views)
        for numbers, before in zip(self._groups.values(), self._before, strict=True):
            if torch.equal(now := self._bits(numbers), before):
                continue
            end = 0
            for number in numbers:
                start, end = end, end + self._views[number].numel() * self._views[number].element_size()
                changed[number] = not torch.equal(now[start:end], before[start:end])
        return changed

    def _bits(self, numbers: list[int]) -> Tensor:
        return torch.cat([self._views[number] for number in numbers]).view(torch.uint8)


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of a few of its elements, as real numbers."""
    tensor = as_real(tensor)
    if not tensor.numel():
        return tensor.reshape(-1)
    tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    while tensor.dim() > 1 and not tensor.is_contiguous():
        tensor = tensor[0]
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    return flat[:: max(1, len(flat) // _SAMPLED)]


class _CopyOnWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a parameter before the first operator that writes to its memory.

    Args:
        bindings: the parameters.
        copies: receives the copies, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, bindings: Iterable[Binding], copies: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies
        self._by_storage: dict[int | None, list[tuple[int, int, Binding]]] = defaultdict(list)
        for binding in bindings:
            start, end = span_of(binding.memory)
            self._by_storage[_storage_of(binding.memory)].append((start, end, binding))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code stay compiled; torch raises versions after it has written."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (places := _WRITTEN.get(func)) is None:
            places = _WRITTEN[func] = _written_arguments(func)
        kwargs = kwargs or {}
        for number, name in places:
            value = args[number] if number < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        found = self._by_storage.get(_storage_of(tensor))
        if found is None:
            return
        first, last = span_of(tensor)
        for start, end, binding in found:
            if first < end and start < last and binding.path not in self._copies:
                self._copies[binding.path] = binding.memory.clone()


_WRITTEN: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written_arguments(operator: Any) -> tuple[tuple[int, str], ...]:
    """Return the position and name of the arguments that an operator writes to."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    aliases = [(number, each.name, each.alias_info) for number, each in enumerate(schema.arguments)]
    return tuple((number, name) for number, name, alias in aliases if alias is not None and alias.is_write)


def _storage_of(tensor: Tensor) -> int | None:
    """Return what identifies a tensor's storage; sparse ones have none."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, not counting writes through its ``.data``."""
    return 0 if tensor.is_inference() else tensor._version


def can_watch(module: nn.Module) -> bool:
    """Return whether watching lets compiled parts of the module stay compiled; earlier versions of torch do not."""
    if hasattr(TorchDispatchMode, "ignore_compile_internals"):
        return True
    return not any(getattr(p, "_compiled_call_impl", None) or hasattr(p, "_orig_mod") for p in module.modules())
