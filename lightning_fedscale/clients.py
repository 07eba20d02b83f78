"""State that stays with a client between its rounds: where its data goes on, and its optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_fedscale.types import Cursor

OptimizerState: TypeAlias = dict[str, Any]
"""``{"state": {parameter index: its state, other key: value}, "options": [changed options of each group]}``"""


class ClientStore:
    """What clients leave behind, in two steps: staged while a round runs, committed when it is complete.

    A round that is interrupted therefore leaves no trace and can be repeated exactly. Clients that never took part
    cost nothing.

    Example:
        >>> store = ClientStore()
        >>> store.stage(7, cursor=(0, 3))
        >>> store.cursor(7)
        (0, 0)
        >>> store.commit()
        >>> store.cursor(7)
        (0, 3)
    """

    def __init__(self) -> None:
        self._cursors: dict[int, Cursor] = {}
        self._optimizers: dict[int, list[OptimizerState]] = {}
        self._staged_cursors: dict[int, Cursor] = {}
        self._staged_optimizers: dict[int, list[OptimizerState] | None] = {}

    def cursor(self, client: int) -> Cursor:
        """Where the client's data goes on; ``(0, 0)`` before its first round."""
        return self._cursors.get(client, (0, 0))

    def optimizers(self, client: int) -> list[OptimizerState] | None:
        """The states of the client's optimizers as of its last round, None before its first one or elsewhere."""
        return self._optimizers.get(client)

    def stage(self, client: int, cursor: Cursor) -> None:
        """Note where the client's data goes on once this round is complete."""
        self._staged_cursors[client] = cursor

    def stage_optimizers(self, client: int, states: list[OptimizerState] | None) -> None:
        """Note the client's optimizer states after this round; None forgets them."""
        self._staged_optimizers[client] = states

    def commit(self) -> None:
        """The round is complete: what was staged holds from now on."""
        self._cursors.update(self._staged_cursors)
        for client, states in self._staged_optimizers.items():
            self.put_optimizers(client, states)
        self.rollback()

    def rollback(self) -> None:
        """The round did not happen: forget what was staged."""
        self._staged_cursors, self._staged_optimizers = {}, {}

    def put_optimizers(self, client: int, states: list[OptimizerState] | None) -> None:
        """Set the client's optimizer states at once (they came from another rank), or forget them."""
        if states is None:
            self._optimizers.pop(client, None)
        else:
            self._optimizers[client] = states

    def keepers(self) -> Iterable[int]:
        """The clients whose optimizer states are here."""
        return self._optimizers.keys()

    def state_dict(self) -> dict[str, Any]:
        """Everything committed, as tensors and primitives."""
        rows = [(client, *cursor) for client, cursor in sorted(self._cursors.items())]
        return {
            "cursors": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            "optimizers": dict(sorted(self._optimizers.items())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        self.rollback()
        self._cursors = {client: (number, batch) for client, number, batch in state["cursors"].tolist()}
        self._optimizers = dict(state["optimizers"])


class OptimizerKeeper:
    """Gives every client its own optimizer state while all share one optimizer object and its learning rates.

    Group options (learning rate, momentum, ...) belong to the server, whose schedulers move them between rounds: a
    client that changes them changes them for itself only. Options other than the scheduled ones that a client's
    optimizer changed by itself (step counters, distances) are kept with its state.

    Args:
        optimizer: just built, before its first step: what it holds now is what every new client starts from.
    """

    _SCHEDULED = ("params", "lr", "initial_lr", "momentum", "betas", "weight_decay")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._fresh = self._pack()
        self._options: list[dict[str, Any]] = []
        self.open_round()

    def open_round(self) -> None:
        """Remember the group options that every client of this round starts from."""
        self._options = [
            {key: _copied(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    def load(self, kept: OptimizerState | None) -> None:
        """Set the optimizer up for the next client: its kept state, or that of a fresh optimizer."""
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            for key in group.keys() - options.keys() - {"params"}:
                del group[key]
            group.update({key: _copied(value) for key, value in options.items()})
        self._unpack(self._fresh if kept is None else kept["state"])
        for group, options in zip(self._optimizer.param_groups, kept["options"] if kept else (), strict=False):
            group.update({key: _copied(value) for key, value in options.items()})

    def unload(self) -> OptimizerState:
        """The state that the client's training left in the optimizer, now the caller's own."""
        changed = [
            {
                key: value
                for key, value in group.items()
                if key not in self._SCHEDULED and not _same(value, options.get(key))
            }
            for group, options in zip(self._optimizer.param_groups, self._options, strict=True)
        ]
        return {"state": self._pack(), "options": changed}

    def close_round(self) -> None:
        """Back to the server's options and no client's state."""
        self.load(None)

    def at_round_start(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict, taken while a client trains, with what the round began with in its place."""
        groups = zip(saved["param_groups"], self._options, strict=True)
        return {
            "state": self._fresh,
            "param_groups": [{**options, "params": group["params"]} for group, options in groups],
        }

    def _pack(self) -> dict[Any, Any]:
        parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        state = self._optimizer.state
        of_parameters = {i: dict(state[p]) for i, p in enumerate(parameters) if p in state}
        return {**of_parameters, **{key: value for key, value in state.items() if not isinstance(key, Tensor)}}

    def _unpack(self, packed: dict[Any, Any]) -> None:
        self._optimizer.state.clear()
        if not packed:
            return
        self._optimizer.state.update(
            {key: _placed(value, None) for key, value in packed.items() if type(key) is not int}
        )
        i = -1
        for group in self._optimizer.param_groups:
            # Step counters stay on the CPU, as torch has it, unless the optimizer reads them on the device.
            steps_on_device = bool(group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                i += 1
                if i in packed:
                    self._optimizer.state[parameter] = {
                        key: _placed(value, parameter.device if key != "step" or steps_on_device else None)
                        for key, value in packed[i].items()
                    }


def _placed(value: Any, device: torch.device | None) -> Any:
    # A copy, so that the stored state survives if this round does not.
    return tree_map(
        lambda leaf: leaf.detach().to(device or leaf.device, copy=True) if isinstance(leaf, Tensor) else leaf, value
    )


def _copied(value: Any) -> Any:
    return _placed(value, None) if isinstance(value, Tensor | list | dict) else value


def _same(left: Any, right: Any) -> bool:
    left_leaves, right_leaves = tree_leaves(left), tree_leaves(right)
    return (
        type(left) is type(right)
        and len(left_leaves) == len(right_leaves)
        and all(map(_equal, left_leaves, right_leaves))
    )


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)
