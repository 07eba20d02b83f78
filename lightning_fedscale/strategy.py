"""`FederatedStrategy`: one Trainer step is one federated round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedscale import samplers
from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.lightning.data_loaders import without_distributed_sampler
from lightning_fedscale.core.lightning.hooks import LocalBatchHooks
from lightning_fedscale.core.lightning.ranks import RankStrategy
from lightning_fedscale.core.lightning.round_loops import NoAccumulation, RoundLoops, close_finished_epoch
from lightning_fedscale.core.lightning.trainer_state import learns_nothing, validate_together
from lightning_fedscale.core.options import compatibility, trainer_checks
from lightning_fedscale.core.options.argument_checks import check_processes
from lightning_fedscale.core.options.options import checked
from lightning_fedscale.core.round.federation import Federation
from lightning_fedscale.core.round.trainer_of_rounds import prepared_for_rounds, share_of_batches
from lightning_fedscale.core.round.view import FederationView
from lightning_fedscale.devices import Population
from lightning_fedscale.local_rules import Ditto, LocalRule
from lightning_fedscale.partitioners import Partition, Partitioner
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.samplers import Sampler
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.buffers import Policy

if TYPE_CHECKING:
    pass

_THIRTY_MINUTES = timedelta(minutes=30)


class FederatedStrategy(FederationView, RankStrategy):
    """Trains an unchanged LightningModule and its data by federated learning, simulated on one or many devices.

    The module lives on the clients; the Trainer, its callbacks and its loggers live on the server. **One Trainer step
    is one round**: a cohort of clients is drawn, each starts from the global model and trains on its own data, and the
    server moves the global model by the aggregate of their updates. So ``max_steps``, ``every_n_train_steps``,
    ``val_check_interval``, learning-rate schedules, checkpoints and early stopping count rounds and see the global
    model, and an epoch is ``rounds_per_epoch`` rounds.

    Module hooks (``on_train_batch_start``, ``configure_gradient_clipping``, transfer hooks, ...) run per local batch
    as always. Callback hooks run per round, except those inside the optimizer closure (``on_before_backward``,
    ``on_before_optimizer_step``, ...), which run on the client. A callback may also define ``on_round_start``,
    ``on_client_start``, ``on_client_end``, ``on_before_server_step``, ``on_server_step`` and ``on_round_end``; see
    `lightning_fedscale.callbacks.RoundEvents`.

    A strategy object can be reused for further Trainers, pickled and copied; every ``fit`` starts afresh. `register`
    gives a strategy with its arguments a name, so that several Trainers can be built from one dict.

    ``last_round`` holds the `RoundRecord` of the finished round; its scalars are logged every round as ``round/...``.

    Args:
        num_clients: number of clients. None takes the number of the partitioner or file, and 10 for a partitioner
            given by name; partitioners by natural id count the clients themselves.
        clients_per_round: clients that take part in a round: None for all, an int, or a fraction in (0, 1].
        partitioner: how the training data is divided: a name ("iid", "dirichlet", ...), the file of a saved partition
            ("hospitals.json"), an object from `lightning_fedscale.partitioners`, or a finished `Partition`.
        local_epochs: passes over its own data that a client makes in a round; "auto" is 1 unless ``local_steps`` is
            given.
        local_steps: number of local batches in a round, instead of ``local_epochs``; a client resumes its data where
            it stopped in its previous round. A function of the round index sets the number for every round, for a
            schedule (`lightning_fedscale.schedules`) or to follow a `CriticalPhase`; it must return the same number on
            every rank and after a restart.
        rounds_per_epoch: rounds in a Trainer epoch.
        sampler: selects the cohort of a round, see `lightning_fedscale.samplers`.
        local_rule: changes a client's local training: a name ("scaffold", ...) or an object from
            `lightning_fedscale.local_rules`; None is FedAvg.
        aggregator: "mean" (weighted by samples), "uniform", or an object from `lightning_fedscale.aggregators`.
        server_optimizer: how the global model moves, see `lightning_fedscale.server`; None is plain FedAvg.
        compressor: compresses clients' updates on the uplink, see `lightning_fedscale.compressors`; also by name.
        downlink_compressor: compresses the server's step on the downlink; clients and the global model then apply the
            decoded step.
        privacy: clips updates, adds noise to their sum and counts the privacy budget; see
            `lightning_fedscale.privacy`.
        personal: names of parameters and buffers that stay with each client, as patterns ("head.*"): FedPer, FedBN. In
            the global model they keep the values with which the module was built. `local_rules.Ditto` additionally
            gives each client a whole model. None or () means none.
        buffers: how buffers are aggregated at the end of a round, by patterns of names; the first pattern that matches
            decides: "mean" over clients, "server" (as it is), "largest" (of the client with the most samples), "client"
            (stays with each, like ``personal``). Otherwise floats are averaged (with a warning unless they are running
            statistics); integers and booleans, except ``num_batches_tracked``, are those of the largest client; vectors
            of spectral norm and other parametrizations are computed from the new weights.
        mode: "sync" waits for all clients of a round; "async" buffers updates as they arrive in simulated time, see
            `lightning_fedscale.server.asynchrony.FedBuff`, which may also be given. "async" needs a ``population`` or
            ``FedBuff(seconds=...)`` to know how long clients take.
        client_optimizer: "reset" gives every client a fresh optimizer each round; "keep" keeps each client's optimizer
            state between rounds (DiLoCo, local SGD).
        executor: how the clients of a rank train: "sequential", one at a time; "vectorized", many at once in one
            `torch.func.vmap`; "auto" predicts in the first round which one is faster, the same in every run, and keeps
            it.
        clients_per_wave: most clients that train at once if vectorized; None takes as many as fit into memory.
        verify_executor: compare one client of a vectorized round with its sequential training, in rounds 1, 2, 4, 8 and
            so on, and after the module has changed. If they differ by more than rounding, this round is repeated
            sequentially and all later rounds are sequential. False relies on the comparison before the first vectorized
            round alone.
        cache_dataset: keep the training data on the device and slice batches out of it without a DataLoader: "auto"
            does so for a plain `TensorDataset` with the default collate function if it fits, True for any dataset whose
            samples are tensors that do not change, False never.
        client_log_every_n: also log every n-th local batch's ``on_step`` values, as ``client/...`` over local batches;
            None logs only the last values of each round, as Lightning does.
        client_state_memory: most memory for the state that clients keep between rounds, as bytes or "4GiB"; the excess
            goes to memory-mapped temporary files, least recently used first. "auto" is a quarter of the host's
            free memory, and an eighth of the device's.
        population: simulated hardware of the clients: each trains with the batch that its device holds, takes the time
            that its device would, and may miss a deadline; see `lightning_fedscale.devices.Population`. It adds
            ``round/simulated_seconds``, ``round/simulated_total`` and ``round/dropped``.
        seed: determines everything random about the federation: cohorts, batch order, clients' random numbers.
        accelerator: as for DDP; set by the Trainer.
        parallel_devices: as for DDP; set by the Trainer.
        cluster_environment: as for DDP; detected by the Trainer.
        checkpoint_io: writes checkpoints; None is an atomic writer.
        precision_plugin: as for DDP; set by the Trainer.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: how long ranks wait for each other; the times of two ranks for a round must not differ by more.
        start_method: how Lightning starts the other processes: "popen", "fork", "spawn" or "forkserver".

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for a wrong value; names the argument, the value and the remedy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(strategy=FederatedStrategy(num_clients=4, clients_per_round=2), max_epochs=3,
        ...                   accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step, len(trainer.strategy.last_round.clients)
        (3, 2)
    """

    def __init__(
        self,
        num_clients: int | None = None,
        clients_per_round: int | float | None = None,
        partitioner: str | Partitioner | Partition = "iid",
        local_epochs: int | Literal["auto"] | None = "auto",
        local_steps: int | Callable[[int], int] | None = None,
        rounds_per_epoch: int = 1,
        sampler: Sampler | str = samplers.uniform,  # in this order: configuration files name functions by their path
        local_rule: str | LocalRule | None = None,
        aggregator: str | Aggregator = "mean",
        server_optimizer: str | ServerOptimizer | None = None,
        compressor: str | Compressor | None = None,
        downlink_compressor: str | Compressor | None = None,
        privacy: Privacy | None = None,
        personal: Sequence[str] | Ditto | None = (),
        buffers: Mapping[str, Policy] | None = None,
        mode: Literal["sync", "async"] | FedBuff = "sync",
        client_optimizer: Literal["reset", "keep"] = "reset",
        executor: Literal["auto", "sequential", "vectorized"] = "auto",
        clients_per_wave: int | None = None,
        verify_executor: bool = True,
        cache_dataset: bool | Literal["auto"] = "auto",
        client_log_every_n: int | None = None,
        client_state_memory: int | str = "auto",
        population: Population | None = None,
        seed: int = 0,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = _THIRTY_MINUTES,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        given = locals()
        check_processes(start_method, timeout, process_group_backend)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._options = checked(given)
        compatibility.check_arguments(self._options)
        self._federation: Federation | None = None
        self._share: float | int = 1.0
        self._undo: ExitStack | None = None

    def __repr__(self) -> str:
        # The Trainer of the other Lightning package shows this when it refuses the object.
        return f"<{trainer_checks.of_package(type(self).__name__)}>"

    # ---- from fit to the first round

    def setup(self, trainer: pl.Trainer) -> None:
        """Make each Trainer step a round, then set up model and optimizers as for a single device."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._close_fit()
            trainer_checks.check_fit(
                trainer,
                device=self.root_device,
                processes=self._processes,
                layer_sync=self.syncs_batch_norm,
                rounds_per_epoch=self._options.rounds_per_epoch,
            )
            self._open_fit(trainer)
        elif self._undo is None:
            self._undo = ExitStack()
        assert self._undo is not None
        self._undo.callback(without_distributed_sampler(trainer, elsewhere=self._processes > 1))
        # Not DDPStrategy's: it wraps the model.
        super(DDPStrategy, self).setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the optimizers and record the state in which every new client starts with them."""
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        assert self._federation is not None
        trainer_checks.check_optimizers(self.lightning_module, self.optimizers)
        compatibility.check_optimizers(self._options, self.lightning_module, self.optimizers)
        self._federation.attach_optimizers(self.optimizers)

    def process_dataloader(self, dataloader: object) -> object:
        """Replace the train loader by one whose items are rounds; leave other loaders unchanged."""
        if self._federation is None or not self._trainer_of_fit.training:
            return dataloader
        return self._federation.attach_data(dataloader, self._share)

    def on_train_start(self) -> None:
        """Refuse invalid loaders and schedulers, which exist only from here on.

        Raises:
            ValueError: with the reason and the remedy.
        """
        trainer_checks.check_loaders_and_schedulers(self._trainer_of_fit)
        assert self._federation is not None
        self._federation.equip()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move gradient accumulation into the clients; rounds are never accumulated."""
        trainer, federation = self._trainer_of_fit, self._federation
        assert federation is not None
        every = trainer.accumulate_grad_batches
        if not isinstance(every, NoAccumulation) and not learns_nothing(trainer):
            # A callback such as GradientAccumulationScheduler has set it.
            federation.fit.scope.accumulation, trainer.accumulate_grad_batches = every, NoAccumulation(1)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to the device; the first batch of a round starts the clients' training."""
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return batch if self._federation is None else self._federation.first_batch_arrived(batch)

    @property
    def _trainer_of_fit(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _open_fit(self, trainer: pl.Trainer) -> None:
        """Prepare the Trainer for rounds, and record how to undo the changes."""
        federation = Federation(trainer, self._options, self.global_rank, self._processes)
        self._federation, self._undo, self._share = federation, ExitStack(), share_of_batches(trainer)
        self._undo.callback(federation.end)
        self._undo.callback(RoundLoops(trainer, federation.run_round).remove)
        self._undo.callback(LocalBatchHooks(trainer.lightning_module, lambda: federation.fit.scope.in_client).remove)
        if self._processes > 1:
            self._undo.callback(validate_together(trainer, self.broadcast))
        self._undo.enter_context(prepared_for_rounds(trainer, federation, self._share))

    def _close_fit(self) -> None:
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def teardown(self) -> None:
        """Restore the Trainer; ``last_round`` and the state that checkpoints need stay readable."""
        if not self._refused:
            self._close_fit()
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_federation": None, "_undo": None}

    @property
    def _in_client(self) -> bool:
        return self._federation is not None and self._federation.fit.scope.in_client

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the global model's state, even while a client trains."""
        state = super().lightning_module_state_dict()
        return state if self._federation is None else self._federation.fit.scope.global_state_dict(state)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the global model in the Trainer's precision; Lightning would convert the module only later."""
        if isinstance(self.precision_plugin, DoublePrecision):
            assert self.lightning_module is not None
            self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save with ``checkpoint["federated"]``; call it on all ranks."""
        # Without optimizers, the federation belongs to an earlier Trainer.
        if self._federation is not None and self.optimizers and "optimizer_states" in checkpoint:
            self._federation.checkpoint.write_into(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers and the state of the federation."""
        assert self._federation is not None
        state = checkpoint.get("federated")
        if state is not None:
            self._federation.checkpoint.load_groups(state)
        super().load_optimizer_state_dict(checkpoint)
        close_finished_epoch(self._trainer_of_fit)
        if state is not None:
            self._federation.checkpoint.load_state_dict(state)
        else:
            rank_zero_warn(
                "ckpt_path: the checkpoint was not written by FederatedStrategy, so the model and the Trainer's"
                " counters are restored, and the server and all clients start without state."
            )

    @classmethod
    def register(cls, name: str, *, override: bool = False, **arguments: Any) -> None:
        """Register a name for these arguments, so that ``Trainer(strategy=name)``, in any library, builds the strategy.

        The name is known to Trainers of the package that this class is for: ``lightning.pytorch``, or
        ``pytorch_lightning`` for ``lightning_fedscale.pytorch_lightning.FederatedStrategy``.

        Args:
            name: the name to pass as ``Trainer(strategy=...)``; case does not matter, as for all strategies.
            override: replace a strategy that already has this name; registering the same arguments again is allowed.
            **arguments: arguments of the strategy; they are checked immediately.

        Raises:
            TypeError: for an unknown argument, or one of the wrong kind.
            ValueError: for a wrong value, or a name that is taken.

        Example:
            >>> from lightning.pytorch import Trainer
            >>> FederatedStrategy.register("phones", num_clients=5, clients_per_round=3)
            >>> Trainer(strategy="phones", accelerator="cpu", logger=False).strategy.num_clients
            5
        """
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"name={name!r}: pass a name for Trainer(strategy=...), such as 'fed5'.")
        checks.known_arguments(f"register({name!r})", cls, arguments)
        cls(**arguments)  # raises the same errors as in the Trainer
        name, written = name.lower(), repr(arguments)  # lower case, as in the Trainer
        if name == "auto":
            raise ValueError("name='auto' already names a strategy: choose another name.")
        if name in StrategyRegistry and not override:
            known = StrategyRegistry[name]
            if (known["strategy"], known["description"]) != (cls, written):  # a notebook cell may run again
                raise ValueError(f"name={name!r} already names a strategy: choose another name, or pass override=True.")
        StrategyRegistry.register(name, cls, description=written, override=True, **arguments)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make ``Trainer(strategy="federated")`` known."""
        strategy_registry.register("federated", cls, description="One Trainer step is one federated round")
