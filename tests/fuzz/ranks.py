"""Trains recipes in as many processes as its launcher starts; every process saves what it found.

``python ranks.py FOLDER DEVICES EXECUTOR:SEED...``
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.fuzz.check import short
from tests.fuzz.runs import run


def main(folder: Path, devices: int, executors: dict[int, str]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    outcomes = {seed: run(short(seed), executor, devices=devices) for seed, executor in executors.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(outcomes, folder / f"rank-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    given = (argument.split(":") for argument in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {int(seed): executor for executor, seed in given})
