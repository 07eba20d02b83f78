"""The step of a local batch, as Lightning runs it or only the needed part of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_fedscale.core.executors.correction import ClientCorrection
from lightning_fedscale.core.executors.fast_step import FastStep, reason_for_lightning_step
from lightning_fedscale.core.lightning.round_loops import ClientLoops


class LocalStep(Protocol):
    """Runs one local batch."""

    def step(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        """Run one local batch; return the outputs of ``training_step``, with a detached ``loss`` if there is one.

        Args:
            batch: the batch on the device.
            batch_idx: number of the batch within the client's round.
            last: whether it is the client's last batch, after which accumulated gradients are applied.
            training: False runs the forward pass only.
        """


def local_step(trainer: pl.Trainer, correction: ClientCorrection | None = None) -> LocalStep:
    """Return the fastest local step that supports everything this Trainer needs, and log the choice.

    Args:
        trainer: the Trainer with its optimizers built, and callbacks and hooks in place.
        correction: changes the gradients of every optimizer step; None for no change.
    """
    takes_index = is_param_in_hook_signature(trainer.lightning_module.training_step, "batch_idx", min_args=2)
    if (reason := reason_for_lightning_step(trainer)) is None:
        rank_zero_info("Federated: a local step runs only training_step, backward and optimizer.step().")
        return FastStep(trainer, takes_index=takes_index, correct=correction)
    rank_zero_info(f"Federated: a local step runs Lightning's full closure, since {reason}.")
    return LightningStep(trainer, takes_index=takes_index, correction=correction)


class LightningStep:
    """Runs a local batch exactly as Lightning does, with hooks, precision plugin and clipping.

    Args:
        trainer: the Trainer.
        takes_index: whether ``training_step`` takes the number of the batch.
        correction: changes the gradients of every optimizer step; None for no change.
    """

    def __init__(self, trainer: pl.Trainer, *, takes_index: bool, correction: ClientCorrection | None = None) -> None:
        self._trainer = trainer
        self._correction = correction
        self._takes_index = takes_index
        self._loops = ClientLoops(trainer)

    def step(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        """See `LocalStep`."""
        if self._correction is None:
            return self._run(batch, batch_idx, last=last, training=training)
        with self._correction.within(self._trainer):
            return self._run(batch, batch_idx, last=last, training=training)

    def _run(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        kwargs = OrderedDict(batch=batch, batch_idx=batch_idx) if self._takes_index else OrderedDict(batch=batch)
        steps = last or (batch_idx + 1) % self._trainer.accumulate_grad_batches == 0
        return self._loops.run(kwargs, batch_idx, accumulates=not training or not steps, training=training)
