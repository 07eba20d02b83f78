"""One optimizer for clients that train side by side, each with a state of its own."""

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
"""Optimizers that move every element by its own gradient and state: stacked parameters are as good as separate ones."""

# State that is one number for a whole parameter; all other tensors have the parameter's shape.
_NUMBERS = ("step", "mu_product")
_IN_STACK: Final = object()

_Key = tuple[int, str]
_State = dict[_Key, Any]


class StackedOptimizer:
    """The user's optimizer over parameters that have one row for each client.

    Clients that step together must agree in what the optimizer keeps as one number for a parameter (its step counter)
    and in which state there is at all (momentum begins with the first step); those that do not step in turns.

    Args:
        optimizer: the user's, whose class and group options are taken over.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._template = optimizer
        # By way of __getstate__: without what learning-rate schedulers patched on.
        self._optimizer = copy.copy(optimizer)
        self._stacks: dict[_Key, Tensor] = {}
        self._states: list[_State] = []  # of each client; clients that are alike share one
        self._loaded: tuple[Rows, Sequence[Tensor]] | None = None

    def begin(self, stacks: Sequence[Tensor | None], states: Sequence[OptimizerState]) -> None:
        """Start with the round's group options and each client's state.

        Args:
            stacks: for every parameter of the optimizer's groups, in order, its stack; None for those that stay.
            states: packed as `lightning_fedscale.core.client_state.OptimizerKeeper` does.
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
        """One step of some clients.

        Args:
            rows: which.
            parameters: these rows of the stacks, leaves of no graph, moved in place.
            gradients: theirs; None where a parameter took no part.
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
            # Fused kernels take for granted that gradients lie in memory as their parameters do.
            parameter.grad = gradient.contiguous() if self._fused and gradient is not None else gradient
        self._optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def state_of(self, row: int) -> dict[Any, Any]:
        """A client's state, the caller's own, packed as `lightning_fedscale.core.client_state.OptimizerKeeper` does."""
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
        """Bring what the last steps left back to the clients they belong to."""
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
        """The stack of a kind of state, for as many clients as the wave has."""
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
