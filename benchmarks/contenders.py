"""Who takes part."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".bench" / "env"
STAMP = "installed"  # Written into an environment when all is there.


class Contender(NamedTuple):
    """A way to train a task.

    Attributes:
        name: for the command line and files.
        label: for tables.
        kind: "floor", "trainer" (not federated, so its accuracy is not compared), "ours" or "peer".
        module: what its process runs.
        options: for the module.
        python: the interpreter of its environment.
        cores: how many it may use.
        tasks: those that it takes part in unless it is asked by name; empty for all.
    """

    name: str
    label: str
    kind: str
    module: str
    options: dict[str, Any]
    python: str = sys.executable
    cores: int = 1
    tasks: tuple[str, ...] = ()

    def missing(self) -> str:
        """What it lacks on this machine, or nothing."""
        if not Path(self.python).exists():
            return "not installed: python -m benchmarks.install " + self.name
        available = len(os.sched_getaffinity(0))
        return f"needs {self.cores} cores, this machine has {available}" if available < self.cores else ""


SMALL_AND_LARGE = ("digits", "cnn")  # Where peers and variants compete; the other tasks are floors against ours.


def floor(name: str, label: str, loop: str) -> Contender:
    return Contender(name, label, "floor", "benchmarks.floors", {"loop": loop})


def ours(name: str, label: str, *, cores: int = 1, tasks: tuple[str, ...] = (), **options: Any) -> Contender:
    return Contender(name, f"FederatedStrategy, {label}", "ours", "benchmarks.ours", options, cores=cores, tasks=tasks)


def peer(name: str) -> Contender:
    python = str(ENVIRONMENTS / name / "bin" / "python")
    module = f"benchmarks.peers.{name}"
    return Contender(name, name, "peer", module, {}, python=python, tasks=SMALL_AND_LARGE)


FLOOR = floor("floor", "hand-written loop on index tensors", "index")
CONTENDERS = [
    FLOOR,
    floor("tuned", "the same, tuned: two flat vectors", "flat"),
    floor("loaders", "the same with DataLoaders", "loaders"),
    Contender("trainer", "plain Trainer, as many samples, not federated", "trainer", "benchmarks.plain", {}),
    ours("auto", "auto", executor="auto"),
    ours("sequential", "sequential", executor="sequential"),
    ours("vectorized", "vectorized", executor="vectorized"),
    ours("auto-log", "auto, the step logs its loss", tasks=SMALL_AND_LARGE, executor="auto", log=True),
    ours("auto-epochs", "auto, every round an epoch", tasks=SMALL_AND_LARGE, executor="auto", rounds_per_epoch=1),
    ours("auto-2", "auto, two processes", tasks=SMALL_AND_LARGE, cores=2, executor="auto", devices=2),
    ours("sequential-2", "sequential, two processes", tasks=("ranks",), cores=2, executor="sequential", devices=2),
    ours("vectorized-2", "vectorized, two processes", tasks=("ranks",), cores=2, executor="vectorized", devices=2),
    peer("pfl"),
    peer("fedjax"),
    peer("blazefl"),
    peer("fedlab"),
    peer("fluke"),
    peer("flwr"),
]
BY_NAME = {contender.name: contender for contender in CONTENDERS}
