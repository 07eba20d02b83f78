"""One optimizer for vectorized clients, each with its own state."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lightning_fedscale.core.client_state import OptimizerState
from lightning_fedscale.core.executors.vectorized.rows import Rows

ELEMENTWISE = (Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop, SGD)
"""Optimizers that update every element by its own gradient and state, so that parameters can be stacked."""

# State that is a single number for a parameter; all other tensors have the parameter's shape.
_NUMBERS = ("step", "mu_product")
_IN_STACK: Final = object()

_Key = tuple[int, str]
_State = dict[_Key, Any]


class StackedOptimizer:
    """The user's optimizer over stacked parameters, with one row for each client.

    Clients can step together only if they agree in state that is a single number for a parameter (its step counter),
    and in which state exists (momentum begins with the first step). Other clients step in turns.

    Args:
        optimizer: the user's optimizer, whose class and group options are used.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._template = optimizer
        # copy uses __getstate__, so patches by learning-rate schedulers are left out.
        self._optimizer = copy.copy(optimizer)
        self._stacks: dict[_Key, Tensor] = {}
        self._states: list[_State] = []  # of each client; clients with equal state share one
        self._loaded: tuple[Rows, Sequence[Tensor]] | None = None

    def begin(self, stacks: Sequence[Tensor | None], states: Sequence[OptimizerState]) -> None:
        """Start with the round's group options and each client's state.

        Args:
            stacks: the stack of every parameter of the optimizer's groups, in order; None for parameters not stepped.
            states: packed as by `lightning_fedscale.core.client_state.OptimizerKeeper`.
        """
        self._places = [place for place, stack in enumerate(stacks) if stack is not None]
        self._loaded = None
        self._states = [{} for _ in states]
        alike: dict[int, _State] = {}
        for row, packed in enumerate(states):
            state = alike.setdefault(id(packed), {})
            for place, values in packed.items():
                if not isinstance(place, int) or (stack := stacks[place]) is None:
                    continue
                for key, value in values.items():
                    if isinstance(value, Tensor) and key not in _NUMBERS:
                        self._stack((place, key), stack, value.dtype)[row].copy_(value)
                        value = _IN_STACK
                    state[place, key] = value
        self._states = [alike[id(packed)] for packed in states]
        self._fused = any(group.get("fused") for group in self._template.param_groups)
        self._groups = []
        self._numbers_on_device = set[int]()
        position = 0
        for group in self._template.param_groups:
            end = position + len(group["params"])
            options = {key: value for key, value in group.items() if key != "params"}
            self._groups.append((options, [i for i, place in enumerate(self._places) if position <= place < end]))
            if group.get("capturable") or group.get("fused"):
                self._numbers_on_device.update(range(position, end))
            position = end

    def step(self, rows: Rows, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Step some clients.

        Args:
            rows: the clients' rows.
            parameters: these rows of the stacks, without a graph; updated in place.
            gradients: their gradients; None for unused parameters.
        """
        if self._loaded is None or self._loaded[0] is not rows or self._loaded[1] is not parameters:
            self._unload()
            alike = self._alike(rows)
            if len(alike) > 1:
                for part in alike:
                    local = Rows([rows.indices.index(row) for row in part])
                    own = [local.of(parameter).detach() for parameter in parameters]
                    self.step(Rows(part), own, [None if g is None else local.of(g) for g in gradients])
                    for parameter, value in zip(parameters, own, strict=True):
                        local.write(parameter.detach(), value)
                return
            self._load(rows, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # Fused kernels require gradients with the memory layout of their parameters.
            parameter.grad = gradient.contiguous() if self._fused and gradient is not None else gradient
        self._optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def state_of(self, row: int) -> dict[Any, Any]:
        """Return a copy of a client's state, packed as by `lightning_fedscale.core.client_state.OptimizerKeeper`."""
        self._unload()
        packed: dict[Any, Any] = {}
        for (place, key), value in self._states[row].items():
            own = self._stacks[place, key][row] if value is _IN_STACK else value
            packed.setdefault(place, {})[key] = own.clone() if isinstance(own, Tensor) else own
        return packed

    def _alike(self, rows: Rows) -> list[list[int]]:
        groups: list[tuple[_State, list[int]]] = []
        for row in rows.indices:
            state = self._states[row]
            for other, members in groups:
                if state is other or _same(state, other):
                    members.append(row)
                    break
            else:
                groups.append((state, [row]))
        return [members for _, members in groups]

    def _load(self, rows: Rows, parameters: Sequence[Tensor]) -> None:
        state = self._states[rows.indices[0]]
        self._optimizer.state = defaultdict(dict)
        for (place, key), value in state.items():
            parameter = parameters[self._places.index(place)]
            if value is _IN_STACK:
                value = rows.of(self._stacks[place, key])
            elif isinstance(value, Tensor):
                value = value.to(parameter.device, copy=True) if place in self._numbers_on_device else value.clone()
            self._optimizer.state[parameter][key] = value
        self._optimizer.param_groups = [
            {**options, "params": [parameters[i] for i in members]} for options, members in self._groups
        ]
        self._loaded = rows, parameters

    def _unload(self) -> None:
        """Store the state after the last steps with the clients to which it belongs."""
        if self._loaded is None:
            return
        (rows, parameters), self._loaded = self._loaded, None
        state: _State = {}
        for place, parameter in zip(self._places, parameters, strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and key not in _NUMBERS:
                    rows.write(self._stack((place, key), value, value.dtype), value)
                    value = _IN_STACK
                state[place, key] = value
        for row in rows.indices:
            self._states[row] = state

    def _stack(self, key: _Key, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the stack of a kind of state, with a row for each client of the wave."""
        stack, count = self._stacks.get(key), len(self._states)
        if stack is None or stack.shape[1:] != like.shape[1:] or stack.dtype != dtype or len(stack) < count:
            stack = self._stacks[key] = torch.zeros(count, *like.shape[1:], dtype=dtype, device=like.device)
        return stack


def _same(left: _State, right: _State) -> bool:
    return left.keys() == right.keys() and all(_equal(value, right[key]) for key, value in left.items())


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return bool(torch.equal(left, right))
    return left is right or (type(left) is type(right) and bool(left == right))
