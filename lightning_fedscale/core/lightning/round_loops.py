"""Lightning's optimization loops, once for the server, where a step is a round, and once for the client.

Lightning's Trainer calls ``epoch_loop.automatic_optimization.run`` (or ``manual_optimization.run``) for every item of
its train loader. `RoundLoops` puts loops there that run a whole round instead, and count it as one optimizer step.
`ClientLoops` are Lightning's own, for the local batches inside.
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
from torch.optim import Optimizer


class NoAccumulation(int):
    """The Trainer's ``accumulate_grad_batches`` of 1, since rounds are not accumulated.

    A number of any other type, even 1, was set by a callback and is meant for the local batches.
    """


class RunRound(Protocol):
    """Runs a round; ``training`` is False if nothing may be learnt (an epoch that only updates BatchNorm)."""

    def __call__(self, batch: Any, *, training: bool) -> dict[str, Any]:
        """See `lightning_fedscale.core.round.federation.Federation.run_round`."""


class RoundLoops:
    """Replaces the Trainer's two optimization loops and puts them back.

    Lightning: its loops `_AutomaticOptimization` and `_ManualOptimization` own the counters of steps, and
    `_skip_backward` says whether an epoch has forward passes only. A strategy has no hook around a whole step.
    Upgrade: `_TrainingEpochLoop.advance` in `loops/training_epoch_loop.py`, `loops/optimization/automatic.py` and
    `loops/optimization/manual.py`.

    Args:
        trainer: the Trainer.
        run_round: runs a round in place of a step.
    """

    def __init__(self, trainer: pl.Trainer, run_round: RunRound) -> None:
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._originals = self._epoch_loop.automatic_optimization, self._epoch_loop.manual_optimization
        automatic, manual = self._originals
        self._epoch_loop.automatic_optimization = _RoundAutomatic(automatic, run_round)
        self._epoch_loop.manual_optimization = _RoundManual(manual, run_round)

    def remove(self) -> None:
        """Restore the Trainer's own loops; they share the counters, so nothing is lost."""
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
    """Count an epoch as complete if its last round was, after the Trainer's counters were loaded.

    A checkpoint written between the last batch of an epoch and the epoch's end holds inconsistent counters, with which
    Lightning counts wrongly: a run that is interrupted twice trains for too long. Since epochs are short here, by
    default one round, most checkpoints are written at such moments.

    Lightning: `_batches_that_stepped` of the epoch loop is saved with the counters, and the setter of `_Loop` says that
    the fit loop does not restart, past the one of the fit loop, which would set counters back.
    Upgrade: `_FitLoop.restarting` in `loops/fit_loop.py`, `_TrainingEpochLoop.advance` in
    `loops/training_epoch_loop.py`.
    """
    fit_loop: Any = trainer.fit_loop
    batches, epochs = fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress
    if not batches.is_last_batch or epochs.current.completed == epochs.current.ready:
        return
    if batches.current.processed < batches.current.ready:  # written inside the round, which is repeated
        return
    if batches.current.completed < batches.current.ready:  # written in on_train_batch_end
        batches.increment_completed()
        fit_loop.epoch_loop._batches_that_stepped += 1
        epochs.increment_processed()
    elif epochs.current.processed < epochs.current.ready:  # written while validating: the epoch's end is yet to come
        return
    epochs.increment_completed()
    _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # past the fit loop's own setter


class ClientLoops:
    """Lightning's own loops for the batches of a client.

    Lightning: `_AutomaticOptimization` and `_ManualOptimization` run a batch with all hooks, precision, clipping and
    closures, and no public function does. Their `_make_closure`, `_training_step`, `_optimizer_step` and
    `_skip_backward` are the steps of that, which reach the strategy by `_call_strategy_hook`.
    Upgrade: `loops/optimization/automatic.py` and `loops/optimization/manual.py`.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._automatic = _ClientAutomatic(trainer)
        self._manual = _ManualOptimization(trainer)

    def run(
        self, kwargs: OrderedDict[str, Any], batch_idx: int, *, accumulates: bool, training: bool
    ) -> dict[str, Any]:
        """Run a batch.

        Args:
            kwargs: arguments of ``training_step``.
            batch_idx: number of the batch within the client's round.
            accumulates: leave the optimizer step to a later batch.
            training: False runs the forward pass only.
        """
        if not self._trainer.lightning_module.automatic_optimization:
            return self._manual.run(kwargs)
        self._automatic._skip_backward = not training
        self._automatic.accumulates = accumulates
        return self._automatic.run(self._trainer.optimizers[0], batch_idx, kwargs)


def outputs_of(result: ClosureResult, window: int) -> dict[str, Any]:
    """Return the outputs of a local batch with the batch's own loss, which Lightning divides by ``window``."""
    if result.loss is None:
        return {}
    outputs = result.asdict()
    if window > 1:
        outputs["loss"] = outputs["loss"] * window
    return outputs


class _ClientAutomatic(_AutomaticOptimization):
    """Accumulates by the client's own batches, and lets a client skip a step on any number of ranks."""

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
