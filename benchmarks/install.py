"""Environments of the peers: ``python -m benchmarks.install [NAME ...]``, without names all that are missing.

Each peer has an environment of its own in .bench/env, with torch first and then the peer as its documentation says. One
that cannot be installed is no error: the report says why it did not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import ENVIRONMENTS, STAMP

TORCH = "torch==2.13.0"


class Environment(NamedTuple):
    """What a peer needs.

    Attributes:
        steps: requirements of each pip install, one after the other.
        pythons: commands of the interpreters that will do, best first; empty for the one that runs this.
    """

    steps: list[list[str]]
    pythons: tuple[str, ...] = ()


PEERS = {
    "pfl": Environment([[TORCH], ["pfl[pytorch]==0.6.0"]]),
    # The newest jax that still has what fedjax 0.0.17, its last release, uses of it (jax.tree_map).
    "fedjax": Environment([["jax==0.5.3", "jaxlib==0.5.3", "dm-haiku==0.0.16", "fedjax==0.0.17"]]),
    # 3.0 asks for Python 3.14. tqdm is imported but not declared.
    "blazefl": Environment([[TORCH], ["blazefl[reproducibility]==2.0.3", "tqdm"]], ("python3.13", "python3.12")),
    # These two bring torchvision, which may replace torch by the release that it was built for.
    "fedlab": Environment([[TORCH], ["fedlab==1.3.0"]]),
    "fluke": Environment([[TORCH], ["fluke-fl==0.8.1"]]),
    "flwr": Environment([[TORCH], ["flwr[simulation]==1.41.0"]]),
}


class CannotInstall(Exception):
    """A peer cannot be installed; says why."""


def install(name: str, environment: Environment) -> None:
    """Make a peer's environment anew.

    Raises:
        CannotInstall: if there is no interpreter for it, or pip fails.
    """
    folder = ENVIRONMENTS / name
    shutil.rmtree(folder, ignore_errors=True)
    run([interpreter(environment.pythons), "-m", "venv", str(folder)])
    for requirements in environment.steps:
        run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements])
    (folder / STAMP).write_text(repr(environment.steps))


def interpreter(commands: tuple[str, ...]) -> str:
    """The first of these that runs.

    Raises:
        CannotInstall: if none does.
    """
    if not commands:
        return sys.executable
    for command in commands:
        found = shutil.which(command)
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    raise CannotInstall(f"needs {' or '.join(commands)}")


def run(command: list[str]) -> None:
    """Run a command.

    Raises:
        CannotInstall: with its last word, if it fails.
    """
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise CannotInstall(lines[-1][:200])


def is_installed(name: str) -> bool:
    """Whether the environment is there and of these versions."""
    stamp: Path = ENVIRONMENTS / name / STAMP
    return stamp.exists() and stamp.read_text() == repr(PEERS[name].steps)


def main() -> None:
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS.parent / ".gitignore").write_text("*\n")
    for name in sys.argv[1:] or [name for name in PEERS if not is_installed(name)]:
        print(f"Installing {name} into {os.path.relpath(ENVIRONMENTS / name)}", flush=True)
        reason = ENVIRONMENTS / f"{name}.reason"
        reason.unlink(missing_ok=True)
        try:
            install(name, PEERS[name])
        except CannotInstall as error:
            reason.write_text(str(error))
            print(f"  not installed: {error}", flush=True)


if __name__ == "__main__":
    main()
