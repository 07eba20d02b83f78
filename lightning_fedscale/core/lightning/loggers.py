"""Metrics, figures, layouts and settings for loggers, and the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_fedscale.core.lightning.trainer_state import metric_stores, steps_logged
from lightning_fedscale.utils.foreign import attribute_of, is_really

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layout = dict[str, dict[str, list[Any]]]
"""Argument of ``SummaryWriter.add_custom_scalars``: categories of charts of tags."""

FIRST = "Rounds"
"""The category shown above all others."""

_layouts: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()
"""The layout that each writer has so far."""


def writers(trainer: pl.Trainer, method: str) -> Iterator[Any]:
    """Yield the loggers' writers that have this method; only on rank 0."""
    for logger in _loggers(trainer):
        experiment = attribute_of(logger, "experiment")
        if attribute_of(experiment, method) is not None:
            yield experiment


def send(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Send metrics directly to the loggers, and `publish` them; ``self.log`` takes far longer."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=steps_logged(trainer))
    publish(trainer, metrics)


def publish(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Make values available to callbacks that monitor them."""
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    for known in metric_stores(trainer):
        known.update(values)


def show(trainer: pl.Trainer, tag: str, figure: Figure) -> None:
    """Send a figure to the loggers that accept figures: those like TensorBoard's, W&B's and MLflow's."""
    for writer in writers(trainer, "add_figure"):
        writer.add_figure(tag, figure, trainer.global_step)
    for logger in _loggers(trainer):
        if is_really(logger, WandbLogger):
            logger.log_image(tag, [figure])
        if is_really(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")


def shows_figures(trainer: pl.Trainer) -> bool:
    """Return whether any logger accepts figures."""
    by_their_own_way = any(
        is_really(logger, WandbLogger) or is_really(logger, MLFlowLogger) for logger in _loggers(trainer)
    )
    return by_their_own_way or next(writers(trainer, "add_figure"), None) is not None


def _loggers(trainer: pl.Trainer) -> list[Logger]:
    """Return the loggers on rank 0, without Lightning's dummy logger, which has every method."""
    return [each for each in trainer.loggers if trainer.is_global_zero and not isinstance(each, DummyLogger)]


def lay_out(trainer: pl.Trainer, layout: Layout) -> None:
    """Group curves in TensorBoard, in addition to the groups of other callbacks."""
    for writer in writers(trainer, "add_custom_scalars"):
        # TensorBoard shows only one layout of a run.
        known = _layouts.setdefault(writer, {})
        known.update(layout)
        writer.add_custom_scalars(dict(sorted(known.items(), key=lambda item: item[0] != FIRST)))


def log_settings(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Give hyperparameters to every logger, in addition to those that the module has given it.

    Lightning: `_fs` of `TensorBoardLogger` is the file system that it writes to. Its `save` writes hyperparameters
    once, when the module has given its own.
    Upgrade: `TensorBoardLogger.save` in `loggers/tensorboard.py`.
    """
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(settings))
        if is_really(logger, TensorBoardLogger) and trainer.is_global_zero:
            # The logger writes the file only once, and has already done so.
            logger._fs.makedirs(logger.log_dir, exist_ok=True)
            save_hparams_to_yaml(os.path.join(logger.log_dir, logger.NAME_HPARAMS_FILE), logger.hparams)


def add_hparams(trainer: pl.Trainer, metrics: Mapping[str, float], behind: Callable[[str], bool]) -> None:
    """Add a row to TensorBoard's HParams page: all settings of the logger, and metrics by the tags of their curves.

    TensorBoard reads only a run's first such row, and takes the last values of the curves.

    Lightning: `_convert_params`, `_flatten_dict` and `_sanitize_params` of `TensorBoardLogger` make hyperparameters
    into what TensorBoard takes. Its `log_hyperparams` writes the row at once, without curves that come later.
    Upgrade: `TensorBoardLogger.log_hyperparams` in `loggers/tensorboard.py` of Fabric.

    Args:
        trainer: the Trainer.
        metrics: present values.
        behind: returns whether the setting of this name comes after the others; the first five are shown.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    for logger in _loggers(trainer):
        if not (is_really(logger, TensorBoardLogger) and logger.hparams):
            continue
        settings = logger._sanitize_params(_flatten_dict(_convert_params(logger.hparams)))
        experiment, *session = hparams(settings, dict(metrics))  # type: ignore[no-untyped-call]
        plugin = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for info in content.experiment.hparam_infos:
            info.differs = not behind(info.name)  # the page sorts them by this
        plugin.content = content.SerializeToString()
        for summary in (experiment, *session):
            logger.experiment._get_file_writer().add_summary(summary)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the first logger's folder for this run; None without a logger, or if it keeps no files. For rank 0."""
    if not trainer.loggers:
        return None  # `trainer.log_dir` would be the current directory
    logger: Any = trainer.loggers[0]
    if is_really(logger, TensorBoardLogger) or is_really(logger, CSVLogger):
        return Path(logger.log_dir)
    if not isinstance(logger.save_dir, str | Path):
        return None
    return Path(os.path.join(logger.save_dir, str(logger.name), str(logger.version)))
