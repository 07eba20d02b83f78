"""The floating-point operations of a module's steps, counted while the run's own steps execute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedscale.callbacks.compute_accounting.coverage import OperatorCoverage
from lightning_fedscale.callbacks.compute_accounting.parameter_counts import CurrentParameters
from lightning_fedscale.callbacks.compute_accounting.signature_costs import MAX_FIRST_STEPS, CostTable, SignatureCosts
from lightning_fedscale.callbacks.compute_accounting.tokens import TokenCounter, samples_of
from lightning_fedscale.core.lightning.module_state import current_hook
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of
from lightning_fedscale.devices.profiling.operator_counter import OperatorCounter, storage_of
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"Tally": "lightning_fedscale.callbacks.compute_accounting.client_costs.ClientTally"})


class BatchCost(NamedTuple):
    """The cost of one batch, counted while it ran or estimated from counted ones.

    Attributes:
        forward: FLOPs of the step without its backward pass.
        backward: FLOPs of the backward pass.
        optimizer: operations of the optimizers in manual optimization.
        tokens: tokens in it, or samples.
        samples: samples in it.
        size: active parameters.
        counted: whether it was counted itself.
        error: standard error of its training FLOPs, if it was estimated.
    """

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    size: float = 0.0
    counted: bool = False
    error: float = 0.0

    @property
    def flops(self) -> float:
        """Forward and backward FLOPs, which are the compute of scaling laws."""
        return self.forward + self.backward


class Meter:
    """Counts the FLOPs of some of a module's own steps while they run, and estimates the others.

    A signature consists of the kind of step, the batch signature and the trainable parameters, all known before the
    step runs. The first steps of every signature are counted, then one step each time their number doubles, and many
    more if costs vary. A step that is not counted costs the mean of the latest counted ones. Nothing is copied, and the
    run is not changed.

    Args:
        module: the module.
        tokens_fn: returns the tokens in a batch; called for batches that are counted, before their step. None is the
            default rule of `TokenCounter`.

    Attributes:
        module: the module.
        parameters: its current parameters.
        costs: the counted costs, by signature.
        coverage: the operators of all counted steps.
        evaluations: counts backward passes, for optimizers that need several in a step.
    """

    def __init__(self, module: pl.LightningModule, tokens_fn: Callable[[Any], float] | None = None) -> None:
        self.module = module
        self.parameters = CurrentParameters(module)
        self.costs = CostTable()
        self.coverage = OperatorCoverage()
        self.evaluations = Evaluations()
        self._tokens = TokenCounter(tokens_fn)
        self._alone = 0
        self._last: tuple[BatchSignature, int, SignatureCosts, BatchCost | None] | None = None

    # ---- steps that run

    def step(
        self,
        batch: Any,
        samples: int | None = None,
        *,
        loaded: Callable[[], int | None] = lambda: None,
        name: str = "training_step",
        backward: bool = True,
        optimizes: bool = True,
        everything: bool = False,
        charge: Callable[[BatchCost], None] | None = None,
    ) -> MeteredStep:
        """Return a context manager to be active while a step runs, which counts the step if it is due.

        Args:
            batch: batch of the step, before it runs.
            samples: number of samples in the batch; None reads it off the batch.
            loaded: returns that number if the batch cannot be inspected.
            name: "training_step", "validation_step", "test_step" or "gradient"; the last is computed by no hook.
            backward: whether the step has more than a forward pass.
            optimizes: whether optimizers may step in it.
            everything: count everything that runs in it, not only the module's own hook.
            charge: called with the cost.
        """
        signature, flags = signature_of(batch).anonymous(), self.parameters.flags
        if samples is None and signature.first is None:
            samples = loaded()
        costs, scale = self.costs.of(name if backward else f"{name} forward", signature, flags, samples)
        training = name == "training_step"
        due = costs.is_due()
        if training and optimizes and self.module.automatic_optimization and costs.counted < MAX_FIRST_STEPS:
            due = due or self.costs.of_optimizer(flags).counted < 2  # the first step creates the optimizer's state
        counter, tokens = None, math.nan
        if due:
            counter = self._counter(name, everything)
            if training and self._tokens.is_custom:
                tokens = self._tokens.of_batch(batch)
        if training and not self._tokens.is_custom:
            tokens = self._tokens.of_signature(signature, samples)
        fresh = BatchCost(
            tokens=tokens, samples=samples_of(signature, samples), size=self.parameters.size_of(flags).active
        )
        return MeteredStep(self, costs, scale, flags, counter, fresh, charge)

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Return a context manager for a batch that runs alone to check vectorized training; it counts the cost."""
        return self.step(batch, samples, optimizes=False, charge=self._note_alone)

    def _note_alone(self, cost: BatchCost) -> None:
        self._alone += cost.counted

    def take_alone(self) -> int:
        """Return the number of steps counted by `alone` since the last call."""
        number, self._alone = self._alone, 0
        return number

    def wants(self, signature: BatchSignature, samples: int) -> bool:
        """Return whether no such batch has been counted yet."""
        return not self.costs.of("training_step", signature, self.parameters.flags, samples)[0].counted

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """Return a context manager to be active while the optimizers of so many clients step at once."""
        costs = self.costs.of_optimizer(self.parameters.flags)
        if costs.counted >= 2:
            return nullcontext()
        return _OptimizerStep(self._counter("training_step", False), costs, clients)

    def _counter(self, name: str, everything: bool) -> OperatorCounter:
        # Timing is cheap on a CPU; CUDA must be synchronized, which is done only if there are unknown operators.
        timed = not torch.cuda.is_available() or bool(self.coverage.unknown)
        tables = {storage_of(table) for table in self.parameters.tables().values()}
        return OperatorCounter(partial(current_hook, self.module), name, tables, timed=timed, everything=everything)

    def record(self, counter: OperatorCounter) -> None:
        """Record what a counted step shows besides its cost: operators and multiplied embedding tables."""
        self.coverage.add(counter)
        if counter.multiplied:
            tables = self.parameters.tables().items()
            self.parameters.multiply([name for name, table in tables if storage_of(table) in counter.multiplied])

    # ---- steps that are not counted

    def expected(
        self, signature: BatchSignature, samples: int | None = None, name: str = "training_step"
    ) -> BatchCost | None:
        """Return the estimated cost of such a batch; None if no similar batch has been counted yet.

        Args:
            signature: signature of the batch.
            samples: number of samples; None reads it off the signature.
            name: name of the step.
        """
        flags = self.parameters.flags
        costs, scale = self.costs.of(name, signature, flags, samples)
        if not costs.counted:  # then by the cost per sample of batches with another signature
            if (similar := self.costs.similar(name)) is None or signature.first is None:
                return None
            other, costs = similar
            scale = samples_of(signature, samples) / max(1.0, samples_of(other, None))
        forward, backward, optimizer, tokens = (value * scale for value in costs.mean)
        if not self._tokens.is_custom:
            tokens = self._tokens.of_signature(signature, samples)
        size = self.parameters.size_of(flags).active
        return BatchCost(
            forward, backward, optimizer, tokens, samples_of(signature, samples), size, error=costs.error * scale
        )

    def vectorized(self, signature: BatchSignature, samples: int) -> BatchCost | None:
        """Return the cost of one of several batches that share a step and a signature, given as the same object."""
        if self._last is None or self._last[0] is not signature or self._last[1] != samples or self._last[3] is None:
            costs = self.costs.of("training_step", signature, self.parameters.flags, samples)[0]
            self._last = signature, samples, costs, self.expected(signature, samples)
        self._last[2].steps += 1
        return self._last[3]

    def optimizer_cost(self) -> float:
        """Return the operations of an optimizer step; 0 in manual optimization, where each batch has its own count."""
        automatic = self.module.automatic_optimization
        return self.costs.of_optimizer(self.parameters.flags).largest if automatic else 0.0

    def check_tokens(self, batch: Any) -> None:
        """Refuse a `tokens_fn` that does not return a number of tokens for the first batch."""
        if self._tokens.is_custom:
            self._tokens.of_batch(batch)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for the checkpoint."""
        return {"known": self.costs.state(), "multiplied": sorted(self.parameters.multiplied)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts from a checkpoint."""
        self.costs.load(state["known"])
        self.parameters.multiplied.clear()
        self.parameters.multiply(state["multiplied"])


