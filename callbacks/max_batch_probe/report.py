"""The report of a probe's result: numbers, charts, and a line in the log."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.core.lightning.loggers import Layout, lay_out, show, shows_figures
from lightning_fedscale.core.lightning.trainer_state import metric_stores
from lightning_fedscale.devices import MemoryModel
from lightning_fedscale.devices.probe import ProbeResult
from lightning_fedscale.utils.memory import format_bytes

_LAYOUT: Layout = {
    "MaxBatchProbe": {
        "largest batch": ["Multiline", ["probe/max_batch", "probe/batch_size$", "probe/best_batch$"]],
        "memory": ["Multiline", ["probe/budget_bytes$", "probe/predicted_bytes$", "probe/measured_bytes$"]],
        "fixed seconds per step": ["Multiline", ["probe/step_fixed_seconds$"]],
        "seconds per sample": ["Multiline", ["probe/step_seconds_per_sample$"]],
    }
}


def log(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Log numbers at the present step, also outside of the loops."""
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics, step=trainer.global_step)


def report(trainer: pl.Trainer, result: ProbeResult, model: MemoryModel | None, *, applied: bool) -> None:
    """Log and print a result, and plot memory against batch size.

    Args:
        trainer: the Trainer.
        result: the result of all ranks.
        model: the memory model of this rank; None in a resumed run.
        applied: whether training takes the batch.
    """
    metrics = result.metrics()
    log(trainer, metrics)
    lay_out(trainer, _LAYOUT)
    if model is not None and shows_figures(trainer):
        budgets = {"budget": result.budget, "with headroom": int(result.budget * (1 - result.headroom))}
        show(trainer, "probe/memory", model.plot(budgets=budgets))
    metric_stores(trainer).watched.update({name: torch.tensor(value) for name, value in metrics.items()})
    largest = max(result.parts, key=lambda part: result.parts[part])
    measured = "" if result.measured_bytes is None else f", measured {format_bytes(result.measured_bytes)}"
    measured += "" if result.measured_batch in (None, result.max_batch) else f" at {result.measured_batch}"
    rank_zero_info(
        f"MaxBatchProbe: a batch of {result.max_batch:,} samples takes {format_bytes(result.predicted_bytes)} of"
        f" {format_bytes(result.budget)}{measured}; the largest part is {largest}; limited by {result.limited_by}."
        + (f" The memory of libraries is typical, not measured ({result.assumed})." if result.assumed else "")
        + ("" if result.previous is None else f" The batch size was {result.previous}.")
        + ("" if applied else " The batch size is unchanged.")
    )
