"""The command line: ``python -m benchmarks.gpu``, or ``make gpu``."""

from __future__ import annotations

import os

# cuBLAS reads it when it starts, and is deterministic with it only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import argparse
import logging
import warnings
from pathlib import Path

import torch

from benchmarks.gpu import laws, observers, only, probe, speed, waits
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import FAIL, NOT_SHOWN, Record

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu.md"
PARTS = {
    "What only a device shows": (only.run, 40),
    "The laws": (laws.run, 140),
    "Waits for the device": (waits.run, 170),
    "The batch probe": (probe.run, 290),
    "Speed": (speed.run, 470),
    "Callbacks": (observers.run, 510),
}
"""Each part, and the second of 520 at which it ends at the latest."""
WHOLE = 520


def main(arguments: list[str] | None = None) -> None:
    """Run all parts and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What only a CUDA device can show.")
    parser.add_argument("--seconds", type=float, default=float(WHOLE), help="budget of the whole run")
    parser.add_argument("--output", type=Path, default=RESULT, help="the page; JSON is written beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the script itself")
    parser.add_argument("--fast", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run.")
        return
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = Machine(options.device, options.fast)
    record = Record(options.output, options.seconds, machine.facts())
    for title, (run, until) in PARTS.items():
        with record.part(title, until / WHOLE):
            run(record, machine)
    print("\nNot shown by one device:", *NOT_SHOWN, sep="\n- ")
    failed = sum(row.verdict == FAIL for row in record.rows)
    print(f"\n{len(record.rows)} checks, {failed} failed. Written: {options.output}")


if __name__ == "__main__":
    main()
