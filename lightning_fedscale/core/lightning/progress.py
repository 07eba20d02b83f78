"""Values in the Trainer's progress bar while a round runs."""

from __future__ import annotations

import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor

# Measured by the clock that times rounds: projects that test `val_check_interval` by time replace the clock of
# Lightning's timers and count its readings.
_SECONDS_BETWEEN_UPDATES = 0.2


class ClientProgress:
    """Adds ``clients`` (done/due on this rank) and ``client_loss`` to the bar between two rounds.

    Reading a loss waits for the device, so it is read only when the bar is drawn.

    Lightning: `_metric_component` of `RichProgressBar` holds the values at its right. The bar reads values when a step
    is over, which is a round here, and takes none in between.
    Upgrade: `RichProgressBar._update_metrics` in `callbacks/progress/rich_progress.py`.

    Args:
        trainer: the Trainer, with a rich or tqdm bar; any other bar is unchanged.
        due: number of clients that this rank trains in the round.
    """

    def __init__(self, trainer: pl.Trainer, due: int) -> None:
        self._trainer = trainer
        self._due = due
        self._bar = trainer.progress_bar_callback if trainer.is_global_zero else None
        self._next = time.perf_counter() + _SECONDS_BETWEEN_UPDATES

    def show(self, done: int, loss: Tensor | None) -> None:
        """Redraw the bar if enough time has passed since the last time."""
        if self._bar is None or time.perf_counter() < self._next:
            return
        values: dict[str, int | str | float | dict[str, float]] = {"clients": f"{done}/{self._due}"}
        if loss is not None:
            values["client_loss"] = f"{float(loss):.3g}"
        self._draw(values)
        self._next = time.perf_counter() + _SECONDS_BETWEEN_UPDATES

    def _draw(self, values: dict[str, int | str | float | dict[str, float]]) -> None:
        bar, trainer = self._bar, self._trainer
        if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
            bar.train_progress_bar.set_postfix({**bar.get_metrics(trainer, trainer.lightning_module), **values})
        elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar._metric_component is not None:
            bar._metric_component.update({**bar.get_metrics(trainer, trainer.lightning_module), **values})
            bar.refresh()
