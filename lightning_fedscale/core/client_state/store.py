"""All client state, as the rest of the package reads and writes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_fedscale.core.client_state.optimizers import OptimizerState
from lightning_fedscale.core.client_state.states import StateStore, placed
from lightning_fedscale.types import Cursor

OPTIMIZERS = "optimizers"


class ClientStore:
    """Stages client state while a round runs and commits it when the round is complete.

    An interrupted round therefore leaves no trace and can be repeated exactly. Clients that never took part take no
    memory.

    Args:
        states: stores the states; None for a store without limits.

    Example:
        >>> store = ClientStore()
        >>> store.stage(7, cursor=(0, 3))
        >>> store.cursor(7)
        (0, 0)
        >>> store.commit()
        >>> store.cursor(7)
        (0, 3)
    """

    def __init__(self, states: StateStore | None = None) -> None:
        self.states = StateStore() if states is None else states
        self._cursors: dict[int, Cursor] = {}
        self._staged_cursors: dict[int, Cursor] = {}

    def cursor(self, client: int) -> Cursor:
        """Return where the client resumes in its data; ``(0, 0)`` before its first round."""
        return self._cursors.get(client, (0, 0))

    def stage(self, client: int, cursor: Cursor) -> None:
        """Stage where the client resumes in its data after this round."""
        self._staged_cursors[client] = cursor

    def optimizers(self, client: int) -> list[OptimizerState] | None:
        """Return the states of the client's optimizers after its last round; None before its first or elsewhere."""
        return self.states.get(client, OPTIMIZERS)

    def stage_optimizers(self, client: int, states: list[OptimizerState] | None) -> None:
        """Stage the client's optimizer states after this round; None forgets them."""
        self.states.stage(client, OPTIMIZERS, states)

    def keepers(self) -> Iterable[int]:
        """Return the clients whose optimizer states are here."""
        return self.states.clients(OPTIMIZERS)

    def commit(self) -> None:
        """Commit the staged state, since the round is complete."""
        self._cursors.update(self._staged_cursors)
        self._staged_cursors = {}
        self.states.commit()

    def rollback(self) -> None:
        """Forget the staged state, since the round did not happen."""
        self._staged_cursors = {}
        self.states.rollback()

    def state_dict(self) -> dict[str, Any]:
        """Return everything committed, as tensors and primitives; states by their names."""
        rows = [(client, *cursor) for client, cursor in sorted(self._cursors.items())]
        cursors = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        return {"cursors": cursors, OPTIMIZERS: {}, **self.states.snapshot()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Replace everything by the result of `state_dict`.

        Args:
            state: the result, on any device; Lightning reads checkpoints onto the CPU.
            device: where clients train. Only optimizer states stay as they are, since `OptimizerKeeper` places them.
        """
        self._staged_cursors = {}
        self._cursors = {client: (number, batch) for client, number, batch in state["cursors"].tolist()}
        self.states.clear()
        for name, of_clients in state.items():
            if name != "cursors":
                for client, of_client in of_clients.items():
                    self.states.put(client, name, of_client if name == OPTIMIZERS else placed(of_client, device))
