"""Bounded memory for client state between rounds: on the device, then on the host, then in files."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_fedscale.utils.memory import free_memory, is_out_of_memory

_Result = TypeVar("_Result")

# Within a round, the states of its clients are there twice. Data take up to a quarter of the device's free memory, and
# waves up to half of what then is left.
_SHARE_OF_DEVICE = 1 / 8
_SHARE_OF_HOST = 1 / 4
_MAPPED_AT_ONCE = 30_000  # files; the kernel lets a process map 65,530 by default


class Tier(Protocol):
    """A place for states.

    Attributes:
        limit: most bytes of tensors here.
    """

    limit: float

    def keep(self, state: Any) -> Any:
        """Store a state here; return the handle for `read` and `drop`."""

    def read(self, kept: Any, *, mapped: bool = True) -> Any:
        """Return the state, which is read-only; ``mapped`` lets its tensors stay in a file until they are used."""

    def drop(self, kept: Any) -> None:
        """Forget the state."""


class Memory:
    """Keeps states unchanged on the device where training left them.

    Args:
        limit: most bytes of tensors here.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit

    def keep(self, state: Any) -> Any:
        """Return the state itself."""
        return state

    def read(self, kept: Any, *, mapped: bool = True) -> Any:
        """Return the state itself."""
        return kept

    def drop(self, kept: Any) -> None:
        """Do nothing."""


class PinnedMemory(Memory):
    """Keeps copies in the host's pinned memory, from which a CUDA device reads fastest."""

    def keep(self, state: Any) -> Any:
        """Return a pinned copy."""
        return _mapped(_pinned, state)


