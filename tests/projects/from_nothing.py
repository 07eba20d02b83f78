"""From an empty folder to a federated run, its TensorBoard page and its report, by each of the three ways in.

    python -m tests.projects.from_nothing [FOLDER] [WAY ...]

Each way begins with a stock project: a plain script, a LightningCLI project, one in the shape of
lightning-hydra-template. It is trained as it is, then made federated by what docs/how-to/existing-projects.md says, and
nothing else; then TensorBoard shows the run in a browser, and `fedscale report` writes its page. FOLDER is from_nothing
by default.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests import pythons
from tests.browser import MISSING, Browser, wait
from tests.dist.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SHOWN = ("round/loss", "round/drift", "compute/flops_total", "compute/size_ratio")

# A law made up for this: it shows what a report looks like, not how large a model for digits should be.
LAW = {"E": 0.2, "A": 50.0, "B": 200.0, "alpha": 0.5, "beta": 0.5}
OLD = "trainer = pl.Trainer(max_epochs=10, "
NEW = """from lightning_fedscale import FederatedStrategy
    from lightning_fedscale.callbacks import ComputeAccounting
    from lightning_fedscale.scaling import Rosenfeld

    strategy = FederatedStrategy(num_clients=20, clients_per_round=10, partitioner="dirichlet")
    accounting = ComputeAccounting(law=Rosenfeld(E=0.2, A=50.0, B=200.0, alpha=0.5, beta=0.5))
    trainer = pl.Trainer(max_epochs=30, strategy=strategy, callbacks=[accounting], """

YAML = """
trainer:
  max_epochs: 30
  strategy:
    class_path: lightning_fedscale.FederatedStrategy
    init_args: {num_clients: 20, clients_per_round: 10, partitioner: dirichlet}
  callbacks:
    - class_path: lightning_fedscale.callbacks.ComputeAccounting
      init_args:
        law:
          class_path: lightning_fedscale.scaling.Rosenfeld
          init_args: {E: 0.2, A: 50.0, B: 200.0, alpha: 0.5, beta: 0.5}
"""


class Way(NamedTuple):
    """One way in.

    Attributes:
        start: puts the stock project into an empty folder.
        central: its own command.
        change: does to its files what the way asks for, if anything.
        federated: the command then.
    """

    start: Callable[[Path], object]
    central: list[str]
    change: Callable[[Path], object]
    federated: list[str]


def _copy(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(ROOT / "tests" / "projects" / name, folder, dirs_exist_ok=True)


def _write_template(folder: Path) -> None:
    for name, text in import_module("tests.features.test_hydra_template").PROJECT.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _change_script(folder: Path) -> None:
    script = folder / "train.py"
    text = script.read_text()
    assert text.count(OLD) == 1
    script.write_text(text.replace(OLD, NEW))


# No test afterwards: the template keeps its network among the hyperparameters, which torch.load refuses to read.
HYDRA = ["src/train.py", "logger=tensorboard", "seed=1", "test=False"]
WAYS = {
    "plain": Way(_copy("plain"), ["train.py"], _change_script, ["train.py"]),
    "cli": Way(
        _copy("cli"), ["main.py", "fit", "-c", "config.yaml"],
        lambda folder: (folder / "federated.yaml").write_text(YAML),
        ["main.py", "fit", "-c", "config.yaml", "-c", "federated.yaml"],
    ),
    "hydra": Way(
        _write_template, HYDRA, lambda folder: None,
        [*HYDRA, "hydra.searchpath=[pkg://lightning_fedscale.conf]", "+trainer/strategy=federated",
         "trainer.strategy.num_clients=20", "trainer.max_epochs=100",
         "+callbacks.accounting._target_=lightning_fedscale.callbacks.ComputeAccounting",
         "+callbacks.accounting.law._target_=lightning_fedscale.scaling.Rosenfeld",
         *(f"+callbacks.accounting.law.{name}={value}" for name, value in LAW.items())],
    ),
}  # fmt: skip


def run(folder: Path, *command: str) -> str:
    """What Python prints, in that folder.

    Raises:
        RuntimeError: with its last words, if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    done = pythons.run(*command, environment=environment, folder=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def accuracy(folder: Path) -> float:
    """The last validation accuracy that the newest run in a folder has logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(folder.rglob("events.out.tfevents.*"), key=lambda file: (file.stat().st_mtime, len(file.parts)))
    events = EventAccumulator(str(newest.parent)).Reload()
    (name,) = [tag for tag in events.Tags()["scalars"] if re.fullmatch(r"val[/_]acc", tag)]
    return float(events.Scalars(name)[-1].value)


def look(run_folder: Path, picture: Path) -> list[str]:
    """Open a run in TensorBoard, in a browser if there is one.

    Returns:
        The names that it shows.
    """
    port = free_port()
    command = ["-m", "tensorboard.main", "--logdir", str(run_folder), "--port", str(port), "--host", "127.0.0.1"]
    with (picture.parent / "tensorboard.log").open("wb") as log:
        board = subprocess.Popen([sys.executable, *command, "--load_fast=false"], stdout=log, stderr=log)
    at = f"http://127.0.0.1:{port}/"

    def tags() -> list[str]:
        with DIRECT.open(f"{at}data/plugin/scalars/tags") as answer:
            return sorted({tag for run in json.load(answer).values() for tag in run})

    try:
        names: list[str] = wait(tags, board)
        if not MISSING:
            with Browser(picture.parent / "browser", (1400, 1500)) as browser:
                browser.open(f"{at}#scalars&tagFilter=round")
                wait(lambda: "round/loss" in browser.text() and browser.count(".line-plot") > 1)
                browser.screenshot(picture)
            shutil.rmtree(picture.parent / "browser", ignore_errors=True)
    finally:
        board.terminate()
        board.wait()
    return names


def go(name: str, folder: Path) -> dict[str, Any]:
    """One way, from an empty folder to its report.

    Returns:
        What came out.
    """
    way, started = WAYS[name], time.monotonic()
    folder.mkdir(parents=True)
    way.start(folder)
    run(folder, *way.central)
    central = accuracy(folder)
    way.change(folder)
    run(folder, *way.federated)
    (position,) = folder.rglob("position.json")
    names = look(position.parent, folder / "tensorboard.png")
    assert set(SHOWN) <= set(names), f"{name}: TensorBoard shows {names}"
    fedscale = "import sys; from lightning_fedscale.cli import main; sys.exit(main())"
    run(folder, "-c", fedscale, "report", str(position.parent), "--output", str(folder / "report.html"))
    return {
        "central": central,
        "federated": accuracy(folder),
        "minutes": (time.monotonic() - started) / 60,
        "position": json.loads(position.read_text()),
    }


def main() -> int:
    """All ways, or those that are named."""
    folder, *ways = sys.argv[1:] or ["from_nothing"]
    for name in ways or WAYS:
        found = go(name, Path(folder).resolve() / name)
        print(
            f"{name}: accuracy {found['central']:.3f} central, {found['federated']:.3f} federated,"
            f" {found['minutes']:.1f} minutes; {folder}/{name}/report.html, tensorboard.png",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
