"""What callbacks and schedulers watch, through rounds of nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_fedscale.core.lightning.trainer_state import metric_stores
from lightning_fedscale.utils.foreign import attribute_of


class Monitors:
    """A round of nobody logs nothing: who watches a value goes on with the last one, or waits for the first.

    Without it `EarlyStopping` and `ReduceLROnPlateau` would end a training whose first round is empty, or the first
    one after it was resumed, since what they watch is missing.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._last: dict[str, Tensor] = {}
        self._waiting: list[Any] = []

    def state_dict(self, *, in_client: bool) -> dict[str, Tensor]:
        """The last values of all that callbacks can watch, but for what every round has of its own.

        At the end of an epoch those of the epoch belong to them, which Lightning computes when it is asked: on all
        ranks. While a client trains, what is being logged is the client's.
        """
        trainer = self._trainer
        known = {**self._last, **(metric_stores(trainer).watched if in_client else trainer.callback_metrics)}
        return {
            name: value.detach().cpu()
            for name, value in known.items()
            if name == "round/loss" or not name.startswith("round/")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these."""
        self._last = dict(state)

    def end_round(self, *, empty: bool) -> None:
        """A round's values have been logged, if there are any; callbacks and schedulers are to look at them now."""
        self.close()
        if not empty:
            self._last = {}
            return
        known = metric_stores(self._trainer).watched
        for name, value in self._last.items():
            known.setdefault(name, value)
        for each in self._watchers():
            if each.monitor not in known and attribute_of(each, "strict") is True:
                each.strict = False
                self._waiting.append(each)

    def close(self) -> None:
        """Who waited is as strict as before."""
        for each in self._waiting:
            each.strict = True
        self._waiting = []

    def _watchers(self) -> list[Any]:
        every = (*self._trainer.callbacks, *self._trainer.lr_scheduler_configs)  # type: ignore[attr-defined]
        return [each for each in every if isinstance(attribute_of(each, "monitor"), str)]
