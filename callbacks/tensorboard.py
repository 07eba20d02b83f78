"""What callbacks give to loggers, what they show in TensorBoard beside, and where a run keeps its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layout = dict[str, dict[str, list[Any]]]
"""For ``SummaryWriter.add_custom_scalars``: categories of charts of tags."""


def writers(trainer: pl.Trainer, method: str) -> Iterator[Any]:
    """The loggers' writers that have such a method; on rank 0."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if trainer.is_global_zero and hasattr(experiment, method):
            yield experiment


def send(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Straight to the loggers, and to where callbacks look for what they monitor; ``self.log`` takes far longer."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    publish(trainer, metrics)


def publish(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Put values where callbacks look for what they monitor."""
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    for known in (trainer._logger_connector._callback_metrics, trainer._logger_connector._logged_metrics):
        known.update(values)


def show(trainer: pl.Trainer, tag: str, figure: Figure) -> None:
    """Give a figure to the loggers that take one."""
    for writer in writers(trainer, "add_figure"):
        writer.add_figure(tag, figure, trainer.global_step)


def lay_out(trainer: pl.Trainer, layout: Layout) -> None:
    """Tell TensorBoard which curves belong together, beside what other callbacks told it."""
    for writer in writers(trainer, "add_custom_scalars"):
        # Of several layouts of a run only one is shown.
        writer.fedscale_layout = {**getattr(writer, "fedscale_layout", {}), **layout}
        writer.add_custom_scalars(writer.fedscale_layout)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Where the first logger keeps its files of this run; None without one, or if it keeps none. For rank 0."""
    if not trainer.loggers:
        return None  # `trainer.log_dir` would be the current directory
    logger = trainer.loggers[0]
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    if logger.save_dir is None:
        return None
    return Path(os.path.join(logger.save_dir, str(logger.name), str(logger.version)))
