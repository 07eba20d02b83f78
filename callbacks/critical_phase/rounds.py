"""The observation and change of the server's updates by `CriticalPhase`."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.callbacks.critical_phase.gradients import learning_rate
from lightning_fedscale.callbacks.critical_phase.judge import PhaseJudge
from lightning_fedscale.core.lightning.half_batch_gradients import half_batch_gradients, no_halves, squared_norm
from lightning_fedscale.phases import Observation
from lightning_fedscale.phases.noise import (
    Diagonal,
    NoiseEstimate,
    diagonal_init,
    diagonal_noise,
    diagonal_update,
    estimate_from_half_batches,
    reweighting_strength,
)
from lightning_fedscale.server import follows_scale, own_decay
from lightning_fedscale.types import ClientUpdate, FloatArray, IntArray, Params, RoundRecord
from lightning_fedscale.utils import collectives, randomness


class RoundWatch:
    """Observes the aggregated update of every round, and scales it or adds noise.

    Args:
        judge: decides.
    """

    def __init__(self, judge: PhaseJudge) -> None:
        self._judge = judge
        self._options = judge.options
        self._since_estimate = 0.0  # local batches of a client
        self._halves: _HalfBatches | None = None
        self._summed = 0
        self._sums: list[Tensor] = []
        self._diagonal: Diagonal | None = None
        self._signed: _SignedUpdates | None = None
        self._scales_delta = True

    # ---- before training

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """Refuse an invalid combination.

        Raises:
            ValueError: with the reason and the remedy.
        """
        if self._options.detector.needs == "fisher_trace" and self._options.noise_every is None:
            raise ValueError(
                "noise_every=None: detector 'fisher_trace' needs the noise of single samples: pass a number of batches,"
                " such as 200."
            )

    def helpers(self, trainer: pl.Trainer, noise: str) -> list[Any]:
        """Return the listeners to the events of a round; costly ones only if they are needed."""
        strategy: Any = trainer.strategy
        found: list[Any] = [self]
        rule, with_decay = strategy.server_optimizer, self._options.scale_weight_decay
        self._scales_delta = follows_scale(rule) and not with_decay
        if self._options.action == "scale" and not self._scales_delta:
            found.append(_StepScaling(self._judge, 0.0 if with_decay else own_decay(rule)))
        if self._options.action == "noise" and noise == "reweighting":
            self._signed = _SignedUpdates(self._options.seed)
            found.append(self._signed)
        return found

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """Move the state to the module's device, and return how updates are scaled, in words."""
        self._sums = [tensor.to(module.device) for tensor in self._sums]
        self._diagonal = None if self._diagonal is None else self._diagonal.to(module.device)
        if self._scales_delta:
            return "the server's step is proportional to the clients' aggregated update, so the update is multiplied"
        if self._options.scale_weight_decay:
            return "scale_weight_decay=True, so the server's step is multiplied, with its weight decay"
        return "the server's step is not proportional to the clients' aggregated update, so the step is multiplied"

    def detach(self) -> None:
        """Do nothing, since the module was not changed."""

    # ---- in training

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Compute the gradients of both halves of the clients' batches, if this is due."""
        self._halves = None
        if self._options.noise_every is not None and self._since_estimate >= self._options.noise_every:
            self._halves = _HalfBatches(trainer, pl_module, clients)

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """Observe the clients' update, decide and change it; an empty round is not observed."""
        self._judge.begin_round(trainer, self.saved_state())
        if not record.empty:
            self._estimate_noise(record)
            if self._options.detector.accumulate == 1:
                self._observe(trainer, record, list(delta.values()))
            elif self._add_up(delta):
                self._observe(trainer, record, self._sums)
        if self._options.action == "scale" and self._scales_delta:
            torch._foreach_mul_(list(delta.values()), self._judge.scale)
        elif self._options.action == "noise" and not record.empty:
            self._make_noisy(record, delta)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Do nothing at the end of a round."""

    def metrics(self) -> dict[str, float]:
        """Return no further metrics, since the update is that of all optimizers together."""
        return {}

    def saved_state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {
            "since_look": self._since_estimate,
            "summed": self._summed,
            "sums": list(self._sums),
            "diagonal": None if self._diagonal is None else list(self._diagonal),
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._since_estimate, self._summed, self._sums = state["since_look"], state["summed"], state["sums"]
        self._diagonal = None if state["diagonal"] is None else Diagonal(*state["diagonal"])

    # ---- observation

    def _estimate_noise(self, record: RoundRecord) -> None:
        self._judge.tracker.estimate_from_updates(record)
        self._since_estimate += float(record.local_steps.mean())
        if self._halves is not None:
            self._since_estimate = 0.0
            if (estimate := self._halves.estimate()) is not None:
                self._judge.tracker.add_estimate("sampling", estimate)
            self._halves = None

    def _add_up(self, delta: Params) -> bool:
        """Add an update to the sum, and return whether it has as many updates as the detector needs."""
        fresh = self._summed in (0, self._options.detector.accumulate)
        # Not in place: the state from the beginning of the round may still be saved.
        updates = list(delta.values())
        self._sums = [u.clone() for u in updates] if fresh else list(torch._foreach_add(self._sums, updates))
        self._summed = 1 if fresh else self._summed + 1
        return self._summed == self._options.detector.accumulate

    def _observe(self, trainer: pl.Trainer, record: RoundRecord, tensors: list[Tensor]) -> None:
        norms: list[float] = torch.stack(list(torch._foreach_norm(tensors))).tolist()
        accepted = record.weights > 0
        self._judge.observe(
            record.round,
            Observation(
                norms,
                client_square=float(record.weights[accepted] @ record.delta_norms[accepted] ** 2),
                fisher_trace=self._judge.tracker.sampling.fisher_trace,
                learning_rate=learning_rate(*trainer.optimizers),
            ),
        )

    # ---- action

    def _make_noisy(self, record: RoundRecord, delta: Params) -> None:
        assert self._options.target_batch is not None
        batch = float(record.samples[record.weights > 0].sum())
        target = min(self._options.target_batch, batch)
        if self._signed is not None:
            noise = self._signed.noise(record, delta, batch, target)
            if self._judge.adds_noise:
                torch._foreach_add_(list(delta.values()), noise)
            return
        updates = list(delta.values())
        known = diagonal_init(updates) if self._diagonal is None else self._diagonal
        # On a copy: the state from the beginning of the round may still be saved.
        self._diagonal = diagonal_update(known.clone(), updates)
        if self._judge.adds_noise and self._diagonal.seen > 1:
            generator = torch.Generator(device=updates[0].device)
            generator.manual_seed(randomness.derive(self._options.seed, randomness.NOISE, record.round))
            torch._foreach_add_(updates, diagonal_noise(self._diagonal, batch, target, generator))


class _StepScaling:
    """Multiplies the server's step, if its length does not follow that of the update.

    Args:
        judge: decides.
        decay: weight decay as a fraction of the parameters per step, which is not scaled.
    """

    def __init__(self, judge: PhaseJudge, decay: float) -> None:
        self._judge = judge
        self._decay = decay
        self._weights: Params = {}

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Save the global weights, from which the weight decay of the next step is computed."""
        if self._decay:
            self._weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_server_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Params) -> None:
        """Scale the server's step, except its weight decay."""
        factor = self._judge.scale
        for name, value in step.items():
            value.mul_(factor)
            if self._decay:
                value.sub_(self._weights[name], alpha=(factor - 1.0) * self._decay)


