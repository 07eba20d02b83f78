"""A copy of the module that validates each client in isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_fedscale.core.lightning.module_state import (
    attach,
    attached_trainer,
    forget_metric_names,
    log_apart,
    set_hook,
)
from lightning_fedscale.devices.profiling.copies import copied
from lightning_fedscale.devices.profiling.stubs import TrainerView
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"ValidationTwin": "ValidationCopy"})

_HOOKS = (
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end",
)  # fmt: skip


class Found(NamedTuple):
    """The value that a client's validation logged under a name.

    Attributes:
        value: the mean over its batches, as in Lightning, or the value that a torchmetrics object computes of them.
        higher_is_better: as declared by a torchmetrics object; None if unknown.
    """

    value: float
    higher_is_better: bool | None


class ValidationCopy:
    """Runs ``validation_step`` and the module's hooks around it as Lightning does, once for each client.

    Logged values are reduced by Lightning's own results, separately for each client. They reach no logger, no progress
    bar and no other rank, and the module, its metrics and the Trainer stay unchanged.

    Args:
        trainer: the Trainer; for the copy it is validating, and the copy cannot change it.
        module: the module to copy, with its current weights.

    Raises:
        TypeError: if the module cannot be copied.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._copy = copied(module, TrainerView(attached_trainer(module)))
        self._copy.eval()
        self._precision = trainer.precision_plugin
        self._view = _Validating(trainer)
        attach(self._copy, self._view)
        forget_metric_names(self._copy)
        self._copy.print = _nothing
        # Collections last: their reset rebuilds the groups of metrics that share a state.
        kinds = (Metric, MetricCollection)
        self._metrics: list[Any] = [part for kind in kinds for part in self._copy.modules() if isinstance(part, kind)]
        for metric in self._metrics:  # other ranks have other clients
            metric.distributed_available_fn = lambda: False
        self._hooks = [name for name in _HOOKS if is_overridden(name, self._copy)]
        self._takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the weights from a state dict of the module."""
        self._copy.load_state_dict(state)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Any], on_batch: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, Found]:
        """Return the values that the module logs for a client's batches, by name.

        Args:
            batches: batches on the device; None is skipped.
            on_batch: returns, for each batch, a context manager to be active while it is evaluated.
        """
        results = self._view.open_results()
        for metric in self._metrics:
            metric.reset()
        self._call("on_validation_start")
        self._call("on_validation_epoch_start")
        for index, batch in enumerate(batches):
            if batch is not None:
                results.batch, results.batch_size = batch, None
                self._call("on_validation_batch_start", batch, index)
                with on_batch(batch):
                    outputs = self._step(batch, index)
                self._call("on_validation_batch_end", outputs, batch, index)
        results.batch = results.batch_size = None
        self._call("on_validation_epoch_end")
        found = _read(results)
        self._call("on_validation_end")
        return found

    def _step(self, batch: Any, index: int) -> Any:
        set_hook(self._copy, "validation_step")
        with self._precision.val_step_context():
            return self._copy.validation_step(*((batch, index) if self._takes_index else (batch,)))

    def _call(self, hook: str, *values: Any) -> None:
        if hook in self._hooks:
            set_hook(self._copy, hook)
            getattr(self._copy, hook)(*values)


class _Validating(TrainerView):
    """The Trainer as seen by the copy: validating, with results of one client."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        # One object for good, since Lightning compares how a name is reduced from one `log` to the next.
        self.replace(strategy=self.strategy, training=False, validating=True)
        self.open_results()

    def open_results(self) -> Any:
        """Empty results, for the next client."""
        return log_apart(self)


def _read(results: Any) -> dict[str, Found]:
    """Return the epoch's values that are single numbers."""
    found: dict[str, Found] = {}
    for result in results.values():
        if result.meta.on_epoch:
            value = result.compute()
            if not isinstance(value, Tensor) or value.numel() == 1:
                known = None if result.is_tensor else result.value.higher_is_better
                found[result.meta.name] = Found(float(value), known)
    return found


def _nothing(*values: Any, **options: Any) -> None:
    """Replace ``print``."""
