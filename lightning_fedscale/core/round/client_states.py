"""What clients keep between rounds, on whichever rank it is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedscale.core.client_state import ClientStore, StateStore, tiers_of
from lightning_fedscale.core.client_state.placement import StatePlacement
from lightning_fedscale.core.client_state.states import placed
from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round.client_pipeline import DITTO, DITTO_BUFFERS, PERSONAL
from lightning_fedscale.types import Cursor
from lightning_fedscale.utils.flat_view import FlatView


class ClientStates:
    """The clients' states on this rank, and the placement of those that move between ranks.

    Args:
        options: the strategy's checked arguments.
        rank: this process.
        world_size: number of processes.
        device: where clients train.
        processes: how many processes share this machine's memory.

    Attributes:
        store: what the clients keep here.
    """

    def __init__(self, options: Options, rank: int, world_size: int, *, device: torch.device, processes: int) -> None:
        self.store = ClientStore(StateStore(tiers_of(device, options.client_state_memory, processes)))
        keeps = options.keep_optimizers or options.algorithm.keep_state
        self._placement = StatePlacement(self.store, rank, world_size, device) if keeps else None
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._counts_steps = options.local_steps is not None
        self._ditto = options.algorithm.ditto is not None

    def fetch(self, plan: RoundPlan) -> None:
        """Move the states of the cohort to the ranks of this round; call it on all ranks."""
        if self._placement is not None:
            self._placement.fetch(plan)

    def commit(self, plan: RoundPlan, cursors: dict[int, Cursor]) -> None:
        """Make the staged states valid, now that the round is complete.

        Args:
            plan: the plan of the round.
            cursors: where each client of the cohort resumes in its data; used with ``local_steps`` only.
        """
        if self._counts_steps:
            for client, cursor in cursors.items():
                self.store.stage(client, cursor)
        self.store.commit()
        if self._placement is not None:
            self._placement.commit(plan)

    def rollback(self) -> None:
        """Discard what was staged in a round that failed."""
        self.store.rollback()

    def holder(self, client: int) -> int | None:
        """Return the rank that has the client's states; None if any rank will do."""
        return None if self._placement is None else self._placement.holder(client)

    def personal_model(self, client: int, state: dict[str, Any], shared: SharedTensors) -> dict[str, Any] | None:
        """Return the module's state dict with the client's own values in it; None if another rank has them.

        Args:
            client: its number.
            state: the module's state dict, of the global model.
            shared: the module's tensors.
        """
        if self.holder(client) not in (None, self._rank):
            return None
        # After fit, Lightning has moved the module to the CPU.
        here = shared.view.device

        def kept(name: str) -> Any:
            return placed(self.store.states.get(client, name), here)

        if not self._ditto:
            return {**state, **shared.of_personal(state, kept(PERSONAL) or {})}
        whole: Tensor | None = kept(DITTO)
        model = state if whole is None else shared.view.substituted(state, whole)
        return {**model, **shared.of_personal(state, kept(DITTO_BUFFERS) or {})}

    def complete(self, view: FlatView) -> None:
        """Add tensors that are exchanged from now on to the clients' own models, as the module holds them."""
        states = self.store.states
        for client in list(states.clients(DITTO)):
            model: Tensor | None = states.get(client, DITTO)
            if model is not None:
                states.put(client, DITTO, view.completed(model))

    def state_dict(self, *, in_client: bool) -> dict[str, Any]:
        """Return the states of all ranks on rank 0; call it on all ranks.

        Args:
            in_client: whether the checkpoint is saved while a client trains.

        Raises:
            RuntimeError: inside a client if states lie on several ranks, which do not wait for each other there.
        """
        if self._placement is None:
            return self.store.state_dict()
        if in_client and self._world_size > 1:
            raise RuntimeError(
                "save_checkpoint: on several ranks, what clients keep (client_optimizer='keep', local_rule, compressor,"
                " personal, buffers) can only be saved between rounds, not while a client trains: save in a callback's"
                " on_train_batch_end."
            )
        return self._placement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved states, which every rank has read."""
        self.store.load_state_dict(state, self._device)
        if self._placement is not None:
            self._placement.reset()