class _SignedUpdates:
    """The sum of clients' updates with random signs, which together with their aggregate gives the reweighting noise.

    With weights ``p_k`` and signs ``xi_k``, the change of the mean under the weights ``p_k (1 + s (xi_k - sum p xi))``
    is ``s (sum p_k xi_k delta_k - (sum p xi) mean)``.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sum: Tensor | None = None
        self._total = 0.0
        self._signs = np.empty(0)
        self._sign_of: dict[int, float] = {}

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Draw a sign for every client."""
        self._sum, self._total = None, 0.0
        self._signs = randomness.generator(self._seed, randomness.NOISE, round).choice([-1.0, 1.0], size=len(clients))
        self._sign_of = dict(zip(clients.tolist(), self._signs.tolist(), strict=True))

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """Add a client's update to the sum."""
        if self._sum is None:
            self._sum = torch.zeros_like(update.delta)
        if update.finite:
            strategy: Any = trainer.strategy
            weight = strategy.weight_of(update)
            self._sum.add_(update.delta, alpha=weight * self._sign_of[update.client])
            self._total += weight

    def noise(self, record: RoundRecord, delta: Params, batch: float, target: float) -> list[Tensor]:
        """Return the noise to add to the aggregated update."""
        sizes = [tensor.numel() for tensor in delta.values()]
        like = next(iter(delta.values()))
        mine = like.new_zeros(sum(sizes)) if self._sum is None else self._sum[: sum(sizes)]  # a rank may have no client
        joint = torch.cat([mine, mine.new_tensor([self._total])])
        self._sum = None
        joint = collectives.sum_over_ranks(joint)
        weights = record.weights
        if (weights > 0).sum() < 2:
            return [torch.zeros_like(tensor) for tensor in delta.values()]
        strength, mean_sign = reweighting_strength(weights, batch, target), float(weights @ self._signs)
        parts = torch.split(joint[:-1] / joint[-1], sizes)
        return [
            strength * (part.view_as(mean) - mean_sign * mean) for part, mean in zip(parts, delta.values(), strict=True)
        ]


class _HalfBatches:
    """The gradients of both halves of each client's first batch, at the global model.

    Args:
        trainer: the Trainer, at the start of a round.
        module: the module, with the global weights.
        clients: the cohort.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, clients: IntArray) -> None:
        strategy: Any = trainer.strategy
        rows = {client: row for row, client in enumerate(clients.tolist())}
        self._table = torch.zeros(len(rows), 4, dtype=torch.float64, device=module.device)
        size = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        self._sum = torch.zeros(size, dtype=torch.float64, device=module.device)
        try:
            for client, batch in strategy.first_batches():
                if (halves := half_batch_gradients(trainer, module, batch)) is not None:
                    mean = halves.mean()
                    row = self._table[rows[client]]
                    row[0], row[1] = halves.difference_square(), squared_norm(mean)
                    row[2], row[3] = halves.samples
                    self._sum += torch.cat([gradient.flatten() for gradient in mean])
        except Exception as error:
            self._table.fill_(math.nan)  # so that every rank sees the failure
            rank_zero_warn(no_halves(error))

    def estimate(self) -> NoiseEstimate | None:
        """Return the estimate from the clients of all ranks, None if there is none; call it on all ranks."""
        joint = collectives.sum_over_ranks(torch.cat([self._sum, self._table.flatten()]))
        table: FloatArray = joint[len(self._sum) :].cpu().numpy().reshape(-1, 4)
        if not np.isfinite(table).all():
            return None
        table = table[table[:, 3] > 0]
        if not len(table):
            return None
        weights = np.full(len(table), 1.0 / len(table))
        mean_square = float(joint[: len(self._sum)].square().sum()) / len(table) ** 2
        return estimate_from_half_batches(table[:, 0], table[:, 2:], table[:, 1], weights, mean_square)
