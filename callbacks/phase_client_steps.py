"""How `CriticalPhase` sees and changes the local steps of clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_fedscale import collectives
from lightning_fedscale.callbacks.phase_gradients import NOT_SEEN
from lightning_fedscale.callbacks.phase_steps import StepWatch
from lightning_fedscale.phase_keeper import PhaseKeeper
from lightning_fedscale.phases import Observation
from lightning_fedscale.types import IntArray, Params, RoundRecord

if TYPE_CHECKING:
    from lightning_fedscale.callbacks.critical_phase import CriticalPhase


class ClientStepWatch(StepWatch):
    """Looks at the gradients of every client's local steps; decides once a round, the same on every rank."""

    def __init__(self, owner: CriticalPhase, keeper: PhaseKeeper) -> None:
        super().__init__(owner, keeper)
        self._client = -1
        self._norms: dict[int, list[Tensor]] = {}

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """See `StepWatch.check`."""
        if self._owner.detector.needs != "layer_norms" or self._owner.detector.accumulate > 1:
            raise ValueError(
                "level='step': with FederatedStrategy, only detectors of the gradient norm of single steps look at"
                " local steps; choose level='round'."
            )
        if self._owner.action == "noise":
            raise ValueError(
                "action='noise': with FederatedStrategy it is the aggregated update that is given noise; choose"
                " level='round'."
            )
        super().check(trainer, module, noise)

    def _check_noise(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Clients' updates show their noise by themselves."""

    def on_train_batch_start(self, *_: Any) -> None:
        """With clients, this is the start of a round; nothing is to be measured there."""

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Forget a round that failed."""
        self._norms = {}

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """The gradients that follow are this client's."""
        self._client = client
        self._norms[client] = []

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """All clients have trained: share what was seen, and decide."""
        self._owner.begin_round(trainer)
        if record.empty:
            return
        self._keeper.look_at_clients(record)
        rows = {client: row for row, client in enumerate(record.clients.tolist())}
        table = torch.zeros(len(rows), 2 * int(record.local_steps.max()), dtype=torch.float64)
        for client, norms in self._norms.items():
            if norms:
                totals = torch.stack(norms).cpu()
                table[rows[client], : 2 * len(totals)] = totals.flatten()
        # Gradients may be on a device whose communication knows no other tensors.
        device = trainer.strategy.root_device
        table = collectives.sum_over_ranks(table.to(device)).cpu().reshape(len(rows), -1, 2)
        decisions, squares = [], []
        for client, steps in zip(rows, table.numpy(), strict=True):
            # Total of the layers' norms, and squared norm; a step without gradients leaves zeros.
            seen = steps[(steps[:, 0] > 0) & np.isfinite(steps[:, 0])]
            if len(seen):
                squares.append(float(seen[:, 1].mean()))
                decisions.append([self._keeper.detect(Observation([total]), client) for total in seen[:, 0]][-1])
        if not decisions:
            raise RuntimeError(NOT_SEEN.format(int(record.local_steps.sum())))
        self._owner.judge(record.round, math.sqrt(math.fsum(squares) / len(squares)), decisions)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """A round is over."""
        assert self._scaling is not None
        self._scaling.restore()

    def _seen(self, trainer: pl.Trainer, gradients: list[Tensor], norms: Tensor) -> None:
        self._norms[self._client].append(torch.stack([norms.sum(), norms.square().sum()]))
