"""The observation and change of clients' local steps by `CriticalPhase`."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.callbacks.critical_phase.judge import PhaseJudge
from lightning_fedscale.callbacks.critical_phase.steps import Seen, StepWatch
from lightning_fedscale.phases import Decision, Observation
from lightning_fedscale.phases.tracker import joined
from lightning_fedscale.types import IntArray, Params, RoundRecord
from lightning_fedscale.utils import collectives


class ClientStepWatch(StepWatch):
    """Observes the gradients of every client's local steps, and decides once a round, equally on every rank."""

    def __init__(self, judge: PhaseJudge) -> None:
        super().__init__(judge)
        self._client = -1
        self._norms: dict[int, list[Tensor]] = {}  # of a client's steps: optimizer, sum of norms, squared norm

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """See `StepWatch.check`."""
        if self._options.detector.needs != "layer_norms" or self._options.detector.accumulate > 1:
            raise ValueError(
                "level='step': with FederatedStrategy, local steps are judged only by detectors of the gradient norm of"
                " single steps: choose 'page_hinkley', 'relative_change' or accordion(accumulate=1), or level='round'."
            )
        if self._options.action == "noise":
            raise ValueError(
                "level='step': with FederatedStrategy, action='noise' changes the aggregated update: choose"
                " level='round'."
            )
        super().check(trainer, module, noise)

    def _check_noise(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do nothing, since the noise is measured from clients' updates."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Do nothing: with clients this is the start of a round, where nothing is measured."""

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Discard the norms of a failed round."""
        self._norms = {}

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """Assign the gradients that follow to this client."""
        self._client = client
        self._norms[client] = []

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """Share the norms of all clients between ranks, and decide."""
        self._judge.begin_round(trainer, self.saved_state())
        if record.empty:
            return
        self._judge.tracker.estimate_from_updates(record)
        rows = {client: row for row, client in enumerate(record.clients.tolist())}
        # The backend of the gradients' device may not communicate tensors of other devices.
        device = trainer.strategy.root_device
        steps = int(record.local_steps.max())
        if not pl_module.automatic_optimization:  # the module may make any number of steps per batch
            most = torch.tensor(float(max(map(len, self._norms.values()), default=0)), device=device)
            steps = -int(collectives.min_over_ranks(-most))
        table = torch.zeros(len(rows), 3 * steps, dtype=torch.float64)
        for client, norms in self._norms.items():
            if norms:
                table[rows[client], : 3 * len(norms)] = torch.stack(norms).cpu().flatten()
        shared = collectives.sum_over_ranks(table.to(device)).cpu().numpy().reshape(len(rows), steps, 3)
        found: defaultdict[int, list[tuple[float, Decision]]] = defaultdict(list)
        for client, row in zip(rows, shared, strict=True):
            # A step without gradients leaves zeros.
            seen = row[(row[:, 1] > 0) & np.isfinite(row[:, 1])]
            for number in np.unique(seen[:, 0]).astype(int).tolist():
                _, totals, squares = seen[seen[:, 0] == number].T
                sequence = self._sequence(number, client)
                decisions = [self._judge.tracker.detect(Observation([total]), sequence) for total in totals]
                found[number].append((float(squares.mean()), decisions[-1]))
        if not found:
            self._gradients.missing(int(record.local_steps.sum()), trainer, self._judge.critical)
            return
        self._gradients.seen()
        for number, clients in found.items():
            norm = math.sqrt(math.fsum(square for square, _ in clients) / len(clients))
            self._seen[number] = Seen(record.round, norm, joined([decision for _, decision in clients]))
        now = [self._seen[number] for number in found]
        self._judge.judge(record.round, math.hypot(*(seen.norm for seen in now)), [seen.decision for seen in now])

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Restore scaled settings at the end of a round."""
        for hold in self._holds:
            hold.scaling.restore()

    def _add(self, trainer: pl.Trainer, number: int, gradients: dict[int, Tensor], norms: Tensor) -> None:
        row = [norms.new_full((), number), norms.sum(), norms.square().sum()]
        self._norms[self._client].append(torch.stack(row))
