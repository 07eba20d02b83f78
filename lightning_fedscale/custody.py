"""Which rank holds the optimizers that clients keep, and how they come to the rank that needs them."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fedscale import collectives
from lightning_fedscale.clients import ClientStore
from lightning_fedscale.rounds import RoundPlan


class Custody:
    """Kept optimizers stay on the rank that trained their client last, and move when another one trains it.

    Every rank knows every plan, so all know who holds what, and only what moves is sent. Without kept optimizers, or
    on a single rank, nothing is ever sent.

    Args:
        store: this rank's client state.
        rank: this process.
        world_size: number of processes.
        device: where tensors cross ranks.
    """

    def __init__(self, store: ClientStore, rank: int, world_size: int, device: torch.device) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._holder: dict[int, int] = {}  # absent: every rank has them (from a checkpoint), or none yet

    def fetch(self, plan: RoundPlan) -> None:
        """Bring the cohort's optimizers to the ranks of this round; to be called on all ranks."""
        for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
            holder = self._holder.get(client, rank)
            if holder == rank:
                continue
            if self._rank == holder:
                collectives.send(self._store.optimizers(client), rank, self._device)
            elif self._rank == rank:
                self._store.put_optimizers(client, collectives.receive(holder, self._device))

    def commit(self, plan: RoundPlan) -> None:
        """The round is complete: its ranks hold its clients' optimizers, the others let go of them."""
        for client, rank in zip(plan.cohort.tolist(), plan.ranks.tolist(), strict=True):
            self._holder[client] = rank
            if rank != self._rank:
                self._store.put_optimizers(client, None)

    def collect(self, states: dict[int, Any]) -> dict[int, Any]:
        """The optimizers of all clients on rank 0, given each rank's; to be called on all ranks."""
        if self._world_size == 1:
            return states
        mine = {client: state for client, state in states.items() if self._holder.get(client, 0) == self._rank}
        parts = collectives.gather_on_zero(mine)
        return dict(sorted((client, state) for part in parts for client, state in part.items()))

    def reset(self) -> None:
        """Every rank has read every client's optimizers from a checkpoint."""
        self._holder = {}
