"""What only a device shows: types that are mixed, batches on their way, and the tests that need a device."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Found, Record
from lightning_fedscale.core.executors import transfer
from lightning_fedscale.utils.flat_view import FlatView

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Batch:
    """Of a type in which torch does not find the tensors."""

    x: Tensor


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part."""
    record.check("vector of float32, float64, bfloat16", "all equal", lambda: mixed_types(machine.device))
    for kind in ("dict", "dataclass"):
        name = f"batches ahead of use, {kind}"
        if machine.cuda:
            record.check(name, "0 of 40 overwritten", partial(batches_ahead, kind, machine.device))
        else:
            record.skip(name, "the CPU has no streams")
    if machine.cuda:
        second = {"FEDSCALE_SECOND_DEVICE": "1"}
        record.check("tests/second_device", "all pass", lambda: tests(["tests/second_device"], second))
    else:
        record.skip("tests/second_device", "tests/features/test_second_device.py runs them on the CPU")
    gpu = ["tests/gpu", "--deselect", "tests/gpu/test_probe.py", *([] if machine.cuda else ["--collect-only"])]
    record.check("tests/gpu without its probe", "all pass", lambda: tests(gpu, {}))


def mixed_types(device: torch.device) -> Found:
    """Write a vector to tensors of three types, which torch before 2.11 did wrongly in one call."""
    tensors = [
        torch.ones(1000, device=device),
        torch.ones(1000, dtype=torch.float64, device=device),
        torch.ones(7, dtype=torch.bfloat16, device=device),
    ]
    view = FlatView(tensors[:1], tensors[1:])
    view.write(view.read().mul_(2))
    right = [bool((tensor == 2).all()) for tensor in tensors]
    return Found(str(right), all(right))


def batches_ahead(kind: str, device: torch.device) -> Found:
    """Count the batches that a later copy has overwritten while the device still read them."""
    heavy, wrong = torch.randn(8192, 8192, device=device), list[Tensor]()
    result = torch.empty_like(heavy)
    made: list[Any] = [torch.full((1 << 20,), float(i)) for i in range(40)]
    batches = ({"x": x} if kind == "dict" else Batch(x) for x in made)
    for i, batch in enumerate(transfer._ahead(batches, device)):
        x = batch.x if isinstance(batch, Batch) else batch["x"]
        for _ in range(5):  # the device falls behind the host
            torch.mm(heavy, heavy, out=result)
        wrong.append((x != i).any())
        del batch, x
    count = int(torch.stack(wrong).sum())
    return Found(f"{count} of {len(wrong)} overwritten", count == 0 and len(wrong) == 40)


def tests(arguments: list[str], environment: dict[str, str]) -> Found:
    """Run tests in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    failed = [line.removeprefix("FAILED ")[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Found("; ".join([*(lines[-1:] or ["no output"]), *failed[:10]]), done.returncode == 0)
