"""Do Lightning's own tests pass by rounds? ``python -m tests.lightning_suite PATH [SUBSET ...]``.

PATH is a folder with ``src tests requirements pyproject.toml`` of Lightning's repository at a release; nothing of it is
part of this project. Tests that build a Trainer for one CPU get `FederatedStrategy` with one kept client and one batch
a round (`tests.lightning_suite.plugin`). Those that fail run once more as Lightning means them, since only what passes
so is counted, and once more without what rounds add by design. Every other failure needs a reason
(`tests.lightning_suite.reasons`), or it is a defect. Takes half an hour; what is missing is named, and nothing runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from tests import pythons
from tests.lightning_suite.reasons import SUBSETS, Outcome, judge, read, table

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("cloudpickle", "psutil", "pytest_rerunfailures", "pytest_timeout", "random_order")
SECONDS = 300  # after which a test that trains for ever is ended
# What a plain Trainer on one CPU is not about: other processes, other devices, checkpoints that are not in the tree.
LEFT_OUT = "not ddp and not spawn and not fsdp and not deepspeed and not spike_detection_integration"
IGNORED = ("trainer/connectors/test_accelerator_connector.py", "checkpointing/test_legacy_checkpoints.py")


def missing(path: Path) -> str | None:
    """What there is to be done before anything can run; None if nothing."""
    if not (path / "tests" / "tests_pytorch").is_dir():
        return (
            f"{path} has no tests/tests_pytorch; unpack src, tests, requirements and pyproject.toml of a release there"
        )
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def run(path: Path, mode: str, tests: list[str], folder: Path) -> dict[str, Outcome]:
    """Outcomes by test, in a process of their own; those that the folder has are not made again."""
    outcomes, log = folder / f"{mode}.jsonl", folder / f"{mode}.log"
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(path / "tests")]),
    }
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.lightning_suite.plugin"]
    command += [f"--mode={mode}", f"--outcomes={outcomes}", f"--timeout={SECONDS}", "-k", LEFT_OUT, "-o", "addopts="]
    command += [f"--ignore=tests_pytorch/{name}" for name in IGNORED]
    command += ["--tb=short", "-c", str(path / "pyproject.toml"), "--rootdir", str(path / "tests")]
    command += ["--continue-on-collection-errors", *tests]
    if tests:
        print(f"{mode}: {log}", file=sys.stderr, flush=True)
        log.unlink(missing_ok=True)
        pythons.run_all([pythons.Command(command, environment, str(path / "tests"), str(log), str(log))])
        if not outcomes.exists():
            raise RuntimeError(f"pytest ran no test:\n{log.read_text()[-3000:]}")
    return read(outcomes.read_text()) if outcomes.exists() else {}


def check(path: Path, subsets: list[str], folder: Path) -> int:
    """Run subsets and print their table.

    Returns:
        1 if there is a defect.
    """
    federated = run(path, "federated", [f"tests_pytorch/{p}" for s in subsets for p in SUBSETS[s].split()], folder)
    failed = [name for name, outcome in federated.items() if outcome.failed]
    results = judge(federated, *(run(path, mode, failed, folder) for mode in ("plain", "bare")))
    print(table(results))
    return int(any(result.is_defect for result in results))


def main(arguments: list[str] | None = None) -> int:
    """Run the subsets that were named, else all.

    Returns:
        1 if there is a defect.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.lightning_suite", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("subsets", nargs="*", metavar="SUBSET", help=", ".join(SUBSETS))
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep outcomes, and go on from those that are there"
    )
    given = parser.parse_intermixed_args(arguments)
    if unknown := [name for name in given.subsets if name not in SUBSETS]:
        parser.error(f"{', '.join(unknown)}: no such subset; there are {', '.join(SUBSETS)}")
    path = given.path.resolve()
    if (reason := missing(path)) is not None:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return check(path, given.subsets or list(SUBSETS), folder)


if __name__ == "__main__":
    sys.exit(main())
