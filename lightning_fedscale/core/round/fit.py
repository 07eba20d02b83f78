"""The parts of one fit."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_fedscale.core.executors import ClientLog, ExecutorChoice, SharedTensors, Transfer
from lightning_fedscale.core.executors.meter import CostMeter
from lightning_fedscale.core.lightning.slurm import Requeue
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round.client_batches import ClientBatches
from lightning_fedscale.core.round.client_data import ClientData
from lightning_fedscale.core.round.client_scope import ClientScope
from lightning_fedscale.core.round.client_states import ClientStates
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.round.module_tensors import ModuleTensors
from lightning_fedscale.core.round.notifier import Notifier
from lightning_fedscale.core.round.run_totals import RunTotals
from lightning_fedscale.core.round.server_step import GlobalModel
from lightning_fedscale.core.round.stale_models import StaleModels
from lightning_fedscale.types import Cohort


class Fit:
    """The parts that live from ``trainer.fit`` to the last round; rounds and checkpoints are made of them.

    A part may use the parts above it in `Fit.__init__`, and does not know who uses it.

    Args:
        trainer: the Trainer, its strategy's optimizers not yet built.
        options: the strategy's checked arguments.
        rank: this process.
        world_size: number of processes.

    Attributes:
        options: as given; its privacy is calibrated for these clients once the data is known.
        device: where clients train.
        clients: what clients keep between rounds.
        tensors: which tensors of the module are exchanged.
        server: the server's optimizer and state.
        stale: global models of earlier rounds, in asynchronous training.
        totals: what adds up over rounds.
        log: what clients log.
        notifier: tells callbacks and loggers.
        scope: says whether the module holds a client's model.
        transfer: brings batches to the device.
        requeue: answers SLURM at the end of a round.
        executor: trains clients; set once the optimizers are built.
        data: the training data divided among clients; None before it is known.
        batches: makes the batches of these data; set together with them.
        meter: counts what clients' training costs; None if no callback needs it.
    """

    executor: ExecutorChoice
    batches: ClientBatches

    def __init__(self, trainer: pl.Trainer, options: Options, rank: int, world_size: int) -> None:
        self.trainer = trainer
        self.options = options
        self.rank = rank
        self.world_size = world_size
        self.device = trainer.strategy.root_device
        processes = world_size // trainer.num_nodes
        self.clients = ClientStates(options, rank, world_size, device=self.device, processes=processes)
        self.tensors = ModuleTensors(trainer, options)
        self.server = GlobalModel(options.algorithm, options.server_optimizer, options.downlink_compressor)
        self.stale = StaleModels(options.asynchrony)
        self.totals = RunTotals(options.sampler)
        self.log = ClientLog(trainer, options.client_log_every_n, world_size)
        self.notifier = Notifier(trainer, self.log)
        self.scope = ClientScope(trainer)
        self.transfer = Transfer(trainer)
        self.requeue = Requeue(trainer)
        self.data: ClientData | None = None
        self.meter: CostMeter | None = None

    def cohort(self, plan: RoundPlan, shared: SharedTensors) -> Cohort:
        """Return the cohort of a round, as aggregators and compressors receive it."""
        assert self.data is not None
        clients = self.data.partition.num_clients
        return Cohort(plan.round, plan.cohort, clients, shared.view.trainable, self.options.seed)

    def table(self, plan: RoundPlan, shared: SharedTensors) -> RoundTable:
        """Return an empty table of a round, which has the same length on every rank."""
        return RoundTable(plan, self.world_size, len(shared.parameters), self.log.joint.size)