class Files:
    """Keeps each state in a file, in a private folder inside the system's temporary folder (``TMPDIR``).

    The folder is created when it is first needed, and deleted with this object or the process. A file is never written
    to again, so tensors that were read from it keep their values, even after it is deleted.
    """

    limit = math.inf

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._written = 0

    def keep(self, state: Any) -> Path:
        """Write the state to a new file.

        Raises:
            OSError: if there is no room for it.
        """
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lightning_fedscale-"))
            # Unlike TemporaryDirectory's finalizer, this one also runs at the end of processes that multiprocessing
            # started, and not in forked worker processes.
            Finalize(self, shutil.rmtree, (self._folder,), {"ignore_errors": True}, exitpriority=0)
        self._written += 1
        path = self._folder / f"{self._written}.pt"
        try:
            # On the CPU; of a view, only the view's elements.
            torch.save(_mapped(_alone_on_host, state), path)
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"client_state_memory: a client's state does not fit into it and cannot be written to {path.parent}"
                f" either ({error}): set TMPDIR to a folder with more room, or raise client_state_memory."
            ) from error
        return path

    def read(self, kept: Path, *, mapped: bool = True) -> Any:
        """Return the state in the file."""
        return torch.load(kept, mmap=mapped, weights_only=True)

    def drop(self, kept: Path) -> None:
        """Delete the file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(kept)


def tiers_of(device: torch.device, memory: int | None = None, processes: int = 1) -> list[Tier]:
    """Return the tiers for states of clients that train on ``device``, the nearest first.

    Args:
        device: where clients train.
        memory: most bytes in memory, on device and host together; None for a quarter of the host's free memory and an
            eighth of the device's.
        processes: number of processes that share the host.
    """
    host = int(free_memory(torch.device("cpu")) * _SHARE_OF_HOST) // processes
    if device.type != "cuda":
        return [Memory(host if memory is None else memory), Files()]
    near = int(free_memory(device) * _SHARE_OF_DEVICE)
    if memory is not None:
        near = min(near, memory)
        host = memory - near
    return [Memory(near), PinnedMemory(host), Files()]


class _Entry:
    """A state and its location."""

    __slots__ = ("devices", "kept", "size", "tier")

    def __init__(self, state: Any) -> None:
        self.kept = state
        self.tier = 0
        self.size = size_of(state)
        self.devices: list[torch.device] | None = None  # of its tensors, once it has left them


class StateStore:
    """Stores any number of named states of any number of clients in bounded memory.

    States are staged while a round runs and committed when it is complete, so that an interrupted round leaves no
    trace. When a tier is full, the states that were staged longest ago move to the next one. A staged state replaces
    the committed one only at the commit, but the committed one no longer counts towards the limit once the new one is
    staged. Memory in use may therefore be twice the limits while a round runs.

    A state is made of dicts, lists, tuples, tensors and primitives. It belongs to the store and is read-only.

    Args:
        tiers: the places for states, the nearest first; the last one must have no limit.

    Example:
        >>> store = StateStore([Memory(limit=16), Files()])
        >>> for client in range(3):
        ...     store.stage(client, "control_variate", [torch.full((1,), client, dtype=torch.float64)])
        >>> store.get(2, "control_variate") is None
        True
        >>> store.commit()
        >>> [store.get(client, "control_variate") for client in range(2)]  # client 0's comes from a file
        [[tensor([0.], dtype=torch.float64)], [tensor([1.], dtype=torch.float64)]]
    """

    def __init__(self, tiers: Sequence[Tier] = (Memory(),)) -> None:
        self._tiers = tiers
        # Dicts, since they are ordered: the state that moves next comes first.
        self._queues: list[dict[_Entry, None]] = [{} for _ in tiers]
        self._used = [0] * len(tiers)
        self._committed: dict[str, dict[int, _Entry]] = {}
        self._staged: dict[tuple[str, int], _Entry | None] = {}

    def get(self, client: int, name: str) -> Any | None:
        """Return the client's committed state on the devices where it was staged; None if there is none."""
        entry = self._committed.get(name, {}).get(client)
        if entry is None:
            return None
        state, devices = self._tiers[entry.tier].read(entry.kept), entry.devices
        return state if devices is None else self.with_room(partial(_on, devices, state))

    def with_room(self, make: Callable[[], _Result]) -> _Result:
        """Return ``make()``; if memory runs out, move the states that are nearest to the next tier and try again."""
        try:
            return make()
        except Exception as error:
            if not (is_out_of_memory(error) and self._queues[0] and len(self._tiers) > 1):
                raise
        # Outside of the handler, where no traceback holds what `make` has allocated.
        while self._queues[0]:
            self._move_on(next(iter(self._queues[0])))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        return make()

    def of(self, client: int) -> dict[str, Any]:
        """Return all committed states of a client, by name."""
        return {name: self.get(client, name) for name, entries in self._committed.items() if client in entries}

    def clients(self, name: str) -> Iterable[int]:
        """Return the clients that have a committed state of this name."""
        return self._committed.get(name, {}).keys()

    def stage(self, client: int, name: str, state: Any | None) -> None:
        """Stage the client's state after this round; None forgets it.

        Raises:
            OSError: if there is no room, in memory or for files.
        """
        self._discard(self._staged.pop((name, client), None))
        if (replaced := self._committed.get(name, {}).get(client)) is not None:
            self._leave(replaced)
        self._staged[name, client] = None if state is None else self._join(_Entry(state))
        self._make_room()

    def put(self, client: int, name: str, state: Any | None) -> None:
        """Set the client's committed state at once; None forgets it."""
        entries = self._committed.setdefault(name, {})
        self._discard(entries.pop(client, None))
        if state is not None:
            entries[client] = self._join(_Entry(state))
            self._try_to_make_room()

    def replace(self, client: int, states: dict[str, Any]) -> None:
        """Replace all states of a client by these, given by name."""
        for name in {*self._committed, *states}:
            self.put(client, name, states.get(name))

    def commit(self) -> None:
        """Commit the staged states, since the round is complete."""
        for (name, client), entry in self._staged.items():
            entries = self._committed.setdefault(name, {})
            self._discard(entries.pop(client, None))
            if entry is not None:
                entries[client] = entry
        self._staged = {}

    def rollback(self) -> None:
        """Forget the staged states, since the round did not happen."""
        staged, self._staged = self._staged, {}
        for (name, client), entry in staged.items():
            self._discard(entry)
            if (kept := self._committed.get(name, {}).get(client)) is not None:
                self._join(kept)
        self._try_to_make_room()

    def clear(self) -> None:
        """Forget everything."""
        self.rollback()
        for entries in self._committed.values():
            for entry in entries.values():
                self._discard(entry)
        self._committed = {}

    def snapshot(self) -> dict[str, dict[int, Any]]:
        """Return all committed states by name and client; those in files stay there until they are used."""
        read = 0
        states: dict[str, dict[int, Any]] = {}
        for name, entries in self._committed.items():
            states[name] = {}
            for client, entry in sorted(entries.items()):
                states[name][client] = self._tiers[entry.tier].read(entry.kept, mapped=read < _MAPPED_AT_ONCE)
                read += 1
        return states

    def another(self) -> StateStore:
        """Return an empty store with the same limits."""
        return StateStore(self._tiers)

    def _join(self, entry: _Entry) -> _Entry:
        self._queues[entry.tier][entry] = None
        self._used[entry.tier] += entry.size
        return entry

    def _leave(self, entry: _Entry) -> None:
        if entry in self._queues[entry.tier]:
            del self._queues[entry.tier][entry]
            self._used[entry.tier] -= entry.size

    def _discard(self, entry: _Entry | None) -> None:
        if entry is not None:
            self._leave(entry)
            self._tiers[entry.tier].drop(entry.kept)

    def _make_room(self) -> None:
        for number, tier in enumerate(self._tiers):
            while self._used[number] > tier.limit:
                self._move_on(next(iter(self._queues[number])))

    def _try_to_make_room(self) -> None:
        # No error here, since other ranks may wait for this one. The next `stage` tries again and raises it.
        with contextlib.suppress(OSError):
            self._make_room()

    def _move_on(self, entry: _Entry) -> None:
        state = self._tiers[entry.tier].read(entry.kept)
        kept = self._tiers[entry.tier + 1].keep(state)
        if entry.tier == 0 and any(device.type != "cpu" for device in _devices(state)):
            entry.devices = _devices(state)
        self._discard(entry)
        entry.kept, entry.tier = kept, entry.tier + 1
        self._join(entry)


def size_of(state: Any) -> int:
    """Return the bytes of all tensors in a state."""
    # Pytrees would take ten times as long, and this runs for every client.
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(size_of, state.values()))
    return sum(map(size_of, state)) if isinstance(state, list | tuple) else 0


def placed(state: Any, device: torch.device) -> Any:
    """Return the state with all tensors on a device."""
    return _mapped(lambda tensor: tensor.to(device), state)


def _mapped(change: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tree_map_only(Tensor, change, state)


def _pinned(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def _alone_on_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    whole = tensor.layout != torch.strided or tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _devices(state: Any) -> list[torch.device]:
    return [leaf.device for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _on(devices: list[torch.device], state: Any) -> Any:
    remaining = iter(devices)
    return _mapped(lambda tensor: tensor.to(next(remaining), non_blocking=True), state)
