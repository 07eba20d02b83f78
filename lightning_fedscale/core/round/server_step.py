"""The server's part of a round: from the sum over all clients to the next global model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.round.client_pipeline import PRIVACY, RULE
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.user_code.snapshot import Snapshot
from lightning_fedscale.local_rules import Merged
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.types import Cohort, Params
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.flat_view import FlatView, elements_at_once, pieces_of, rows_of

OPTIMIZER, DOWNLINK, AGGREGATOR = "optimizer", "downlink", "aggregator"
"""Names of what the server keeps."""


class Diverged(RuntimeError):
    """No client of a round has a finite update."""


class GlobalModel:
    """Moves the global model, and holds what the server keeps from round to round.

    Every rank computes the same from the same sums, so nothing needs to be sent back.

    Args:
        algorithm: of the uplink: the aggregator turns the sum over clients into the aggregate, which the local rule and
            privacy then change.
        optimizer: moves trainable parameters; averaged buffers and frozen parameters take the clients' mean.
        downlink: compresses the server's step on its way to the clients; None sends the model itself.

    Attributes:
        states: those of the local rule, privacy, the aggregator, the optimizer and the downlink, by name.
    """

    def __init__(
        self, algorithm: AlgorithmOptions, optimizer: ServerOptimizer, downlink: Compressor | None = None
    ) -> None:
        self._algorithm = algorithm
        self._optimizer = optimizer
        self._downlink = downlink
        self._next: dict[str, Any] = {}  # the states to be kept if the round succeeds
        self.states: dict[str, Any] = {}
        self._expected_weight = 0.0
        self._watched = False  # whether the aggregator was seen to keep nothing besides its state

    def calibrate(self, algorithm: AlgorithmOptions, expected_weight: float) -> None:
        """Take rules whose privacy is calibrated, and the expected total weight of a round's clients."""
        self._algorithm, self._expected_weight = algorithm, expected_weight

    def load_states(self, states: dict[str, Any], device: torch.device) -> None:
        """Resume from saved states."""
        self.states = _placed(states, device)

    def open_round(self, view: FlatView) -> dict[str, Any]:
        """Return the server's states at the start of the round; new ones for local rule and privacy if needed.

        Args:
            view: the tensors that are exchanged.

        Raises:
            ValueError: if the local rule's state belongs to other parameters.
        """
        states = dict(self.states)
        if (rule := self._algorithm.local_rule) is not None:
            trainable = view.trainable
            if RULE not in states:
                states[RULE] = rule.init(view.zeros()[:trainable].clone())
            if any(leaf.dim() and len(leaf) != trainable for leaf in tree_leaves(states[RULE]) if _is_tensor(leaf)):
                raise ValueError(
                    f"local_rule={rule.name!r}: its state belongs to other parameters than the {trainable:,} trainable"
                    " elements of this round: do not freeze or unfreeze layers with this argument."
                )
        if (privacy := self._algorithm.privacy) is not None:
            states.setdefault(PRIVACY, privacy.init())
        self._next = states
        return states

    def move(
        self,
        shared: SharedTensors,
        server: FlatView,
        aggregate: Tensor,
        cohort: Cohort,
        *,
        training: bool,
        mean_square: float = math.nan,
        on_step: Callable[[Params], Params] = lambda step: step,
    ) -> float | None:
        """Write the next global model into the module.

        Args:
            shared: the module's tensors.
            server: copies of them, of the global model of this round; they stay as they are.
            aggregate: the aggregated delta.
            cohort: who took part.
            training: False leaves trainable parameters alone.
            mean_square: weighted mean of the clients' squared norms.
            on_step: changes the server optimizer's step before it is taken.

        Returns:
            Bits of the trainable parameters that a client receives; None if the model itself is sent.

        Raises:
            RuntimeError: if the server's step is not finite; the caller then writes ``server`` back into the module.
            TypeError: if the server optimizer returns anything but a step and a state.
        """
        bits = None
        if training:
            params = shared.named(server.vector if self._optimizer.reads_params else server.zeros())
            state = self._next.get(OPTIMIZER)
            state = self._optimizer.init(params) if state is None else state
            delta, norms = shared.named(aggregate), (mean_square,) if self._optimizer.reads_norms else ()
            step, state = _checked(self._optimizer.update(delta, state, params, *norms), params)
            self._next[OPTIMIZER] = state
            step = on_step(step)
            if self._downlink is not None:
                step, bits = self._compressed(self._downlink, step, cohort)
            steps = [step[name] for name in params]
        else:
            steps = [aggregate.new_zeros(())] * len(shared.names)
        # Averaged buffers and frozen parameters take the clients' mean.
        steps += shared.view.views(aggregate)[len(steps) :]
        if not _subtract(shared, server, steps):
            raise RuntimeError(
                f"server_optimizer: its step in round {cohort.round} has NaN or infinite values, so the global model"
                " stays as it was before this round: lower the server learning rate."
            )
        if training:
            self.states = self._next
        return bits

    def _compressed(self, compressor: Compressor, step: Params, cohort: Cohort) -> tuple[Params, float]:
        state = self._next.get(DOWNLINK)
        state = compressor.init(step) if state is None else state
        generator = randomness.generator(cohort.seed, randomness.DOWNLINK, cohort.round)
        encoded, self._next[DOWNLINK] = compressor.encode(step, state, generator)
        return encoded.seen, encoded.bits

    def aggregate(
        self, server: FlatView, total: Tensor, table: RoundTable, cohort: Cohort, messages: Tensor | None = None
    ) -> Tensor:
        """Return the aggregated delta.

        Args:
            server: copies of the tensors, of the global model of this round.
            total: the aggregator's accumulator over all ranks; used up.
            table: the round in numbers, of all ranks.
            cohort: who took part.
            messages: sum of the clients' second vectors; None without a local rule that sends them.

        Raises:
            Diverged: if no client's update is finite.
            TypeError: if the aggregator returns something else, or keeps a state that checkpoints cannot hold.
            ValueError: if its delta has another shape.
        """
        absent = table.clients.without_batches()
        spoilt = tuple(client for client in table.clients.rejected() if client not in absent)
        if spoilt and len(spoilt) + len(absent) == len(table.clients):
            raise Diverged(
                f"round {table.round}: the updates of all {len(spoilt)} clients have NaN or infinite values, so the"
                " global model stays as it was before this round: lower the learning rate, clip gradients"
                " (Trainer(gradient_clip_val=1.0)) or look for bad samples."
            )
        for left_out, why in (
            (spoilt, "because the update has NaN or infinite values"),
            (absent, "because the collate function returned None for every batch"),
        ):
            if left_out:
                rank_zero_warn(
                    f"round {table.round}: left out {len(left_out)} client(s) {why}:"
                    f" {', '.join(map(str, left_out[:10]))}{', ...' if len(left_out) > 10 else ''}."
                )
        if table.clients.accepted:
            aggregate = self._finished(server, total, cohort)
        else:  # without clients there is no aggregate: the server optimizer sees a delta of zero
            aggregate = server.zeros().clone()
            aggregate[cohort.trainable :] = _still(server, cohort.trainable)
        if aggregate.shape != (server.size,):
            raise ValueError(
                f"aggregator: finish returned a tensor of shape {tuple(aggregate.shape)}, but must return one of the"
                f" clients' deltas' shape, {(server.size,)}."
            )
        moved = aggregate[: cohort.trainable]
        if (privacy := self._algorithm.privacy) is not None:
            # Values that are not clipped may not leave the clients.
            aggregate[cohort.trainable :] = _still(server, cohort.trainable)
            state, generator = self._next[PRIVACY], randomness.generator(cohort.seed, randomness.PRIVACY, cohort.round)
            private, self._next[PRIVACY] = privacy.finish(
                moved, table.clients.within(), state, cohort, self._expected_weight, generator
            )
            moved.copy_(private)
        if (rule := self._algorithm.local_rule) is not None and table.clients.accepted:
            merged = Merged(moved, messages, table.clients.normalizer(), table.clients.accepted, cohort)
            delta, self._next[RULE] = rule.merge(merged, self._next[RULE])
            moved.copy_(delta)
        return aggregate

    def _finished(self, server: FlatView, total: Tensor, cohort: Cohort) -> Tensor:
        """Return the aggregate of the sum over clients, and note the aggregator's next state."""
        rule, state = self._algorithm.aggregator, self._next.pop(AGGREGATOR, None)
        if state is None and rule.kept is not None:
            state = rule.fresh_state(server.vector, cohort)
        before = None if self._watched else Snapshot(rule._asdict(), most=0)
        aggregate, state = rule.finish_with(total, cohort, state)
        if before is not None and (place := before.difference(Snapshot(rule._asdict(), most=0))) is not None:
            rank_zero_warn(
                f"aggregator: {place} changed in round {cohort.round}, but checkpoints do not contain it, so a resumed"
                " run would differ: keep it as the rule's state, Aggregator(..., init_state=...)."
            )
        self._watched = True
        if rule.kept is not None:
            self._next[AGGREGATOR] = _copied(state)
        return aggregate


