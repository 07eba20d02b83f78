"""Values monitored by callbacks and schedulers, in rounds without clients and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_fedscale.core.lightning.trainer_state import metric_stores
from lightning_fedscale.utils.foreign import attribute_of


class Monitors:
    """Provides the last monitored values in rounds without clients, which log nothing; before any value, monitors wait.

    After a resume it also provides those that rounds do not log every time, as in a run that was never stopped. Without
    this, `EarlyStopping` and `ReduceLROnPlateau` would end a run whose first round, or first round after resuming, is
    empty, since the value that they monitor is missing.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._last: dict[str, Tensor] = {}
        self._waiting: list[Any] = []

    def state_dict(self, *, in_client: bool) -> dict[str, Tensor]:
        """Return the last values that callbacks can monitor, except those that every round logs itself.

        At the end of an epoch they include the epoch's values, which Lightning computes on request: on all ranks.
        While a client trains, the values being logged are the client's.
        """
        trainer = self._trainer
        known = {**self._last, **(metric_stores(trainer).watched if in_client else trainer.callback_metrics)}
        return {
            name: value.detach().cpu()
            for name, value in known.items()
            if name == "round/loss" or not name.startswith("round/")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the last values."""
        self._last = dict(state)

    def end_round(self, *, empty: bool) -> None:
        """Provide missing values after a round's values were logged, before callbacks and schedulers read them."""
        self.close()
        known = metric_stores(self._trainer).watched
        for name, value in self._last.items():
            if empty or not name.startswith("round/"):  # of which a round with clients has what it has
                known.setdefault(name, value)
        if not empty:
            self._last = {}
            return
        for each in self._watchers():
            if each.monitor not in known and attribute_of(each, "strict") is True:
                each.strict = False
                self._waiting.append(each)

    def close(self) -> None:
        """Restore the strictness of those that waited."""
        for each in self._waiting:
            each.strict = True
        self._waiting = []

    def _watchers(self) -> list[Any]:
        every = (*self._trainer.callbacks, *self._trainer.lr_scheduler_configs)  # type: ignore[attr-defined]
        return [each for each in every if isinstance(attribute_of(each, "monitor"), str)]
