"""What a rehearsing module meets in place of Trainer, loggers and metrics: nothing that it says or counts leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

_SPOKEN = "log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"


def silence(module: Any, trainer: Any) -> None:
    """Nothing that the module says or counts leaves it."""
    for name in _SPOKEN:
        if hasattr(module, name):
            setattr(module, name, _ANYTHING)
    module.lr_schedulers = lambda: _SOMETHING
    module.manual_backward = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)
    if hasattr(type(module), "trainer"):
        module._trainer = TrainerView(trainer)
    for part in module.modules():
        if isinstance(part, (Metric, MetricCollection)):
            zero = torch.zeros(())
            value = dict.fromkeys(part.keys(), zero) if isinstance(part, MetricCollection) else zero
            for name in ("forward", "compute"):
                setattr(part, name, lambda *args, value=value, **kwargs: value)
            setattr(part, "update", _ANYTHING)  # noqa: B010


class _Anything:
    """Takes every call, has every attribute, does nothing: a logger's experiment, a scheduler, ``self.log``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self is _ANYTHING else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _SOMETHING

    def __iter__(self) -> Iterator[Any]:
        return iter(())


_ANYTHING, _SOMETHING = _Anything(), _Anything()


_AT_START: dict[str, Any] = {
    "global_step": 0,
    "current_epoch": 0,
    "max_epochs": 1,
    "max_steps": -1,
    "global_rank": 0,
    "local_rank": 0,
    "world_size": 1,
    "num_devices": 1,
    "is_global_zero": True,
    "training": True,
    "validating": False,
    "testing": False,
    "predicting": False,
    "sanity_checking": False,
    "accumulate_grad_batches": 1,
    "num_training_batches": 100,
    "datamodule": None,
    "callbacks": [],
    "callback_metrics": {},
    "precision": "32-true",
}


class TrainerView:
    """The Trainer as a rehearsing module sees it: what it reads is the Trainer's, what it would start does not happen.

    Without a Trainer, the counters of one that has just begun.
    """

    def __init__(self, trainer: Any) -> None:
        vars(self)["_real"] = trainer

    def __getattr__(self, name: str) -> Any:
        if name == "estimated_stepping_batches":
            return 1000  # the Trainer's would load the data; schedules take no memory
        if name == "strategy":
            return _Alone(None if self._real is None else self._real.strategy)
        if name in ("logger", "loggers", "should_stop"):
            return {"logger": _SOMETHING, "loggers": [], "should_stop": False}[name]
        if self._real is not None:
            return getattr(self._real, name)
        try:
            return _AT_START[name]
        except KeyError:
            raise AttributeError(f"the Trainer's {name} is not there without a Trainer") from None

    def __setattr__(self, name: str, value: Any) -> None:
        pass


class _Alone:
    """The Trainer's strategy with collectives that concern nobody else: other ranks are not rehearsing the same."""

    def __init__(self, strategy: Any) -> None:
        self._real = strategy

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    all_gather = broadcast = reduce_boolean_decision = reduce

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            return {"world_size": 1, "global_rank": 0, "local_rank": 0, "is_global_zero": True}.get(name, _SOMETHING)
        return getattr(self._real, name)


class ManualOptimizer:
    """An optimizer as manual optimization sees it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        """Which parameters need gradients stays as it is."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)