def _placed(state: Any, device: torch.device) -> Any:
    """Return the state on a device, but step counters where they are: torch's optimizers read them on the CPU."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, dict):
        counts = {key: value for key, value in state.items() if key == "step" and _is_number(value)}
        return {key: counts[key] if key in counts else _placed(value, device) for key, value in state.items()}
    return type(state)(_placed(each, device) for each in state) if type(state) in (list, tuple) else state


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _copied(state: Any) -> Any:
    """Copy an aggregator's state, which may share memory with the delta: that is changed in place later.

    Raises:
        TypeError: if it contains something that checkpoints cannot hold.
    """
    if isinstance(state, Tensor):
        return state.detach().clone()
    if type(state) is dict:
        return {key: _copied(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_copied, state))
    if state is None or type(state) in (bool, int, float, str):
        return state
    raise TypeError(
        f"aggregator: its state contains a {type(state).__name__}, which checkpoints cannot contain: use tensors,"
        " numbers and strings, in dicts, lists and tuples."
    )


def _still(server: FlatView, trainable: int) -> Tensor:
    """Return the delta of buffers and frozen parameters that do not change, counted from `SharedTensors.origin`."""
    carried = server.vector[trainable:]
    return torch.where(carried.isfinite(), torch.zeros_like(carried), -carried)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


@torch.no_grad()
def _subtract(shared: SharedTensors, server: FlatView, steps: list[Tensor]) -> bool:
    """Write ``server - steps`` into the module, some rows at a time; return False if it spoils finite values."""
    trainable = len(shared.names)
    moved = [number for number in range(len(steps)) if number not in shared.unmoved]

    def after(number: int, rows: slice | None) -> tuple[Tensor, Tensor]:
        before, step = rows_of(server.tensors[number], rows), steps[number]
        step = rows_of(step, rows) if step.dim() else step
        if number < trainable:
            return before, before.double() - step
        # As in `SharedTensors.origin`, from which deltas are counted.
        return before, before.double().nan_to_num(0.0, 0.0, 0.0).sub_(step)

    def write(number: int, rows: slice | None) -> Tensor:
        _, value = after(number, rows)
        shared.view.write_rows(number, rows, value)
        return value.sum()

    most = elements_at_once(shared.view.device)
    pieces = [(number, rows) for number in moved for rows, _ in pieces_of(server.tensors[number], most)]
    # If all sums are finite, so is every element, and this check takes no memory.
    if torch.stack([write(*piece) for piece in pieces]).isfinite().all():
        return True
    return all((value.isfinite() | ~before.isfinite()).all() for before, value in itertools.starmap(after, pieces))


def _checked(answer: Any, params: Params) -> tuple[Params, Any]:
    """Return the answer of a server optimizer's ``update`` if it is valid."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Mapping):
        step, state = answer
        if step.keys() == params.keys() and all(step[name].shape == params[name].shape for name in params):
            return step, state
    raise TypeError(
        "server_optimizer: update must return (step, state), and step must have one tensor for each parameter, with the"
        " names and shapes of delta."
    )
