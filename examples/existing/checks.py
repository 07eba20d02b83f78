"""What is looked at beside a project's results: all callbacks, a run that goes on, two processes, its own prediction."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from comparison import QUIET

from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe


def check(
    module: Callable[[], pl.LightningModule], loaders: Callable[[], tuple[Any, Any]], strategy: Callable[..., Any]
) -> pl.Trainer:
    """Train with all callbacks, print what they say, and what differs after an interruption and in two processes.

    Args:
        module: makes the project's module.
        loaders: makes its loaders of training and validation data.
        strategy: makes the federated strategy, with further arguments.

    Returns:
        the Trainer of the federated run.
    """

    def fit(strategy: Any, epochs: int = 4, saved: str | None = None, **options: Any) -> pl.Trainer:
        pl.seed_everything(0, verbose=False)
        callbacks = [MaxBatchProbe(apply=False), CriticalPhase(), ComputeAccounting(), ClientMetrics()]
        if not isinstance(strategy, pl.strategies.Strategy):
            callbacks.pop()  # there are no clients
        options = QUIET | options
        trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **options)
        trainer.fit(module(), *loaders(), ckpt_path=saved)
        return trainer

    with sentences("central"):
        fit("auto")
    with sentences("federated"):
        whole = fit(strategy())
    report = whole.callbacks[-1].last
    ledger = next(callback.ledger for callback in whole.callbacks if isinstance(callback, ComputeAccounting))
    with tempfile.TemporaryDirectory() as folder:
        fit(strategy(), epochs=2).save_checkpoint(Path(folder, "half.ckpt"))
        resumed = fit(strategy(), saved=str(Path(folder, "half.ckpt")))
    shared = fit(strategy(start_method="spawn"), devices=2)
    print(f"  samples counted: {ledger.samples:,.0f}, tokens {ledger.tokens:,.0f}, FLOPs {ledger.training_flops:.4g}")
    print(f"  clients evaluated: {len(report.clients)}")
    print(f"  interrupted and resumed: weights differ by {difference(whole, resumed):.3g}")
    print(f"  two processes instead of one: weights differ by {difference(whole, shared):.3g}")
    fit("ddp_spawn", devices=2)
    print("  two processes, central: trained")
    return whole


def difference(one: pl.Trainer, other: pl.Trainer) -> float:
    """The largest difference between two trained modules."""
    pairs = zip(one.lightning_module.state_dict().values(), other.lightning_module.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@contextmanager
def sentences(how: str):
    """Print what the callbacks say."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(f"  {how}: {record.getMessage()}")

    handler, logger = Said(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = True
    for warning in warned:
        print(f"  {how}, warning: {warning.message}")
