"""Runs scenarios in as many processes as its launcher starts; every process saves what it found.

``python train.py FOLDER START_METHOD DEVICES NODES SCENARIO...``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.dist import scenarios


def main(folder: Path, start_method: str, devices: int, nodes: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    calls = scenarios.watch_collectives()
    results = {
        name: scenarios.fit(name, calls, start_method, devices=devices, num_nodes=nodes)
        for name in names
        if devices * nodes >= scenarios.SCENARIOS[name].least_ranks
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(results, folder / f"rank-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()  # so that none goes while another still listens to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
