"""What Lightning keeps in the user's module, and how it calls the module's hooks; see `trainer_state`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection


def current_hook(module: pl.LightningModule) -> str | None:
    """Return the hook of the module that is running; None if none is.

    Lightning: `_current_fx_name` of the module, by which `self.log` knows where it was called. Read past the lookup of
    `nn.Module`, since it is asked for every operator.
    Upgrade: `LightningModule.log` in `core/module.py` and `_call_lightning_module_hook` in `trainer/call.py`.
    """
    return vars(module).get("_current_fx_name")


def set_hook(module: pl.LightningModule, name: str | None) -> None:
    """Attribute to this hook the values that the module logs from now on.

    Lightning: `_current_fx_name` of the module, without which `self.log` refuses to log. Written past the setter of
    `nn.Module`, which takes its time.
    Upgrade: as for `current_hook`.
    """
    vars(module)["_current_fx_name"] = name


@contextmanager
def in_hook(module: pl.LightningModule, name: str) -> Iterator[None]:
    """Attribute to this hook the values that the module logs inside the context."""
    around = current_hook(module)
    set_hook(module, name)
    try:
        yield
    finally:
        set_hook(module, around)


def attached_trainer(module: pl.LightningModule) -> Any:
    """Return the module's Trainer, or the object in its place; None without one.

    Lightning: `_trainer` of the module. The property `trainer` raises where there is none, and gives another object
    under Fabric.
    Upgrade: `LightningModule.trainer` in `core/module.py`.
    """
    return module._trainer


def attach(module: pl.LightningModule, trainer: Any) -> None:
    """Set this object as the Trainer of the module, and of none of the modules inside.

    Lightning: `_trainer` of the module. The setter of `trainer` goes through the modules inside too.
    Upgrade: as for `attached_trainer`.
    """
    object.__setattr__(module, "_trainer", trainer)


def forget_metric_names(module: pl.LightningModule) -> None:
    """Have the module look for its torchmetrics objects again, since a copy of it has others.

    Lightning: `_metric_attributes` of the module holds their names by address, from the first `self.log` on.
    Upgrade: `LightningModule.log` in `core/module.py`.
    """
    module._metric_attributes = None


def log_apart(stand_in: object) -> Any:
    """Make modules whose Trainer is this stand-in log into new results, and return these.

    Lightning: `self.log` writes into the Trainer's `_results`, a `_ResultCollection`, and asks its `_logger_connector`
    whether values of an earlier epoch are in there. It has no argument for where to log.
    Upgrade: `LightningModule.log` in `core/module.py` and `_ResultCollection` in
    `trainer/connectors/logger_connector/result.py`.
    """
    results = _ResultCollection(training=False)
    vars(stand_in).update(_results=results, _logger_connector=_Connector())
    return results


class _Connector:
    """What ``self.log`` asks of the Trainer's own: the results are new, so there is nothing to forget."""

    def should_reset_tensors(self, fx: str) -> bool:
        """Return False: no values of an earlier epoch are left."""
        return False


def call_hook(trainer: pl.Trainer, name: str, *values: Any) -> Any:
    """Call a hook of the module as the Trainer's loops do, under the profiler and with its name noted.

    Lightning: `_call_lightning_module_hook`; calling the method itself leaves out both.
    Upgrade: `trainer/call.py`.
    """
    return call._call_lightning_module_hook(trainer, name, *values)


def moved_by_hooks(trainer: pl.Trainer, batch: Any) -> Any:
    """Move a batch to the device by the transfer hooks of the module and the data module.

    Lightning: `_on_before_batch_transfer` calls the hook before, `_call_strategy_hook` those of the move and after it,
    as the loops do for batches of their own. No public function does it.
    Upgrade: `_TrainingEpochLoop.advance` in `loops/training_epoch_loop.py`, and
    `LightningModule._apply_batch_transfer_handler` in `core/module.py`.
    """
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def is_no_optimizer(optimizer: object) -> bool:
    """Return whether ``configure_optimizers`` returned nothing, for which Lightning has a stand-in.

    Lightning: a `_MockOptimizer` among the strategy's optimizers is all that is left of the None.
    Upgrade: `_init_optimizers_and_lr_schedulers` in `core/optimizer.py`.
    """
    return isinstance(optimizer, _MockOptimizer)
