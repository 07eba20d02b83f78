"""What the Trainer and its loops know and have no public name for.

A paragraph `Lightning:` says what Lightning keeps under which private name, and why there is no other way to it; a
paragraph `Upgrade:` says where to look when Lightning changes. The page for maintainers is made of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def replaced(owner: Any, name: str, value: object) -> Callable[[], None]:
    """Set an attribute for a while; the function that is returned undoes it.

    Example:
        >>> from types import SimpleNamespace
        >>> owner = SimpleNamespace(kept=1)
        >>> undo = [replaced(owner, "kept", 2), replaced(owner, "new", 3)]
        >>> owner
        namespace(kept=2, new=3)
        >>> for each in undo:
        ...     each()
        >>> owner
        namespace(kept=1)
    """
    undo = partial(setattr, owner, name, getattr(owner, name)) if name in vars(owner) else partial(delattr, owner, name)
    setattr(owner, name, value)
    return undo


def steps_logged(trainer: pl.Trainer) -> int:
    """Return the step under which loggers get the present values.

    Lightning: `_batches_that_stepped` of the epoch loop, which `self.log` gives to loggers. `trainer.global_step` is
    another number with several optimizers or manual optimization, so curves would not lie above each other.
    Upgrade: `_LoggerConnector.log_metrics` in `trainer/connectors/logger_connector/logger_connector.py`.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logs_now(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer logs in this step, by its ``log_every_n_steps``.

    Lightning: `_logger_connector` decides it from the running loop's own counter. The same from `global_step` would be
    off by one before and after the step, and wrong with several optimizers.
    Upgrade: `_LoggerConnector.should_update_logs` in `trainer/connectors/logger_connector/logger_connector.py`.
    """
    return trainer._logger_connector.should_update_logs


class MetricStores(NamedTuple):
    """The Trainer's own dicts of metrics.

    Attributes:
        watched: what callbacks and schedulers monitor.
        logged: what loggers were given last.
    """

    watched: dict[str, Tensor]
    logged: dict[str, Tensor]


def metric_stores(trainer: pl.Trainer) -> MetricStores:
    """Return the dicts behind ``trainer.callback_metrics`` and ``trainer.logged_metrics``, to read and to write.

    Lightning: `_callback_metrics` and `_logged_metrics` of its `_logger_connector`. The public properties compute all
    metrics again when they are read, on all ranks, and what is written into them is not sure to stay.
    Upgrade: `_LoggerConnector.callback_metrics` in `trainer/connectors/logger_connector/logger_connector.py`.
    """
    connector = trainer._logger_connector
    return MetricStores(connector._callback_metrics, connector._logged_metrics)


def learns_nothing(trainer: pl.Trainer) -> bool:
    """Return whether this epoch has forward passes only, as the last one of `StochasticWeightAveraging`.

    Lightning: `_skip_backward` of the fit loop, set by that callback, which says it nowhere else.
    Upgrade: `StochasticWeightAveraging.on_train_epoch_start` in `callbacks/stochastic_weight_avg.py`.
    """
    return trainer.fit_loop._skip_backward


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the batch that was trained last has only added to gradients, without an optimizer step.

    Lightning: `_should_accumulate` of the epoch loop, which also knows the last batch of an epoch and strategies that
    accumulate by themselves; `accumulate_grad_batches` alone does not say it.
    Upgrade: `_TrainingEpochLoop._should_accumulate` in `loops/training_epoch_loop.py`.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validate_together(trainer: pl.Trainer, decide: Callable[[bool], bool]) -> Callable[[], None]:
    """Where validation goes by the clock, have ranks agree on when; returns what undoes it.

    Without it one rank would validate and wait for the others, which train and wait for it.

    Lightning: `_val_check_time_interval` is the interval in seconds, and `_should_check_val_fx` of the epoch loop looks
    at the clock of its rank. No hook is asked whether it is time.
    Upgrade: `_TrainingEpochLoop._should_check_val_fx` in `loops/training_epoch_loop.py`.

    Args:
        trainer: the Trainer, about to fit.
        decide: makes one decision of that of all ranks.
    """
    if getattr(trainer, "_val_check_time_interval", None) is None:
        return _nothing
    epoch_loop = trainer.fit_loop.epoch_loop
    is_time = epoch_loop._should_check_val_fx
    return replaced(epoch_loop, "_should_check_val_fx", lambda fetcher: decide(is_time(fetcher)))


def modes_before_validation(trainer: pl.Trainer) -> dict[str, bool]:
    """Which parts of the module were in training mode when the running validation began; empty if none is running.

    Lightning: `_module_mode` of the validation loop, which puts all parts into evaluation mode and back.
    Upgrade: `_EvaluationLoop._on_evaluation_model_eval` in `loops/evaluation_loop.py`.
    """
    return trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.evaluating else {}


def without_placeholder_metric(logger: Any) -> Callable[[], None]:
    """Have TensorBoard's HParams page show real metrics only; returns what undoes it.

    Lightning: `_default_hp_metric` of `TensorBoardLogger`, an argument of its constructor that cannot be changed later.
    Upgrade: `TensorBoardLogger.log_hyperparams` in `loggers/tensorboard.py`.
    """
    return replaced(logger, "_default_hp_metric", False)


def forget_updates(averaging: WeightAveraging) -> None:
    """Have a callback that averages models count steps and epochs as at first, for another Trainer.

    Lightning: `_latest_update_step` and `_latest_update_epoch` of the callback. Its `load_state_dict` sets the first of
    them only.
    Upgrade: `WeightAveraging.__init__` in `callbacks/weight_averaging.py`.
    """
    averaging._latest_update_step, averaging._latest_update_epoch = 0, -1


def place_average(averaging: WeightAveraging, device: torch.device | str | int) -> None:
    """Have a callback that averages models keep the average on a device.

    Lightning: `_device` of the callback, which takes the module's device at `setup` where it is None: that is the CPU
    then, also in training on a GPU.
    Upgrade: `WeightAveraging.setup` in `callbacks/weight_averaging.py`.
    """
    averaging._device = device  # type: ignore[assignment]


def _nothing() -> None:
    pass
