"""Trains recipes in as many processes as its launcher starts; every process saves what it found.

``python ranks.py FOLDER DEVICES EXECUTOR SEED...``
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.fuzz.check import draw_of
from tests.fuzz.runs import run


def main(folder: Path, devices: int, executor: str, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    outcomes = {seed: run(draw_of(seed), executor, devices=devices) for seed in seeds}
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(outcomes, folder / f"rank-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [int(seed) for seed in sys.argv[4:]])
