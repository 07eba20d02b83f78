"""What is looked at beside a project's results: all callbacks, a run that is resumed, two processes."""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from comparison import QUIET

from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe


def check(
    module: Callable[[], pl.LightningModule], loaders: Callable[[], tuple[Any, Any]], strategy: Callable[..., Any]
) -> pl.Trainer:
    """Train with all callbacks, print what they say and what they counted; then resume, and take two processes.

    Args:
        module: makes the project's module.
        loaders: makes its loaders, of training and of validation data.
        strategy: makes the federated strategy, with further arguments.

    Returns:
        the Trainer of the federated run.
    """

    def fit(
        strategy: Any, epochs: int = 2, ckpt_path: Path | None = None, watched: bool = True, **options: Any
    ) -> pl.Trainer:
        pl.seed_everything(0, verbose=False)
        callbacks = [MaxBatchProbe(apply=False), CriticalPhase(), ComputeAccounting()] if watched else []
        if watched and not isinstance(strategy, str):
            callbacks.append(ClientMetrics())  # which needs clients
        trainer = pl.Trainer(
            strategy=strategy, max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **{**QUIET, **options}
        )
        trainer.fit(module(), *loaders(), ckpt_path=ckpt_path)
        return trainer

    with said("central"):
        central = fit("auto")
    with said("federated"):
        whole = fit(strategy())
    for how, trainer in (("central", central), ("federated", whole)):
        ledger = trainer.callbacks[2].ledger
        print(f"  {how}: {ledger.samples:,.0f} samples, {ledger.tokens:,.0f} tokens, {ledger.training_flops:.3g} FLOPs")
    plain = fit(strategy(), watched=False)
    # Central training takes so many steps that `CriticalPhase` acts, which it is for.
    print(f"  callbacks instead of none: weights differ by {difference(whole, plain):.2g}")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        half = Path(folder, "half.ckpt")
        fit(strategy(), epochs=1).save_checkpoint(half)
        resumed = fit(strategy(), ckpt_path=half)
    print(f"  clients evaluated: {len(whole.callbacks[3].last.clients)}")
    print(f"  interrupted and resumed: weights differ by {difference(whole, resumed):.2g}")
    two = fit(strategy(start_method="spawn"), devices=2)
    print(f"  two processes: weights differ by {difference(whole, two):.2g}")
    two = fit("ddp_spawn", devices=2)
    print(f"  two processes, central: larger batches, so weights differ by {difference(central, two):.2g}")
    return whole


def difference(one: pl.Trainer, other: pl.Trainer) -> float:
    """The largest difference between two trained modules."""
    mine, theirs = one.lightning_module.state_dict(), other.lightning_module.state_dict()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine)


@contextmanager
def said(how: str) -> Iterator[None]:
    """Print what this package says meanwhile."""

    def show(message: str) -> None:
        if message.startswith(("MaxBatchProbe", "CriticalPhase", "ComputeAccounting", "ClientMetrics", "Executor")):
            print(f"  {how}, {message}")

    logger, handler = logging.getLogger("lightning.pytorch"), logging.Handler()
    handler.emit = lambda record: show(record.getMessage())
    level, usual = logger.level, list(logger.handlers)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        yield
    logger.setLevel(level)
    logger.handlers[:] = usual
    for message in dict.fromkeys(str(warning.message) for warning in warned):
        show(message)
