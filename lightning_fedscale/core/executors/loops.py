"""Lightning's optimization loops, once for the server, where a step is a round, and once for the client.

Lightning's Trainer calls ``epoch_loop.automatic_optimization.run`` (or ``manual_optimization.run``) for every item of
its train loader. `RoundLoops` puts loops there that run a whole round instead, and count it as one optimizer step.
`FullStep` uses Lightning's own, for the local batches inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import Optimizer

from lightning_fedscale.core.executors.correction import ClientCorrection
from lightning_fedscale.core.executors.fast_step import LeanStep, outputs_of, why_not_lean


class NoAccumulation(int):
    """The 1 that the Trainer has as ``accumulate_grad_batches``, since rounds are not accumulated.

    Any other number, also another 1, was set by a callback, and is meant for the local batches.
    """


class RunRound(Protocol):
    """Runs a round; ``training`` is False when nothing may learn (an epoch that only feeds BatchNorm)."""

    def __call__(self, batch: Any, *, training: bool) -> dict[str, Any]:
        """See `lightning_fedscale.core.round.federation.Federation.run_round`."""


class RoundLoops:
    """Replaces the Trainer's two optimization loops and puts them back.

    Args:
        trainer: the Trainer.
        run_round: what a step does.
    """

    def __init__(self, trainer: pl.Trainer, run_round: RunRound) -> None:
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._originals = self._epoch_loop.automatic_optimization, self._epoch_loop.manual_optimization
        automatic, manual = self._originals
        self._epoch_loop.automatic_optimization = _RoundAutomatic(automatic, run_round)
        self._epoch_loop.manual_optimization = _RoundManual(manual, run_round)

    def remove(self) -> None:
        """The Trainer's own loops are back; they share the counters, so nothing is lost."""
        self._epoch_loop.automatic_optimization, self._epoch_loop.manual_optimization = self._originals


class _RoundAutomatic(_AutomaticOptimization):
    def __init__(self, original: _AutomaticOptimization, run_round: RunRound) -> None:
        super().__init__(original.trainer)
        self.optim_progress = original.optim_progress
        self._run_round = run_round

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        if self._skip_backward:
            return self._run_round(kwargs["batch"], training=False)
        step, zero_grad = self.optim_progress.optimizer.step, self.optim_progress.optimizer.zero_grad
        step.increment_ready()
        outputs = self._run_round(kwargs["batch"], training=True)
        for count in (zero_grad.increment_ready, zero_grad.increment_started, zero_grad.increment_completed):
            count()
        step.increment_completed()
        return outputs


class _RoundManual(_ManualOptimization):
    def __init__(self, original: _ManualOptimization, run_round: RunRound) -> None:
        super().__init__(original.trainer)
        self.optim_step_progress = original.optim_step_progress
        self._run_round = run_round

    def run(self, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        self.optim_step_progress.increment_ready()
        outputs = self._run_round(kwargs["batch"], training=True)
        self.optim_step_progress.increment_completed()
        return outputs


def close_finished_epoch(trainer: pl.Trainer) -> None:
    """After the Trainer's counters were loaded: an epoch whose last round was over is over.

    A checkpoint written between the last batch of an epoch and its end leaves Lightning's counters half way, and from
    such a state they go wrong: a run that is interrupted twice trains for too long. Epochs are short here, by default
    one round, so checkpoints at such moments are the rule.
    """
    fit_loop: Any = trainer.fit_loop
    batches, epochs = fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress
    if not batches.is_last_batch or epochs.current.completed == epochs.current.ready:
        return
    if batches.current.processed < batches.current.ready:  # written inside the round, which is to be repeated
        return
    if batches.current.completed < batches.current.ready:  # written in on_train_batch_end
        batches.increment_completed()
        fit_loop.epoch_loop._batches_that_stepped += 1
        epochs.increment_processed()
    elif epochs.current.processed < epochs.current.ready:  # written while validating: the epoch's end is yet to come
        return
    epochs.increment_completed()
    _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # past the fit loop's own setter


class LocalStep(Protocol):
    """Runs one local batch."""

    def step(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        """One local batch; returns what ``training_step`` gave, with ``loss`` as a detached tensor if there is one.

        Args:
            batch: on the device.
            batch_idx: number of the batch within the client's round.
            last: whether it is the client's last, where accumulated gradients are used up.
            training: False runs the forward pass only.
        """


def local_step(trainer: pl.Trainer, correction: ClientCorrection | None = None) -> LocalStep:
    """The cheapest way to run local batches that leaves out nothing the Trainer was asked for, and say which.

    Args:
        trainer: the Trainer, its optimizers built, callbacks and hooks in place.
        correction: changes the gradients of every optimizer step; None if nothing does.
    """
    takes_index = is_param_in_hook_signature(trainer.lightning_module.training_step, "batch_idx", min_args=2)
    if (reason := why_not_lean(trainer)) is None:
        rank_zero_info("Federated: a local step is training_step, backward and optimizer step, nothing else.")
        return LeanStep(trainer, takes_index=takes_index, correct=correction)
    rank_zero_info(f"Federated: a local step takes Lightning's full path, since {reason}.")
    return FullStep(trainer, takes_index=takes_index, correction=correction)


class FullStep:
    """A local batch exactly as Lightning itself would run it, hooks, precision, clipping and all.

    Args:
        trainer: the Trainer.
        takes_index: whether ``training_step`` wants the number of the batch.
        correction: changes the gradients of every optimizer step; None if nothing does.
    """

    def __init__(self, trainer: pl.Trainer, *, takes_index: bool, correction: ClientCorrection | None = None) -> None:
        self._trainer = trainer
        self._correction = correction
        self._takes_index = takes_index
        self._automatic = _ClientAutomatic(trainer)
        self._manual = _ManualOptimization(trainer)

    def step(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        """See `LocalStep`."""
        if self._correction is None:
            return self._run(batch, batch_idx, last=last, training=training)
        with self._correction.within(self._trainer):
            return self._run(batch, batch_idx, last=last, training=training)

    def _run(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        trainer = self._trainer
        kwargs = OrderedDict(batch=batch, batch_idx=batch_idx) if self._takes_index else OrderedDict(batch=batch)
        if not trainer.lightning_module.automatic_optimization:
            return self._manual.run(kwargs)
        self._automatic._skip_backward = not training
        self._automatic.accumulates = not training or not (
            last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        )
        return self._automatic.run(trainer.optimizers[0], batch_idx, kwargs)


class _ClientAutomatic(_AutomaticOptimization):
    """Decides by the client's own batches when to accumulate, and lets a client skip a step on any number of ranks."""

    accumulates = False

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        closure: Callable[[], Any] = self._make_closure(kwargs, optimizer, batch_idx)
        if self.accumulates:
            closure()
        else:
            self._optimizer_step(batch_idx, closure)
        return outputs_of(closure.consume_result(), self.trainer.accumulate_grad_batches)  # type: ignore[attr-defined]

    def _training_step(self, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        trainer = self.trainer
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
        return self.output_result_cls.from_training_step_output(output, trainer.accumulate_grad_batches)
