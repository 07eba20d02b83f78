"""The processor time that commands and imports take, as a ratio to importing Lightning.

python -m benchmarks.imports                a few minutes
python -m benchmarks.imports --turns 1      to see that it runs
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.phases import RESULTS

ROOT = Path(__file__).resolve().parents[1]
LIGHTNING = "import lightning"
MAIN = "import sys; from lightning_fedscale.cli import main; sys.exit(main())"

IMPORTS = [
    LIGHTNING,
    "import lightning_fedscale",
    "from lightning_fedscale import FederatedStrategy, callbacks",
    "import lightning_fedscale.scaling",
]
COMMANDS = {
    "--help": 0,
    "plan --budget=1": 2,
    "size --module=my.Net": 2,
    "plan --flops=1e20 --clients=10 --device=phone": 0,
    "fit runs.csv --output=law --holdout=false --bootstrap=0": 0,
    "report run": 0,
}
"""Command lines with their exit codes."""


def seconds(arguments: list[str], folder: Path, package: Path, code: int = 0) -> float:
    """User and system time of a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode != code:
        raise RuntimeError(f"{' '.join(arguments)} exits with {run.returncode}: {run.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(package: Path, turns: int) -> dict[str, list[float]]:
    """Seconds of every import and command; they take turns, so that a machine that slows down affects all of them."""
    found: dict[str, list[float]] = {name: [] for name in [*IMPORTS, *(f"fedscale {line}" for line in COMMANDS)]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "tests" / "features" / "digits_runs.csv", folder / "runs.csv")
        (folder / "run").mkdir()
        (folder / "run" / "metrics.csv").write_text("epoch,step,val_loss\n0,3,0.5\n1,7,0.4\n")
        for turn in range(turns + 1):  # the first one only warms the caches of the disk
            for code in IMPORTS:
                found[code].append(seconds([code], folder, package))
            for line, exit_code in COMMANDS.items():
                found[f"fedscale {line}"].append(seconds([MAIN, *line.split()], folder, package, exit_code))
            print(f"{turn} of {turns} turns", file=sys.stderr)
    return {name: each[1:] for name, each in found.items()}


def rows(found: Mapping[str, list[float]]) -> list[str]:
    """Medians of the seconds, and of the ratios to Lightning's import of the same turn, with the least and the most."""
    table = []
    for name, each in found.items():
        ratios = [one / base for one, base in zip(each, found[LIGHTNING], strict=True)]
        table.append(
            f"| `{name}` | {statistics.median(each):.2f} | {statistics.median(ratios):.2f} |"
            f" {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return table


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--package", type=Path, default=ROOT, help="another checkout, to compare with")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    report = REPORT.format(
        rows="\n".join(rows(measured(options.package.resolve(), options.turns))), turns=options.turns,
        python=".".join(map(str, sys.version_info[:3])),
    )  # fmt: skip
    (options.output / "imports.md").write_text(report)
    print(report)


REPORT = """# What commands and imports take

Made by `python -m benchmarks.imports`, Python {python}. User and system time of a new process, with Python's own start,
and its ratio to `import lightning` in the same turn: medians of {turns} turns, with the least and the most.

The commands `bench`, `partition`, `probe` and `train` need Lightning even for their help: they take modules or data
modules as arguments, or are Hydra's.

The commands do their work, too: about a quarter of the time of `fit` is its search for the law's constants; the rest
imports numpy, scipy, pandas and matplotlib, and draws a figure.

| | seconds | of `import lightning` | range |
|---|---:|---:|---:|
{rows}
"""


if __name__ == "__main__":
    main()
