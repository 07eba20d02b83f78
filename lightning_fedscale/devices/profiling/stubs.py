"""Stubs for Trainer, loggers and metrics in a dry run, so that it has no effects outside of the module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_fedscale.devices.profiling.memory_tracker import OverBudget

_IGNORED = "log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"


def silence(module: Any, trainer: Any) -> None:
    """Replace the module's logging and metrics by stubs without effects outside of it.

    Args:
        module: a copy that is not used elsewhere.
        trainer: its ``self.trainer``: a `TrainerView`, or a Trainer to make one of.
    """
    view = trainer if isinstance(trainer, TrainerView) else TrainerView(trainer)
    for part in module.modules():
        if part is module or hasattr(type(part), "trainer"):
            _silence(part, view)
        if isinstance(part, (Metric, MetricCollection)):
            _make_local(part)


def _silence(module: Any, view: TrainerView) -> None:
    for name in _IGNORED:
        if hasattr(module, name):
            setattr(module, name, _ignore)
    module.lr_schedulers = _NullObject
    module.manual_backward = partial(_backward, module)
    if getattr(getattr(type(module), "trainer", None), "fset", None) is not None:  # as a LightningModule has it
        module.trainer = view


def _backward(module: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    if hasattr(type(module), "backward"):
        module.backward(loss, *args, **kwargs)
    else:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]


def _make_local(metric: Any) -> None:
    """Let a metric compute, since it may be the loss, but without other ranks, and return 0 if it is data-dependent."""
    metric.distributed_available_fn = lambda: False
    zero = torch.zeros(())
    instead = dict.fromkeys(metric.keys(), zero) if isinstance(metric, MetricCollection) else zero
    for name, default in (("forward", instead), ("compute", instead), ("update", None)):
        setattr(metric, name, _attempt(getattr(metric, name), default))


def _attempt(own: Callable[..., Any], instead: Any) -> Callable[..., Any]:
    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except Exception as error:
            if isinstance(error, (OverBudget, MemoryError, torch.OutOfMemoryError)):
                raise
            return instead

    return attempt


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Accept any call and do nothing, in place of ``self.log`` or a method of the Trainer."""


class _NullObject:
    """Accepts every call and has every attribute, without effect: a logger's experiment, a scheduler."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _NullProfiler(_NullObject):
    def profile(self, action: str) -> AbstractContextManager[None]:
        return nullcontext()


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
    """The Trainer for a module in a dry run: attributes are the Trainer's, and method calls do nothing.

    Without a Trainer it has the counters of one at the start of training.
    """

    def __init__(self, trainer: Any) -> None:
        vars(self)["_real"] = trainer

    def replace(self, **attributes: Any) -> None:
        """Use these attributes in place of the Trainer's own."""
        vars(self).update(attributes)

    def outside(self) -> dict[int, Any]:
        """Return the replacements, by address, of objects that a module may reference and that are not copied."""
        real = self._real
        if real is None:
            return {}
        shared = [real.datamodule, *real.callbacks]
        return {
            **{id(each): each for each in shared if each is not None},
            **{id(logger): _NullObject() for logger in real.loggers},
            id(real.strategy): self.strategy,
            id(real): self,
        }

    def __getattr__(self, name: str) -> Any:
        if name == "estimated_stepping_batches":
            return 1000  # the Trainer's value would load the data; schedules take no memory
        if name == "strategy":
            return _LocalStrategy(None if self._real is None else self._real.strategy)
        if name in ("logger", "loggers", "should_stop", "profiler"):
            return {"logger": _NullObject(), "loggers": [], "should_stop": False, "profiler": _NullProfiler()}[name]
        if self._real is not None:
            found = getattr(self._real, name)
            return _ignore if inspect.ismethod(found) and found.__self__ is self._real else found
        try:
            return _AT_START[name]
        except KeyError:
            raise AttributeError(f"trainer.{name}: a dry run without a Trainer has no such attribute.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        pass


class _LocalStrategy:
    """The Trainer's strategy with local collectives, since other ranks do not do the same dry run."""

    def __init__(self, strategy: Any) -> None:
        self._real = strategy

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    all_gather = broadcast = reduce_boolean_decision = reduce

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            return {"world_size": 1, "global_rank": 0, "local_rank": 0, "is_global_zero": True}.get(name, _NullObject())
        return getattr(self._real, name)


class ManualOptimizer:
    """An optimizer for manual optimization."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        """Leave the parameters' ``requires_grad`` unchanged."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class ManualScheduler:
    """A learning rate scheduler for manual optimization that can be read but does not step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: learning rates take no memory, and metrics for some schedulers are fake tensors here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)
