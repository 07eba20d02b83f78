"""Is what `pyproject.toml` promises of versions true? ``make compat``, or ``python -m tests.compat [ROW ...]``.

Each row of the matrix is an environment of its own in ``.compat``: an interpreter, and versions to hold to. It installs
the package as a user would, runs the tests that versions can break, and adds a line to the table, which is written to
``benchmarks/results/compat.md``. What this machine lacks is skipped, with the reason. Rows that are named are made
anew, as is one whose versions changed; what others found last time is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".compat"
TABLE = ROOT / "benchmarks" / "results" / "compat.md"
RESULTS = TABLE.with_suffix(".json")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]

TOOLS = ["hypothesis>=6.100", "pytest>=8.0", "pytest-timeout>=2.3", "scikit-learn>=1.5"]
SHOWN = ["torch", "lightning", "numpy"]
# What versions of torch, Lightning, numpy, jsonargparse, Hydra and Python can break: the laws, everything of Lightning
# that goes on inside a round, checkpoints, configuration, and several processes.
TESTS = [
    "tests/laws/test_*.py",
    "tests/features/test_callbacks.py",
    "tests/features/test_compute_accounting.py",
    "tests/features/test_hydra*.py",
    "tests/features/test_fast_step.py",
    "tests/features/test_log_*.py",
    "tests/features/test_memory_of_*.py",
    "tests/features/test_optim_*.py",
    "tests/features/test_resume.py",
    "tests/dist/test_accounting.py",
    "tests/dist/test_phases.py",
    "tests/dist/test_vectorized.py",
    "tests/unit/test_cli*.py",
    "tests/unit/test_memory_model.py",
    "tests/unit/test_partition_object.py",
    "tests/unit/test_partition_plots.py",
    "tests/features/test_scaling_fit.py",
]


class CannotRun(Exception):
    """A row cannot be run on this machine; says why."""


class Row(NamedTuple):
    """One environment.

    Attributes:
        python: the interpreter, as "3.10".
        versions: gives the lines that pip is held to.
        about: what the row is for.
    """

    python: str
    versions: Callable[[], list[str]]
    about: str


def floors() -> list[str]:
    """The oldest versions that are admitted.

    Example:
        >>> [line for line in floors() if line.startswith("numpy")]
        ['numpy==2.0']
    """
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["privacy"]]
    return [f"{name}=={floor}" for name, floor in (_floor(requirement) for requirement in wanted)]


def pins() -> list[str]:
    """The versions that ``make`` installs."""
    return (ROOT / "constraints.txt").read_text("utf8").splitlines()


def older_lightning() -> list[str]:
    """The versions that ``make`` installs, with the oldest Lightning instead."""
    oldest = [line for line in floors() if line.startswith("lightning==")]
    lightnings = ("lightning==", "pytorch-lightning==")
    return [line for line in pins() if not line.startswith(lightnings)] + oldest


def _floor(requirement: str) -> tuple[str, str]:
    found = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
    assert found is not None, f"pyproject.toml: {requirement!r} has no lower bound"
    return found[1], found[2]


MATRIX = {
    "oldest": Row("3.10", floors, "the lower bounds of `pyproject.toml`"),
    "older-lightning": Row("3.11", older_lightning, "the oldest Lightning beside the newer torch"),
    "pinned-3.10": Row("3.10", pins, "`constraints.txt`"),
    "pinned-3.11": Row("3.11", pins, "`constraints.txt`"),
    "pinned-3.12": Row("3.12", pins, "`constraints.txt`"),
    "pinned-3.13": Row("3.13", pins, "`constraints.txt`"),
    "newest": Row("3.13", list, "the newest that `pyproject.toml` admits and pip finds"),
    "newest-3.11": Row("3.11", list, "the newest that `pyproject.toml` admits and pip finds"),
}


def interpreters(python: str) -> Iterator[str]:
    """Where one of this version may be: on the path, or among pyenv's and uv's."""
    if found := shutil.which(f"python{python}"):
        yield found
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    homes.append(Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python")))
    for home in homes:
        yield from map(str, sorted(home.glob(f"*{python}.*/bin/python{python}"), reverse=True))


def interpreter(python: str) -> str:
    """The first of them that starts.

    Raises:
        CannotRun: if none does.
    """
    for candidate in interpreters(python):
        if subprocess.run([candidate, "-m", "venv", "--help"], capture_output=True).returncode == 0:
            return candidate
    raise CannotRun(f"no Python {python} here")


def install(name: str, row: Row) -> Path:
    """Make a row's environment, unless it is there and of these versions.

    Returns:
        Its Python.

    Raises:
        CannotRun: if there is no interpreter for it, or pip fails.
    """
    folder, held = FOLDER / name, "\n".join([*row.versions(), *TOOLS, *PROJECT["dependencies"], ""])
    python, stamp = folder / "bin" / "python", folder / "versions.txt"
    if stamp.exists() and stamp.read_text() == held:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([interpreter(row.python), "-m", "venv", str(folder)])
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(row.versions()) + "\n")
    _run([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), "-e", f"{ROOT}[privacy]", *TOOLS])
    stamp.write_text(held)
    return python


def _run(command: list[str]) -> str:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise CannotRun(lines[-1][:300])
    return done.stdout


def versions(python: Path) -> dict[str, str]:
    """What is installed."""
    ask = f"from importlib.metadata import version as v; import json; print(json.dumps({{n: v(n) for n in {SHOWN}}}))"
    found: dict[str, str] = json.loads(_run([str(python), "-c", ask]))
    return {"python": _run([str(python), "--version"]).split()[1], **found}


def check(name: str, row: Row) -> dict[str, Any]:
    """Install a row, run its tests.

    Returns:
        ``outcome``, and the versions if it ran.
    """
    print(f"{name}: Python {row.python}, {row.about}", flush=True)
    try:
        python = install(name, row)
        found: dict[str, Any] = versions(python)
    except CannotRun as error:
        return {"outcome": f"not run: {error}"}
    files = sorted(str(path.relative_to(ROOT)) for pattern in TESTS for path in ROOT.glob(pattern))
    started = time.monotonic()
    with (FOLDER / name / "tests.log").open("w") as log:
        command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    last = (FOLDER / name / "tests.log").read_text().rstrip().splitlines()[-1].strip("= ")
    minutes = (time.monotonic() - started) / 60
    counts = re.sub(r" in [\d.]+s.*", "", last)
    return {**found, "outcome": counts if code == 0 else f"**{counts}**", "failed": code != 0, "minutes": minutes}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of all rows, in Markdown."""
    lines = [
        "# Versions that were tested",
        "",
        "Written by `make compat`, which runs on Linux what versions can break: the laws, callbacks, logging,",
        "optimizers, checkpoints, configuration and several processes. `make test` runs everything, on one Python.",
        "",
        "| | held to | Python | torch | lightning | numpy | tests |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in MATRIX.items():
        result = results.get(name, {"outcome": "not run yet"})
        cells = [result.get("python", row.python), *(result.get(package, "") for package in SHOWN)]
        lines.append(f"| {name} | {row.about} | {' | '.join(cells)} | {result['outcome']} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the rows that were named, else all.

    Returns:
        1 if tests of one of them failed.
    """
    wanted = sys.argv[1:] or list(MATRIX)
    if unknown := [name for name in wanted if name not in MATRIX]:
        print(f"{', '.join(unknown)}: no such row; there are {', '.join(MATRIX)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    for name in wanted:
        result = check(name, MATRIX[name])
        results = (
            json.loads(RESULTS.read_text("utf8")) if RESULTS.exists() else {}
        )  # read anew: another row may be running
        results[name] = result
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf8")
        TABLE.write_text(table(results), "utf8")
        print(f"  {result['outcome']}", flush=True)
    return int(any(result.get("failed") for name, result in results.items() if name in wanted))


if __name__ == "__main__":
    sys.exit(main())
