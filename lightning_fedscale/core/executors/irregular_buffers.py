"""Buffers that training adds, removes or reshapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_fedscale.utils.buffers import BufferPolicies, Kind


class _Submodule(NamedTuple):
    """A submodule, and each of its buffers with its memory when the round began; None for a buffer that was None."""

    module: nn.Module
    buffers: dict[str, tuple[Tensor, Tensor] | None]

    def irregular(self) -> list[str]:
        """Return the names of buffers that were removed, added, or have another shape."""
        now, before = self.module._buffers, self.buffers
        if len(now) == len(before) and all(name in now and _same(now[name], entry) for name, entry in before.items()):
            return []
        now = dict(now.items())
        return [name for name in {**before, **now} if not _same(now.get(name), before.get(name))]

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


class IrregularBuffers:
    """The buffers that were added, removed or reshaped since the round began; they are in no vector.

    Args:
        submodules: the submodules by name.
        kinds: the policies of the buffers that existed when the round began.
        policies: decide about buffers that first appear in training.
    """

    def __init__(
        self, submodules: Mapping[str, nn.Module], kinds: Mapping[str, Kind], policies: BufferPolicies
    ) -> None:
        self._submodules = {
            path: _Submodule(part, {n: None if b is None else (b, b.detach()) for n, b in part._buffers.items()})
            for path, part in submodules.items()
        }
        self._kinds = kinds
        self._policies = policies

    def names(self) -> list[str]:
        """Return their paths in the module."""
        return [f"{path}.{n}" if path else n for path, part in self._submodules.items() for n in part.irregular()]

    def caches(self) -> list[str]:
        """Return the names of those that the module recomputes; each rank has its own, and they are not exchanged."""
        return [path for path in self.names() if self._policy(path) is None]

    def with_policy(self, policy: str) -> dict[str, Tensor | None]:
        """Return those with a policy by name; None for a buffer that was removed."""
        found = {path: self._find(path) for path in self.names() if self._policy(path) == policy}
        return {path: part.module._buffers.get(name) for path, (part, name) in found.items()}

    def restore(self, *, with_caches: bool = False) -> None:
        """Restore the buffers from the start of the round.

        Args:
            with_caches: whether to restore `caches`, too, which the next client may use.
        """
        for path in self.names():
            if with_caches or self._policy(path) is not None:
                part, name = self._find(path)
                part.restore(name)

    def regular(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a module's state dict with the buffers from the start of the round."""
        state = dict(state)
        for path in self.names():
            part, name = self._find(path)
            if (entry := part.buffers.get(name)) is not None:
                state[path] = entry[1]
            else:
                state.pop(path, None)
        return state

    def put(self, path: str, value: Tensor | None) -> None:
        """Set a buffer of the module to a tensor of any shape, or to None."""
        part, name = self._find(path)
        part.put(name, value)

    def _policy(self, path: str) -> str | None:
        """Return the policy of a buffer; None for a cache."""
        part, name = self._find(path)
        if self._policies.chosen([path]) is None and name in part.module._non_persistent_buffers_set:
            return None
        tensor = part.module._buffers.get(name)
        if path in self._kinds or tensor is None:
            policy = self._kinds[path].policy if path in self._kinds else "largest"
        else:
            policy = self._policies.kind([path], part.module, name, tensor, fitted=False).policy
        private = self._policies.sums_only or self._policies.parameters_only
        return policy if policy in ("client", "server") else "server" if private else "largest"

    def _find(self, path: str) -> tuple[_Submodule, str]:
        owner, _, name = path.rpartition(".")
        return self._submodules[owner], name
