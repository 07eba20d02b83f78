"""Runs a project as it is and federated, and prints both results."""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
"""What these scripts also tell every Trainer."""


def compare(
    project: str, train: Callable[[Any, int], dict[str, float]], strategy: Any, *, passes: int, rounds: int
) -> None:
    """Train twice from the same start and print what came of it.

    Args:
        project: the distribution whose version is shown.
        train: trains with a strategy for so many epochs and returns named results.
        strategy: the federated one, or its name.
        passes: epochs of the project as it is; with ``--fast`` two.
        rounds: epochs of the federated one, each a round; with ``--fast`` two.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two passes and two rounds")
    if parser.parse_args().fast:
        passes = rounds = 2
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = {}
    for how, chosen, epochs in (("central", "auto", passes), ("federated", strategy, rounds)):
        pl.seed_everything(0, verbose=False)
        started = time.perf_counter()
        results[how] = train(chosen, epochs)
        results[how]["seconds"] = time.perf_counter() - started
    cohort = ""
    if not isinstance(strategy, str):
        cohort = f" of {len(strategy.last_round.clients)} of {strategy.num_clients} clients"
    print(f"{project} {version(project)}: {passes} passes, {rounds} rounds{cohort}")
    for name in results["central"]:
        print(f"  {name}: {results['central'][name]:.4g} central, {results['federated'][name]:.4g} federated")