class MeteredStep:
    """A context manager that is active while a step runs, and charges its cost at the end.

    Attributes:
        cost: cost of the step, once it has ended.
    """

    def __init__(
        self,
        meter: Meter,
        costs: SignatureCosts,
        scale: float,
        flags: tuple[bool, ...],
        counter: OperatorCounter | None,
        fresh: BatchCost,
        charge: Callable[[BatchCost], None] | None,
    ) -> None:
        self._meter = meter
        self._costs = costs
        self._scale = scale
        self._flags = flags
        self._counter = counter
        self._charge = charge
        self.cost = fresh

    def __enter__(self) -> MeteredStep:
        if self._meter.evaluations.counting:
            self._meter.evaluations.take()
        if self._counter is not None:
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        counter, meter, costs = self._counter, self._meter, self._costs
        if counter is not None:
            counter.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            return  # a failed step is not counted
        repeats = max(1, meter.evaluations.take()) if meter.evaluations.counting else 1
        cost, automatic = self.cost, meter.module.automatic_optimization
        costs.steps += 1
        if counter is not None:
            flops, scale = counter.flops, self._scale
            values = flops["forward"] / repeats, flops["backward"] / repeats, 0.0 if automatic else flops["optimizer"]
            tokens = 0.0 if math.isnan(cost.tokens) else cost.tokens
            costs.add(*(value / scale for value in (*values, tokens)))
            if automatic and counter.steps:
                meter.costs.of_optimizer(self._flags).add(0.0, 0.0, flops["optimizer"] / counter.steps, 0.0)
            meter.record(counter)
            forward, backward, optimizer = values
            cost = cost._replace(counted=True, size=meter.parameters.size_of(self._flags).active)
        else:
            forward, backward, optimizer, tokens = (value * self._scale for value in costs.mean)
            cost = cost._replace(error=costs.error * self._scale * repeats)
        cost = cost._replace(forward=forward * repeats, backward=backward * repeats, optimizer=optimizer)
        self.cost = cost._replace(tokens=tokens) if math.isnan(cost.tokens) else cost
        if self._charge is not None:
            self._charge(self.cost)


class _OptimizerStep:
    """A context manager that is active while the optimizers of several clients step at once."""

    def __init__(self, counter: OperatorCounter, costs: SignatureCosts, clients: int) -> None:
        self._counter = counter
        self._costs = costs
        self._clients = clients

    def __enter__(self) -> None:
        self._counter.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and self._counter.steps:
            self._costs.add(0.0, 0.0, self._counter.flops["optimizer"] / self._clients, 0.0)


class Evaluations(pl.Callback):
    """Counts backward passes for optimizers that need more than one in a step."""

    def __init__(self) -> None:
        self.counting = False
        self._number = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count a backward pass."""
        self._number += 1

    def take(self) -> int:
        """Return the number of backward passes since the last call."""
        number, self._number = self._number, 0
        return number
