"""The state of the Trainer while clients train, and the global model for everybody else meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.core.executors import RoundContext
from lightning_fedscale.core.lightning.module_flags import flags_of
from lightning_fedscale.core.lightning.run_state import last_batch_kept
from lightning_fedscale.core.lightning.trainer_state import modes_before_validation
from lightning_fedscale.utils import randomness


class ClientScope:
    """Knows whether the module holds a client's model, and gives the global one at any time.

    Args:
        trainer: the Trainer, as the user built it.

    Attributes:
        accumulation: batches per optimizer step of a client; a callback may change it.
        accumulation_of_trainer: the value that the Trainer was built with, ``accumulate_grad_batches``.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._live: RoundContext | None = None
        self.accumulation = self.accumulation_of_trainer = trainer.accumulate_grad_batches

    @property
    def in_client(self) -> bool:
        """Whether the module holds a client's model right now."""
        return self._live is not None

    @contextmanager
    def entered(self, context: RoundContext, *, draws: bool) -> Iterator[None]:
        """Let clients train inside; afterwards the Trainer and the global generators are as before.

        Args:
            context: the context of the round.
            draws: whether clients draw from the global generators.
        """
        trainer, device = self._trainer, self._trainer.strategy.root_device
        outside = randomness.capture(device) if draws else None
        self._live = context
        around, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, self.accumulation
        try:
            with last_batch_kept(trainer):
                yield
        finally:
            trainer.accumulate_grad_batches = around
            self._live = None
            if outside is not None:
                randomness.restore(outside, device)

    def global_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a module's state dict with the global model's values in place of the training client's."""
        if self._live is None:
            return state
        context = self._live
        state = context.shared.irregular.regular(state)
        return {
            **context.shared.view.substituted(state, context.server),
            **context.shared.of_personal(state, context.own),
        }

    def flags(self) -> dict[str, Any]:
        """Return what is frozen now or, while a client trains, what was frozen when the round began."""
        trainer, module = self._trainer, self._trainer.lightning_module
        at_start = () if self._live is None else self._live.shared.parameters
        state = self.global_state_dict(module.state_dict())
        modes = modes_before_validation(trainer)
        return flags_of(module, trainer.optimizers, state, {id(p): flag for p, flag in at_start}, modes)
