"""Reuse of a strategy object by several Trainers: attributes set by one Trainer are reset for the next."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn

from lightning_fedscale.core.lightning.checkpoint import AtomicCheckpointIO

_SET_BY_TRAINER = ("_accelerator", "_checkpoint_io", "_precision_plugin", "_parallel_devices", "cluster_environment")
_OF_A_FIT = ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs")


class ReusableStrategy(DDPStrategy):
    """A `DDPStrategy` that several Trainers can use in turn, and that can be pickled and copied at any time.

    Lightning's own strategies keep the accelerator, devices and plugins of their first Trainer, and the next Trainer
    takes them for the user's. Libraries that build one Trainer for ``fit`` and another for ``predict`` from the same
    arguments therefore fail with them.

    Models are not wrapped in DistributedDataParallel, and checkpoints are written in one step.

    Lightning: a Trainer sets `_accelerator`, `_checkpoint_io`, `_precision_plugin`, `_parallel_devices` and
    `_layer_sync` of the strategy from its `_accelerator_connector`, whose `_lazy_init_strategy` does it again, then
    calls `_configure_launcher`, which makes a `_launcher`. A run leaves `_lightning_module`, `_model`,
    `_optimizers`, `_lightning_optimizers` and `_process_group_backend` behind. `_trainer` of the module says whose
    run it is. `_setup_model` wraps the model, before which `_sync_module_states` makes ranks start alike, and a
    `_WrappingCheckpointIO` holds another writer. None of it can be reset or left out by public means.
    Upgrade: `_AcceleratorConnector` in `trainer/connectors/accelerator_connector.py`, `Strategy.__init__` in
    `strategies/strategy.py`, `DDPStrategy` in `strategies/ddp.py`, `plugins/io/wrapper.py`.

    Args:
        **kwargs: arguments of `DDPStrategy`.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._given: dict[str, Any] = {}
        self._taken: dict[str, Any] = {}
        self._in_use: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._refused = False
        self._backend = kwargs.get("process_group_backend")
        super().__init__(**kwargs)

    # A Trainer under construction first reads `_accelerator`, and nothing else does, since the property `accelerator`
    # does not. This read shows the strategy that another Trainer wants to use it.

    @property
    def _accelerator(self) -> pl.accelerators.Accelerator | None:
        self._let_go()
        return self.accelerator

    @_accelerator.setter
    def _accelerator(self, accelerator: pl.accelerators.Accelerator | None) -> None:
        vars(self)["_accelerator"] = accelerator

    @property
    def accelerator(self) -> pl.accelerators.Accelerator | None:
        """As for DDP; set by the Trainer."""
        found: pl.accelerators.Accelerator | None = vars(self)["_accelerator"]
        return found

    @accelerator.setter
    def accelerator(self, accelerator: pl.accelerators.Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def _processes(self) -> int:
        return self.num_nodes * self.num_processes

    def _let_go(self) -> None:
        """Reset the strategy to the user's arguments, for another Trainer.

        Raises:
            RuntimeError: if a Trainer with this strategy is running.
        """
        if self._in_use is not None:
            self._raise_in_use()
        self._take_out()
        self._lightning_module = self._model = None
        vars(self).update({name: [] for name in _OF_A_FIT})

    def _take_out(self) -> None:
        own = vars(self)
        for name, value in self._taken.items():
            if own[name] is value:  # otherwise the user has replaced it
                own[name] = self._given[name]
        self._given, self._taken = {name: own[name] for name in _SET_BY_TRAINER}, {}
        self._process_group_backend, self._launcher = self._backend, None

    # ---- what Lightning asks of a strategy under private names

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The user's, or an atomic one."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # goes innermost, if nothing is there
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @property
    def syncs_batch_norm(self) -> bool:
        """Whether the Trainer is to synchronise BatchNorm."""
        return self._layer_sync is not None

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        # No DistributedDataParallel: clients must not exchange gradients. Same start on all ranks, that is all.
        if self._processes > 1:
            _sync_module_states(model)
        return model

    # ---- one Trainer after the other

    def _configure_launcher(self) -> None:
        """Record everything that the Trainer set."""
        _ = self.checkpoint_io  # which makes one if there is none
        self._taken = {name: vars(self)[name] for name in _SET_BY_TRAINER}
        # A single process needs no launcher and no sockets, so it also runs in notebooks.
        if self._processes > 1:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Start the run of a Trainer.

        Raises:
            RuntimeError: if another Trainer is running with this object, or has set it up for other processes.
        """
        module = self._lightning_module
        if module is not None and (trainer := module._trainer) is not None:
            if self._in_use is not None and self._in_use[0] is not trainer:
                self._refuse()
            self._belong_to(trainer)
            self._in_use = trainer, module
        super().setup_environment()

    def _belong_to(self, trainer: pl.Trainer) -> None:
        """Set the Trainer's attributes again if another Trainer was built since."""
        connector = trainer._accelerator_connector
        if self.accelerator is connector.accelerator and self.parallel_devices is connector._parallel_devices:
            return
        before = self._processes or 1
        self._take_out()
        connector._lazy_init_strategy()
        if (now := self._processes) != before:
            raise RuntimeError(
                f"strategy: another Trainer, built later, uses this {type(self).__name__} object with {before}"
                f" process(es), and this one has {now}: create one {type(self).__name__} for each Trainer."
            )

    def _refuse(self) -> None:
        """Keep the running Trainer connected, and raise an error for the other one."""
        assert self._in_use is not None
        trainer, module = self._in_use
        self.connect(module)
        module.trainer = trainer
        self._refused = True
        self._raise_in_use()

    def _raise_in_use(self) -> None:
        raise RuntimeError(
            f"strategy: another Trainer is running with this {type(self).__name__} object: wait until it has ended, or"
            f" create one {type(self).__name__} for each Trainer."
        )

    def teardown(self) -> None:
        """End the run of the Trainer, successful or not."""
        if self._refused:  # it is not the one that is running
            self._refused = False
            return
        self._in_use = None
        super().teardown()
        # Lightning ends the outermost writer only; one inside that writes in the background may not be done yet.
        writer: Any = self._checkpoint_io
        while isinstance(writer, _WrappingCheckpointIO) and (writer := writer.checkpoint_io) is not None:
            writer.teardown()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: arguments and attributes that the Trainer set, without the state of a fit."""
        state = {**vars(self), "_in_use": None, **{name: [] for name in _OF_A_FIT}}
        if starts_by_command(self):
            state["_launcher"] = None  # it holds the processes that it started
        return state


def starts_by_command(strategy: Strategy) -> bool:
    """Whether the other processes of a strategy are started by the command that started this one.

    Lightning: a `_SubprocessScriptLauncher` does that; `start_method` says it only for strategies that were given one.
    Upgrade: `DDPStrategy._configure_launcher` in `strategies/ddp.py`.
    """
    return isinstance(strategy.launcher, _SubprocessScriptLauncher)


def has_gradient_buckets(strategy: Strategy) -> bool:
    """Whether DDP keeps a copy of all gradients.

    Lightning: `_ddp_kwargs` of the strategy holds what is passed on to `DistributedDataParallel`.
    Upgrade: `DDPStrategy.__init__` in `strategies/ddp.py`.
    """
    return isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("gradient_as_bucket_view")
