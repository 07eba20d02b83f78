"""The models and optimizers of vectorized clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.core.client_state import OptimizerState
from lightning_fedscale.core.executors.correction import WaveCorrection
from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.vectorized.clipping import Clip
from lightning_fedscale.core.executors.vectorized.optimizer import StackedOptimizer
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.local_rules import Correction
from lightning_fedscale.utils.flat_view import as_real

_DELTA_BYTES = 64 * 2**20


class ClientStart(NamedTuple):
    """The individual parts of a client's training.

    Attributes:
        model: the model from which it starts, as a vector; None for the global model.
        personal: its personal tensors by name.
        correction: the correction of its gradients.
    """

    model: Tensor | None = None
    personal: Mapping[str, Tensor] = MappingProxyType({})
    correction: Correction | None = None


class Wave:
    """Holds one row of every trainable parameter and buffer for each client; waves reuse the memory.

    Args:
        optimizer: the user's optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._template = optimizer
        self.release()

    def release(self) -> None:
        """Free the memory of all rows; the next wave allocates it again."""
        self._optimizer = StackedOptimizer(self._template)
        self._memory: list[Tensor] = []
        self._trainable = 0
        self._stacks: list[Tensor] = []
        self._rows: dict[tuple[int, ...], Rows] = {}
        self._leaves: dict[Rows, list[Tensor]] = {}
        self._sums: list[Tensor | None] = []
        self._correction: WaveCorrection | None = None

    def begin(
        self,
        shared: SharedTensors,
        states: Sequence[OptimizerState],
        starts: Sequence[ClientStart] = (),
    ) -> None:
        """Start every client from the global model, which the module holds, with its own optimizer state.

        Args:
            shared: the module's tensors.
            states: the clients' optimizer states.
            starts: the individual parts of each client's training; empty if there are none.
        """
        width, tensors = len(states), [*shared.trainable, *shared.buffers]
        if not self._fits(width, tensors):
            self._memory = [torch.empty(width, *t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        if [len(stack) for stack in self._stacks[:1]] != [width] or self._stacks[0].data_ptr() != self._memory[
            0
        ].data_ptr():
            self._stacks = [memory[:width] for memory in self._memory]
            self._rows, self._leaves = {}, {}
        if self._trainable != len(shared.trainable):
            self._trainable, self._leaves = len(shared.trainable), {}
        for stack, tensor in zip(self._stacks, tensors, strict=True):
            stack.copy_(tensor.detach())
        self._personal = {id(tensor): name for name, tensor in shared.personal.items()}
        self._shapes = {name: tensor.shape for name, tensor in shared.personal.items()}
        for row, start in enumerate(starts):
            self._place(shared, tensors, row, start)
        corrections = [start.correction for start in starts]
        self._correction = None
        if any(each is not None for each in corrections):
            stacks = self._stacks[: len(shared.trainable_shared)]
            self._correction = WaveCorrection(shared, stacks, [each or Correction() for each in corrections])
        places = {id(parameter): i for i, parameter in enumerate(shared.trainable)}
        # Callbacks may have added groups of parameters.
        of_optimizer = [parameter for group in self._template.param_groups for parameter in group["params"]]
        self._moved = [places[id(p)] for p in of_optimizer if id(p) in places]
        self._optimizer.begin([self._stacks[places[id(p)]] if id(p) in places else None for p in of_optimizer], states)
        self._sums = [None] * self._trainable

    def _place(self, shared: SharedTensors, tensors: Sequence[Tensor], row: int, start: ClientStart) -> None:
        """Write a client's own model and personal tensors to its row."""
        if any(self._shapes.get(name) != value.shape for name, value in start.personal.items()):
            raise ValueError("a client's own buffers do not have the shape of the module's")
        in_vector = [number for number, tensor in enumerate(tensors) if id(tensor) not in self._personal]
        if start.model is not None:
            views = shared.view.views(start.model)
            for number, view in zip(in_vector, views, strict=False):
                stack = as_real(self._stacks[number])[row]
                stack.copy_(view if stack.is_floating_point() else view.round())
            shared.view.forget(start.model)  # the view would keep every client's model in memory until the round ends
        for number, tensor in enumerate(tensors):
            if (name := self._personal.get(id(tensor))) is not None and name in start.personal:
                self._stacks[number][row].copy_(start.personal[name])

    def of_client(self, shared: SharedTensors, tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """Return copies of a client's values of some of the module's tensors, by name."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        stacks = zip(self._stacks, [*shared.trainable, *shared.buffers], strict=True)
        return {names[id(tensor)]: stack[row].clone() for stack, tensor in stacks if id(tensor) in names}

    def rows(self, indices: Sequence[int]) -> Rows:
        """Return the selection of these rows, always the same object."""
        return self._rows.setdefault(tuple(indices), Rows(indices))

    def parameters(self, rows: Rows) -> list[Tensor]:
        """Return the trainable parameters of some clients, as leaves that require gradients."""
        if (leaves := self._leaves.get(rows)) is None:
            leaves = [rows.of(stack).detach().requires_grad_() for stack in self._stacks[: self._trainable]]
            if rows.adjacent:
                self._leaves[rows] = leaves
        return leaves

    def buffers(self, rows: Rows) -> list[Tensor]:
        """Return the buffers of some clients."""
        return [rows.of(stack) for stack in self._stacks[self._trainable :]]

    def set_buffers(self, rows: Rows, values: Sequence[Tensor]) -> None:
        """Set the buffers of some clients after a step."""
        for stack, value in zip(self._stacks[self._trainable :], values, strict=True):
            rows.write(stack, value)

    def accumulate(self, rows: Rows, gradients: Sequence[Tensor | None]) -> None:
        """Add to the gradients accumulated for the next step."""
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[i]
            if total is None:
                total = self._sums[i] = torch.zeros_like(self._stacks[i])
            rows.add(total, gradient)

    def step_accumulated(self, rows: Rows, clip: Clip | None) -> None:
        """Step some clients with their accumulated gradients."""
        gradients = [None if total is None else rows.of(total).clone() for total in self._sums]
        for total in self._sums:
            if total is not None:
                rows.write(
                    total, torch.zeros((), dtype=total.dtype, device=total.device).expand(len(rows), *total.shape[1:])
                )
        self.step(rows, self.parameters(rows), gradients, clip)

    def step(self, rows: Rows, parameters: list[Tensor], gradients: list[Tensor | None], clip: Clip | None) -> None:
        """Step some clients.

        Args:
            rows: the clients' rows.
            parameters: the result of `parameters`.
            gradients: of these parameters.
            clip: clips the gradients of the optimizer's parameters.
        """
        if self._correction is not None:
            gradients = self._correction(rows, parameters, gradients)
        # Parameters that are in no optimizer are unchanged.
        if len(self._moved) == self._trainable and self._moved == list(range(self._trainable)):
            moved, own = parameters, gradients
        else:
            moved = [parameters[i] for i in self._moved]
            own = [gradients[i] for i in self._moved]
        self._optimizer.step(rows, moved, own if clip is None else clip(own))
        if not rows.adjacent:
            for i in self._moved:
                rows.write(self._stacks[i], parameters[i].detach())

    def optimizer_state(self, row: int) -> OptimizerState:
        """Return a copy of a client's optimizer state."""
        return self._optimizer.state_of(row)

    def write_to(self, shared: SharedTensors, row: int) -> None:
        """Write a client's model to the module."""
        for stack, tensor in zip(self._stacks, [*shared.trainable, *shared.buffers], strict=True):
            tensor.detach().copy_(stack[row])

    def deltas(self, shared: SharedTensors, origins: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield ``origin - client``, some rows at a time, as float64 vectors like those of `SharedTensors.view`.

        Args:
            shared: the module's tensors.
            origins: the origin of each client's delta; a single one if it is the same for all.
        """
        origin = origins[0]
        width = len(self._stacks[0])
        at_once = max(1, min(width, _DELTA_BYTES // (8 * origin.numel())))
        memory = torch.empty(at_once, origin.numel(), dtype=origin.dtype, device=origin.device)
        for start in range(0, width, at_once):
            part = memory[: min(at_once, width - start)]
            offset = 0
            own = origins[start : start + len(part)] if len(origins) > 1 else origins

            def subtract(out: Tensor, offset: int, end: int, own: Sequence[Tensor] = own) -> None:
                if len(own) == 1:
                    torch.sub(own[0][offset:end], out, out=out)
                else:
                    for row, each in zip(out, own, strict=True):
                        torch.sub(each[offset:end], row, out=row)

            for stack, tensor in zip(self._stacks, [*shared.trainable, *shared.buffers], strict=True):
                if id(tensor) in self._personal:
                    continue
                real = as_real(stack[start : start + len(part)]).reshape(len(part), -1)
                end = offset + real.shape[1]
                # Widen first, since a difference of mixed precisions takes twice as long.
                subtract(part[:, offset:end].copy_(real), offset, end)
                offset = end
            for tensor in shared.frozen:
                real = as_real(tensor).reshape(-1)
                end = offset + real.numel()
                subtract(part[:, offset:end].copy_(real.expand(len(part), -1)), offset, end)
                offset = end
            yield part

    def _fits(self, width: int, tensors: Sequence[Tensor]) -> bool:
        return len(self._memory) == len(tensors) and all(
            len(memory) >= width
            and memory.shape[1:] == t.shape
            and memory.dtype == t.dtype
            and memory.device == t.device
            for memory, t in zip(self._memory, tensors, strict=True)
        )
