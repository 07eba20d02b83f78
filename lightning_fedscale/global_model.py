"""The server's part of a round: from the sum over all clients to the next global model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.executors import Exchange
from lightning_fedscale.records import RoundTable
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.types import Cohort, Params


class GlobalModel:
    """Moves the global model, and holds the server optimizer's state.

    Every rank does the same from the same sums, so nothing needs to be sent back.

    Args:
        aggregator: reads the aggregate off the sum over clients.
        rule: how trainable parameters move; buffers and frozen parameters take the clients' mean.
    """

    def __init__(self, aggregator: Aggregator, rule: ServerOptimizer) -> None:
        self._aggregator = aggregator
        self._rule = rule
        self.state: Any = None

    def load_state(self, state: Any, device: torch.device) -> None:
        """Go on from a saved state."""
        self.state = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state)

    def move(
        self,
        exchange: Exchange,
        server: Tensor,
        aggregate: Tensor,
        round: int,
        *,
        training: bool,
        on_step: Callable[[Params], Params] = lambda step: step,
    ) -> None:
        """Write the next global model into the module.

        Args:
            exchange: the module's tensors.
            server: the global model of this round; stays as it is.
            aggregate: the aggregated delta.
            round: index of the round.
            training: False leaves trainable parameters alone.
            on_step: what becomes of the server optimizer's step before it is taken.

        Raises:
            RuntimeError: if the server's step is not finite; the caller then writes ``server`` back into the module.
            TypeError: if the server optimizer returns something else than a step and a state.
        """
        params, state = exchange.named(server), self.state
        if training:
            state = self._rule.init(params) if state is None else state
            step, state = _checked(self._rule.update(exchange.named(aggregate), state, params), params)
            step = on_step(step)
            steps = [step[name] for name in params]
        else:
            steps = [server.new_zeros(())] * len(params)
        # Buffers and frozen parameters take the clients' mean.
        steps += exchange.view.views(aggregate)[len(params) :]
        if not _subtract(exchange, server, steps):
            raise RuntimeError(
                f"server_optimizer: its step in round {round} has NaN or infinite values, so the global model"
                " stays as it was before this round. Lower the server learning rate."
            )
        self.state = state

    def aggregate(self, server: Tensor, total: Tensor, table: RoundTable, cohort: Cohort) -> Tensor:
        """The aggregated delta.

        Args:
            server: the global model of this round.
            total: the aggregator's accumulator over all ranks; used up.
            table: the round in numbers, of all ranks.
            cohort: who took part.

        Raises:
            RuntimeError: if no client's update is finite.
            ValueError: if the aggregator returns something of another shape.
        """
        rejected = table.rejected()
        if len(rejected) == table.cohort_size:
            raise RuntimeError(
                f"round {table.round}: the updates of all {len(rejected)} clients have NaN or infinite values, so the"
                " global model stays as it was before this round. Lower the learning rate, clip gradients"
                " (Trainer(gradient_clip_val=1.0)) or look for bad samples."
            )
        if rejected:
            rank_zero_warn(
                f"round {table.round}: left out {len(rejected)} client(s) whose update has NaN or infinite values:"
                f" {', '.join(map(str, rejected[:10]))}{', ...' if len(rejected) > 10 else ''}."
            )
        aggregate = self._aggregator.finish(total, cohort)
        if aggregate.shape != server.shape:
            raise ValueError(
                f"aggregator: finish returned a tensor of shape {tuple(aggregate.shape)}, not one as long as the"
                f" clients' deltas, {tuple(server.shape)}."
            )
        return aggregate


@torch.no_grad()
def _subtract(exchange: Exchange, server: Tensor, steps: list[Tensor]) -> bool:
    """Write ``server - steps`` into the module, one tensor at a time; False if it spoils what was finite."""
    trainable, befores = len(exchange.names), exchange.view.views(server)

    def after(number: int) -> Tensor:
        before, step = befores[number], steps[number]
        # As in `Exchange.origin`, from which deltas are counted.
        return before - step if number < trainable else before.nan_to_num(0.0, 0.0, 0.0).sub_(step)

    def write(number: int) -> Tensor:
        value = after(number)
        exchange.view.write_one(number, value)
        return value.sum()

    # If all sums are finite, so is every element, and finding out takes no memory.
    if torch.stack([write(number) for number in range(len(befores))]).isfinite().all():
        return True
    return all((after(i).isfinite() | ~before.isfinite()).all() for i, before in enumerate(befores))


def _checked(answer: Any, params: Params) -> tuple[Params, Any]:
    """What a server optimizer's ``update`` returned, if it is what it should be."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Mapping):
        step, state = answer
        if step.keys() == params.keys() and all(step[name].shape == params[name].shape for name in params):
            return step, state
    raise TypeError(
        "server_optimizer: update must return (step, state), where step has a tensor for every parameter, by the names"
        " and in the shapes of delta."
    )
