"""The agreement of all ranks on one batch, and the messages of a probe that failed."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

from lightning_fedscale.callbacks.max_batch_probe.rank_probe import Probed
from lightning_fedscale.core.lightning.side_effects import undone
from lightning_fedscale.devices.probe import ProbeResult
from lightning_fedscale.utils import collectives


def smallest_of_ranks(trainer: pl.Trainer, probe: Callable[[], Probed]) -> Probed:
    """Probe on every rank, and return the smallest batch of all.

    Raises:
        RuntimeError: if the probe fails on another rank, so that no rank waits forever.
        Exception: if it fails on this one.
    """
    failure: Exception | None = None
    found: Probed | None = None
    try:
        found = probe()
    except Exception as error:
        failure = error
    own = 0 if found is None else found.result.max_batch
    answer = [own, "" if failure is None else reason_of(failure)]
    answers = collectives.gather_over_ranks(answer, trainer.strategy.root_device)
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(answers):
        if reason:
            raise RuntimeError(f"MaxBatchProbe: the probe failed on rank {rank}: {reason}")
    assert found is not None
    if (smallest := min(batch for batch, _ in answers)) == own:
        return found
    with undone(trainer):
        agreed = {
            "max_batch": smallest, "predicted_bytes": found.model.peak(smallest),
            "parts": found.model.breakdown(smallest), "limited_by": "another rank",
        }  # fmt: skip
    return found._replace(result=ProbeResult(**{**found.result.state_dict(), **agreed}))


def reason_of(error: Exception) -> str:
    """Return what failed and what to do, in one line."""
    text = " ".join(str(error).split())
    if _is_ours(error):
        return text
    return (
        f"a training step on a copy of the module fails ({type(error).__name__}: {text:.300}). Pass make_batch=, a"
        " function of the number of samples that returns a batch for training_step, or remove MaxBatchProbe."
    )


def explained(error: Exception) -> Exception:
    """Return an error whose message says what to do."""
    if _is_ours(error):
        return error
    return RuntimeError(f"MaxBatchProbe: {reason_of(error)} With apply=False, training starts without a probe.")


def _is_ours(error: Exception) -> bool:
    """Return whether this package raised the error; those of the project and of torch need an introduction."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("lightning_fedscale.")
