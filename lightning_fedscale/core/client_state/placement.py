"""The ranks that hold the clients' state, and its transfer to the rank that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_fedscale.core.client_state import ClientStore, size_of
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.utils import collectives

_PARCEL = 1 << 26  # bytes, so that a rank never holds a checkpoint's states twice


class StatePlacement:
    """Keeps a client's state on the rank that trained it last, and moves it when another rank trains the client.

    Every rank knows every plan, hence every state's holder, and only the states that move are sent. If clients keep
    no state, or on a single rank, nothing is sent.

    Args:
        store: this rank's client state.
        rank: this process.
        world_size: number of processes.
        device: where tensors are sent and received.
    """

    def __init__(self, store: ClientStore, rank: int, world_size: int, device: torch.device) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._holder: dict[int, int] = {}  # absent: every rank has its states (from a checkpoint), or no rank

    def holder(self, client: int) -> int | None:
        """Return the rank that holds the client's state; None if all ranks have the same."""
        return self._holder.get(client)

    def fetch(self, plan: RoundPlan) -> None:
        """Bring the cohort's states to the ranks of this round; call this on all ranks."""
        states = self._store.states
        for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
            holder = self._holder.get(client, rank)
            if holder == rank:
                continue
            if self._rank == holder:
                collectives.send(states.of(client), rank, self._device)
            elif self._rank == rank:
                states.replace(client, collectives.receive(holder, self._device))

    def commit(self, plan: RoundPlan) -> None:
        """Record that the round's ranks hold its clients' states, and drop them on the other ranks."""
        for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
            self._holder[client] = rank
            if rank != self._rank:
                self._store.states.replace(client, {})

    def state_dict(self) -> dict[str, Any]:
        """Return `ClientStore.state_dict` with the states of all ranks, on rank 0; call this on all ranks."""
        if self._world_size == 1:
            return self._store.state_dict()
        if self._rank != 0:
            for parcel in self._parcels():
                collectives.send(parcel, 0, self._device)
            return {}
        saved = self._store.state_dict()
        for name, states in self._of_other_ranks().items():
            mine = {client: state for client, state in saved.get(name, {}).items() if self._holds(client)}
            saved[name] = dict(sorted({**mine, **states}.items()))
        return saved

    def reset(self) -> None:
        """Record that every rank has read every client's states from a checkpoint."""
        self._holder = {}

    def _holds(self, client: int) -> bool:
        return self._holder.get(client, 0) == self._rank

    def _parcels(self) -> Iterator[list[tuple[int, str, Any]]]:
        """Yield the states that this rank holds, some clients at a time, then an empty parcel as the end."""
        parcel: list[tuple[int, str, Any]] = []
        size = 0
        for name, states in self._store.states.snapshot().items():
            for client, state in states.items():
                if self._holds(client):
                    parcel.append((client, name, state))
                    size += size_of(state)
                if size >= _PARCEL:
                    yield parcel
                    parcel, size = [], 0
        if parcel:
            yield parcel
        yield []

    def _of_other_ranks(self) -> dict[str, dict[int, Any]]:
        # A store with the same limits, so that not everything has to fit in memory.
        guests = self._store.states.another()
        for sender in range(1, self._world_size):
            while parcel := collectives.receive(sender, self._device):
                for client, name, state in parcel:
                    guests.put(client, name, state)
        states = guests.snapshot()
        guests.clear()
        return states
