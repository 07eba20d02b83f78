"""The numbers that `ComputeAccounting` logs."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_fedscale.callbacks.critical_phase.callback import CriticalPhase
from lightning_fedscale.scaling import Kaplan, Law, Position
from lightning_fedscale.scaling.ledger import Ledger


def cost_metrics(ledger: Ledger, clients: int, limit: float | None) -> dict[str, float]:
    """Return what was spent.

    Args:
        ledger: what was spent.
        clients: number of clients of the position.
        limit: FLOPs that the run may or will take; None if unknown.
    """
    return {
        "compute/flops_total": ledger.training_flops,
        "compute/flops_per_client": ledger.training_flops / clients,
        **{f"compute/flops_{purpose}": spent for purpose, spent in ledger.flops.items()},
        "compute/tokens": ledger.tokens,
        "compute/params": ledger.average_params,
        "compute/clients": clients,
        "compute/budget_used": math.nan if limit is None else ledger.training_flops / limit,
        "compute/joules": math.nan if ledger.joules is None else ledger.joules,
    }


def position_metrics(position: Position | None) -> dict[str, float]:
    """Return where the run stands under the law."""
    if position is None:
        return {}
    readings = position.readings or (position,)
    band = {
        "compute/params_by_law": position.params,
        "compute/optimal_params_low": min(each.low for each in readings),
        "compute/optimal_params_high": max(each.high for each in readings),
    }
    if not all(map(math.isfinite, band.values())):  # TensorBoard draws a band only if its values have equal steps
        band = {}
    return band | {
        "compute/optimal_params": position.optimal_params,
        "compute/size_ratio": position.size_ratio,
        "compute/size_ratio_low": min(each.size_ratio for each in readings),
        "compute/size_ratio_high": max(each.size_ratio for each in readings),
        "compute/predicted_loss": position.predicted_loss,
        "compute/optimal_loss": position.optimal_loss,
        "compute/excess_loss": position.excess_loss,
    }


def critical_batch(trainer: pl.Trainer, ledger: Ledger, law: Law | None, position: Position | None) -> float:
    """Return the critical batch in tokens: by `CriticalPhase`, else, for text, by Kaplan's law; NaN if unknown."""
    per_sample = ledger.tokens / ledger.samples
    for phase in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(phase, CriticalPhase):
            for noise in (phase.sampling_noise.critical_batch, phase.noise_scale.scale):
                if noise > 0:
                    return noise * per_sample
    known = position is not None and math.isfinite(position.predicted_loss)
    if known and position is not None and law is not None and law.domain.task == "text":
        return Kaplan().critical_batch(position.predicted_loss)
    return math.nan


def learning_rate(trainer: pl.Trainer) -> float:
    """Return the initial learning rate of the first optimizer; NaN if it has none."""
    groups = [group for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups]
    return float(groups[0].get("initial_lr", groups[0].get("lr", math.nan))) if groups else math.nan
