"""The floating-point operations of a module's steps, counted while the run's own steps execute."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_fedscale.callbacks.compute_accounting.parameter_counts import (
    ParameterCounts,
    count_parameters,
    tables_of,
)
from lightning_fedscale.core.lightning.module_state import current_hook
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of
from lightning_fedscale.devices.profiling.operator_counter import UNKNOWN, Operator, OperatorCounter, storage_of
from lightning_fedscale.types import ClientCost

_TEXT = (torch.int32, torch.int64)
_FIRST = 8  # first steps of every signature, which are all counted
_VARIED = 64  # the same if costs vary
_IN_OCTAVE = 32  # if costs vary, about this many of steps 64 to 127, 128 to 255 and so on; else one of each octave
_RECENT = 128  # latest counted steps, from which the others are estimated
_SIGNATURES = 64  # with more signatures, batches of new shapes are estimated by their size


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


class _Counted:
    """The counts of the steps of one signature.

    Attributes:
        steps: number of steps.
        counted: number of steps that were counted.
        varies: whether the costs of the counted steps differ.
        mean: mean forward, backward, optimizer and tokens of the latest counted steps.
        largest: largest optimizer cost of these.
        error: standard error of the mean of forward and backward, or the recent change of this mean.
    """

    def __init__(self) -> None:
        self.steps = self.counted = 0
        self.varies = False
        self.mean = (0.0, 0.0, 0.0, 0.0)
        self.largest = self.error = 0.0
        self._recent: deque[tuple[float, ...]] = deque(maxlen=_RECENT)

    def add(self, *values: float) -> None:
        """Add a counted step."""
        self.counted += 1
        forward, backward, _, tokens = values  # an optimizer's first step may cost something else
        if self._recent and (forward, backward, tokens) != self._recent[-1][:2] + self._recent[-1][3:]:
            self.varies = True
        self._recent.append(values)
        self._sum_up()

    def is_due(self) -> bool:
        """Return whether to count the next step; steps are drawn at random, so that periodic costs cause no bias.

        The draw depends only on the number of the step, so that a resumed run counts the same steps.
        """
        number = self.steps
        if number < (_VARIED if self.varies else _FIRST):
            return True
        octave = 1 << (number.bit_length() - 1)  # from this number to its double
        if self.varies:
            return _scrambled(number) % octave < _IN_OCTAVE
        return number == octave + _scrambled(octave) % octave

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        recent = list(map(list, self._recent if self.varies else list(self._recent)[-1:]))
        return {"steps": self.steps, "counted": self.counted, "varies": self.varies, "recent": recent}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.steps, self.counted, self.varies = state["steps"], state["counted"], state["varies"]
        self._recent.extend(map(tuple, state["recent"]))
        self._sum_up()

    def _sum_up(self) -> None:
        if not (latest := list(self._recent)):
            return
        if self.varies and len(latest) > 1:
            flops = [forward + backward for forward, backward, *_ in latest]
            spread, newest = statistics.stdev(flops), max(1, len(flops) // 4)
            drift = statistics.fmean(flops[-newest:]) - statistics.fmean(flops)
            self.error = spread / math.sqrt(len(flops))
            if abs(drift) > 3.0 * spread / math.sqrt(newest):  # costs drift: use only the newest quarter
                latest, self.error = latest[-newest:], abs(drift)
        forward, backward, optimizer, tokens = (math.fsum(column) / len(latest) for column in zip(*latest, strict=True))
        self.mean = forward, backward, optimizer, tokens
        self.largest = max(values[2] for values in latest)


class Meter:
    """Counts the FLOPs of some of a module's own steps while they run, and estimates the others.

    A signature consists of the kind of step, the batch signature and the trainable parameters, all known before the
    step runs. The first steps of every signature are counted, then one step each time their number doubles, and many
    more if costs vary. A step that is not counted costs the mean of the latest counted ones. Nothing is copied, and the
    run is not changed.

    Args:
        trainer: the Trainer.
        module: the module.
        tokens_fn: returns the tokens in a batch; called for batches that are counted, before their step. None counts
            the entries of the first tensor if it holds integers in two dimensions (samples and positions), else
            samples.

    Attributes:
        operators: all operators that ran, by name.
        counts_text: whether batches are tokens of text, by the default rule.
        evaluations: counts backward passes, for optimizers that need several in a step.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, tokens_fn: Callable[[Any], float] | None = None
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._tokens_fn = tokens_fn
        self._known: dict[Any, _Counted] = {}
        self._signatures: dict[str, int] = {}
        self._restored: dict[str, Any] = {}
        self._multiplied: set[str] = set()
        self._uncounted = math.nan
        self._alone = 0
        self._last: tuple[BatchSignature, int, _Counted, BatchCost | None] | None = None
        self.operators: dict[str, Operator] = {}
        self.counts_text = False
        self.evaluations = Evaluations()
        self._parameters: list[nn.Parameter] = []
        self._sizes: dict[tuple[bool, ...], ParameterCounts] = {}
        self.refresh()

    # ---- the current module

    def refresh(self) -> None:
        """Update the list of parameters."""
        named = dict(self._module.named_parameters())
        pruned = any(name.endswith("_orig") for name in named)
        if pruned or list(map(id, self._parameters)) != list(map(id, named.values())):
            self._parameters, self._sizes = list(named.values()), {}

    @property
    def size(self) -> ParameterCounts:
        """The module's size, with the parameters that are currently trainable."""
        return self._size_of(self._flags())

    def _size_of(self, flags: tuple[bool, ...]) -> ParameterCounts:
        if (size := self._sizes.get(flags)) is None:
            size = self._sizes[flags] = count_parameters(self._module, self._multiplied)
        return size

    def _flags(self) -> tuple[bool, ...]:
        return tuple([parameter.requires_grad for parameter in self._parameters])

    @property
    def uncounted(self) -> float:
        """Largest fraction of a step's time in operators whose FLOPs are unknown; NaN if not measured."""
        return self._uncounted if self._has_unknown else 0.0

    @property
    def _has_unknown(self) -> bool:
        return any(operator.kind == UNKNOWN for operator in self.operators.values())

    # ---- steps

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
        form, flags = signature_of(batch).anonymous(), self._flags()
        if samples is None and form.first is None:
            samples = loaded()
        counted, scale = self._of(name if backward else f"{name} forward", form, flags, samples)
        training = name == "training_step"
        due = counted.is_due()
        if training and optimizes and self._module.automatic_optimization and counted.counted < _VARIED:
            due = due or self._optimizer(flags).counted < 2  # the first step creates the optimizer's state
        counter, tokens = None, math.nan
        if due:
            counter = self._counter(name, everything)
            if training and self._tokens_fn is not None:
                tokens = self._told_tokens(batch)
        if training and self._tokens_fn is None:
            tokens = self._tokens(form, samples)
        fresh = BatchCost(tokens=tokens, samples=_samples(form, samples), size=self._size_of(flags).active)
        return MeteredStep(self, counted, scale, flags, counter, fresh, charge)

    def alone(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Return a context manager for a batch that runs alone to check vectorized training; it counts the cost."""
        return self.step(batch, samples, optimizes=False, charge=self._note_alone)

    def _note_alone(self, cost: BatchCost) -> None:
        self._alone += cost.counted

    def take_alone(self) -> int:
        """Return the number of steps counted by `alone` since the last call."""
        number, self._alone = self._alone, 0
        return number

    def wants(self, form: BatchSignature, samples: int) -> bool:
        """Return whether no such batch has been counted yet."""
        return not self._of("training_step", form, self._flags(), samples)[0].counted

    def optimizer_step(self, clients: int) -> AbstractContextManager[Any]:
        """Return a context manager to be active while the optimizers of so many clients step at once."""
        flags = self._flags()
        if self._optimizer(flags).counted >= 2:
            return nullcontext()
        return _OptimizerStep(self._counter("training_step", False), self._optimizer(flags), clients)

    def expected(
        self, form: BatchSignature, samples: int | None = None, name: str = "training_step"
    ) -> BatchCost | None:
        """Return the estimated cost of such a batch; None if no similar batch has been counted yet.

        Args:
            form: signature of the batch.
            samples: number of samples; None reads it off the signature.
            name: name of the step.
        """
        counted, scale = self._of(name, form, self._flags(), samples)
        if not counted.counted:
            return self._scaled(form, samples, name)
        return self._estimate(counted, scale, form, samples)

    def side_by_side(self, form: BatchSignature, samples: int) -> BatchCost | None:
        """Return the cost of one of several batches that share a step and a signature, given as the same object."""
        if self._last is None or self._last[0] is not form or self._last[1] != samples or self._last[3] is None:
            counted = self._of("training_step", form, self._flags(), samples)[0]
            self._last = form, samples, counted, self.expected(form, samples)
        self._last[2].steps += 1
        return self._last[3]

    def optimizer_cost(self) -> float:
        """Return the operations of an optimizer step; 0 in manual optimization, where each batch has its own count."""
        return self._optimizer(self._flags()).largest if self._module.automatic_optimization else 0.0

    def check_tokens(self, batch: Any) -> None:
        """Refuse a `tokens_fn` that does not return a number of tokens for the first batch."""
        if self._tokens_fn is not None:
            self._told_tokens(batch)

    def _estimate(self, counted: _Counted, scale: float, form: BatchSignature, samples: int | None) -> BatchCost:
        forward, backward, optimizer, tokens = counted.mean
        return BatchCost(
            forward * scale, backward * scale, optimizer * scale,
            tokens * scale if self._tokens_fn is not None else self._tokens(form, samples),
            _samples(form, samples), self.size.active, False, counted.error * scale,
        )  # fmt: skip

    def _scaled(self, form: BatchSignature, samples: int | None, name: str) -> BatchCost | None:
        """Estimate the cost from the cost per sample of batches with another signature."""
        like = [(key[1], seen) for key, seen in self._known.items() if key[0] == name and seen.counted]
        like = [(other, seen) for other, seen in like if other.first is not None]
        if not like or form.first is None:
            return None
        other, seen = like[-1]
        scale = _samples(form, samples) / max(1.0, _samples(other, None))
        return self._estimate(seen, scale, form, samples)

    # ---- counts by signature

    def _of(
        self, name: str, form: BatchSignature, flags: tuple[bool, ...], samples: int | None = None
    ) -> tuple[_Counted, float]:
        """Return the counts of a signature, and the factor to multiply them by."""
        exact = form
        if form.first is None and samples is not None:
            exact = BatchSignature(form.spec, (*form.leaves, samples))  # the only known size of the batch
        key = name, exact, flags
        if (known := self._known.get(key)) is not None:
            return known, 1.0
        number, scale = self._signatures.get(name, 0), 1.0
        if number >= _SIGNATURES:
            key, scale = (f"{name} of any size", form.without_sizes(), flags), float(form.elements or samples or 1)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = _Counted()
            self._signatures[name] = number + 1
            if self._restored and (state := self._restored.pop(_digest(key), None)) is not None:
                known.load(state)
        return known, scale

    def _optimizer(self, flags: tuple[bool, ...]) -> _Counted:
        return self._of("optimizer", _NOTHING, flags)[0]

    def _counter(self, name: str, everything: bool) -> OperatorCounter:
        # Timing is cheap on a CPU; CUDA must be synchronized, which is done only if there are unknown operators.
        timed = not torch.cuda.is_available() or self._has_unknown
        tables = {storage_of(table) for table in self._tables().values()}
        return OperatorCounter(partial(current_hook, self._module), name, tables, timed=timed, everything=everything)

    def _tables(self) -> dict[str, nn.Parameter]:
        return {name: table for name, table in tables_of(self._module).items() if name not in self._multiplied}

    def _note(self, counter: OperatorCounter) -> None:
        """Record what a counted step shows besides its cost: operators, unknown time and multiplied tables."""
        for name, operator in counter.operators.items():
            seen = self.operators.setdefault(name, Operator(operator.kind))
            seen.calls, seen.flops = seen.calls + operator.calls, seen.flops + operator.flops
        if counter.timed and any(operator.kind == UNKNOWN for operator in counter.operators.values()):
            share = counter.uncounted_share()
            self._uncounted = share if math.isnan(self._uncounted) else max(self._uncounted, share)
        if counter.multiplied:
            found = {name for name, table in self._tables().items() if storage_of(table) in counter.multiplied}
            self._multiplied |= found
            self._sizes = {}

    # ---- tokens

    def _tokens(self, form: BatchSignature, samples: int | None) -> float:
        first = form.first
        if first is not None and first.dtype in _TEXT and len(first.shape) == 2:
            self.counts_text = True
            return float(math.prod(first.shape))
        return _samples(form, samples if first is None else None)

    def _told_tokens(self, batch: Any) -> float:
        assert self._tokens_fn is not None
        try:
            tokens = self._tokens_fn(batch)
        except Exception as error:
            raise ValueError(f"tokens_fn failed on a batch ({type(error).__name__}: {error}).") from error
        if isinstance(tokens, bool) or not isinstance(tokens, Real) or not 0 < float(tokens) < float("inf"):
            what = "a tensor" if isinstance(tokens, Tensor) else repr(tokens)
            raise ValueError(f"tokens_fn returned {what}: return a number above 0, the tokens in the batch.")
        return float(tokens)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for the checkpoint; signatures are saved as digests, since they are not primitives."""
        known = {_digest(key): counted.state() for key, counted in self._known.items() if counted.counted}
        return {"known": {**self._restored, **known}, "multiplied": sorted(self._multiplied)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts from a checkpoint."""
        self._known, self._signatures, self._restored = {}, {}, dict(state["known"])
        self._multiplied, self._sizes = set(state["multiplied"]), {}


class MeteredStep:
    """A context manager that is active while a step runs, and charges its cost at the end.

    Attributes:
        cost: cost of the step, once it has ended.
    """

    def __init__(
        self,
        meter: Meter,
        counted: _Counted,
        scale: float,
        flags: tuple[bool, ...],
        counter: OperatorCounter | None,
        fresh: BatchCost,
        charge: Callable[[BatchCost], None] | None,
    ) -> None:
        self._meter = meter
        self._counted = counted
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
        counter, meter, counted = self._counter, self._meter, self._counted
        if counter is not None:
            counter.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            return  # a failed step is not counted
        repeats = max(1, meter.evaluations.take()) if meter.evaluations.counting else 1
        cost, automatic = self.cost, meter._module.automatic_optimization
        counted.steps += 1
        if counter is not None:
            flops, scale = counter.flops, self._scale
            values = flops["forward"] / repeats, flops["backward"] / repeats, 0.0 if automatic else flops["optimizer"]
            tokens = 0.0 if math.isnan(cost.tokens) else cost.tokens
            counted.add(*(value / scale for value in (*values, tokens)))
            if automatic and counter.steps:
                meter._optimizer(self._flags).add(0.0, 0.0, flops["optimizer"] / counter.steps, 0.0)
            meter._note(counter)
            forward, backward, optimizer = values
            cost = cost._replace(counted=True, size=meter._size_of(self._flags).active)
        else:
            forward, backward, optimizer, tokens = (value * self._scale for value in counted.mean)
            cost = cost._replace(error=counted.error * self._scale * repeats)
        cost = cost._replace(forward=forward * repeats, backward=backward * repeats, optimizer=optimizer)
        self.cost = cost._replace(tokens=tokens) if math.isnan(cost.tokens) else cost
        if self._charge is not None:
            self._charge(self.cost)


class _OptimizerStep:
    """A context manager that is active while the optimizers of several clients step at once."""

    def __init__(self, counter: OperatorCounter, counted: _Counted, clients: int) -> None:
        self._counter = counter
        self._counted = counted
        self._clients = clients

    def __enter__(self) -> None:
        self._counter.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and self._counter.steps:
            self._counted.add(0.0, 0.0, self._counter.flops["optimizer"] / self._clients, 0.0)


class Tally:
    """Adds up the cost of a client's training, batch by batch.

    Args:
        meter: counts the batches.
        told: called with the total, once it is requested.

    Attributes:
        size_tokens: sum of active parameters times tokens.
        error: sum of the standard errors of training FLOPs.
        steps: number of batches.
        counted: number of batches that were counted.
    """

    def __init__(self, meter: Meter, told: Callable[[Tally, ClientCost], None]) -> None:
        self._meter = meter
        self._told = told
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._lacking: list[tuple[BatchSignature, int]] = []
        self.size_tokens = self.error = 0.0
        self.steps = self.counted = 0

    def batch(self, batch: Any, samples: int, *, training: bool = True) -> AbstractContextManager[Any]:
        """Return a context manager to be active while a batch of the client runs."""
        return self._meter.step(batch, samples, backward=training, charge=self._add)

    def again(self, batch: Any, samples: int) -> AbstractContextManager[Any]:
        """Return a context manager for the gradient of a batch that a copy of the module computes besides training."""
        return self._meter.step(batch, samples, name="gradient", everything=True, charge=self._add)

    def add(self, form: BatchSignature, samples: int) -> None:
        """Add a batch of this signature that ran vectorized, together with those of other clients."""
        if (cost := self._meter.side_by_side(form, samples)) is None:
            self._lacking.append((form, samples))
        else:
            self._add(cost)

    def total(self, optimizer_steps: int) -> ClientCost:
        """Return the total cost.

        Args:
            optimizer_steps: number of steps of the client's optimizer; ignored in manual optimization.
        """
        lacking, self._lacking = self._lacking, []
        for form, samples in lacking:
            self._add(self._meter.expected(form, samples) or BatchCost(samples=samples, tokens=samples))
        forward, backward, optimizer, tokens = self._sums
        cost = ClientCost(forward, backward, optimizer + optimizer_steps * self._meter.optimizer_cost(), tokens)
        self._told(self, cost)
        return cost

    def _add(self, cost: BatchCost) -> None:
        sums = self._sums
        sums[0] += cost.forward
        sums[1] += cost.backward
        sums[2] += cost.optimizer
        sums[3] += cost.tokens
        self.size_tokens += cost.size * cost.tokens
        self.error += cost.error
        self.steps += 1
        self.counted += cost.counted


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


_NOTHING = signature_of(())


def _samples(form: BatchSignature, samples: int | None) -> float:
    """Return ``samples`` if known; else, as Lightning does, the length of the first tensor that has one."""
    if samples is not None:
        return float(samples)
    return 1.0 if form.first is None else float(form.first.shape[0])


def _digest(key: Any) -> str:
    name, form, flags = key
    return hashlib.blake2b(repr((name, form.spec, form.leaves, flags)).encode(), digest_size=16).hexdigest()


def _scrambled(number: int) -> int:
    """Hash a number to a large pseudo-random one, always the same (SplitMix64)."""
    mask = (1 << 64) - 1
    number = (number + 1) * 0x9E3779B97F4A7C15 & mask
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
    return number ^ number >> 31
