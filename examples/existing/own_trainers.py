"""Checks for projects that build their Trainers themselves: all callbacks, a resumed run, two processes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_fedscale.pytorch_lightning import callbacks


def check(
    fit: Callable[..., Any], resume: Callable[..., Any], strategy: Callable[..., Any], *, epochs: int = 4
) -> tuple[Any, Any]:
    """Train with all four callbacks; print what they found, and what an interruption or two processes change.

    Args:
        fit: trains with a strategy, a number of epochs, callbacks and further arguments of the Trainer, and returns the
            project's model, which has the module as ``model`` and the Trainer as ``trainer``.
        resume: trains half as long, saves, resumes and returns the same; it gets a function that makes the
            strategy, the number of epochs, and a function that makes callbacks.
        strategy: makes the federated strategy, with further arguments.
        epochs: epochs of the whole run.

    Returns:
        the models that were trained in one process and in two.
    """
    # Which executor is faster depends on the clock, and they agree to float tolerance only.
    federated = partial(strategy, executor="sequential")
    fit("auto", epochs, four()[:-1])  # there are no clients
    plain = fit(federated(), epochs, [])
    watched = four()
    whole = fit(federated(), epochs, watched)
    probe, phases, accounting, clients = watched
    print(f"  largest batch: {probe.result.max_batch:,}; FLOPs: {accounting.ledger.training_flops:.4g}")
    print(f"  phases: {phases.record.summary('round')}; clients evaluated: {len(clients.last.clients)}")
    print(f"  callbacks instead of none: weights differ by {difference(plain, whole):.3g}")
    resumed = resume(federated, epochs, four)
    print(f"  interrupted and resumed: weights differ by {difference(whole, resumed):.3g}")
    shared = fit(federated(start_method="spawn"), epochs, four(), devices=2)
    print(f"  two processes instead of one: weights differ by {difference(whole, shared):.3g}")
    return whole, shared


def four() -> list[Any]:
    """All four callbacks, as they come; the probe only reports."""
    return [
        callbacks.MaxBatchProbe(apply=False),
        callbacks.CriticalPhase(),
        callbacks.ComputeAccounting(),
        callbacks.ClientMetrics(),
    ]


def difference(one: Any, other: Any) -> float:
    """The largest difference between the weights of two models."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)
