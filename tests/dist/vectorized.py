"""Vectorized clients on several ranks: ``python vectorized.py EXECUTOR RANKS FOLDER`` saves how each rank ends."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_fedscale import FederatedStrategy
from tests import clock
from tests.laws import reference


def weights(executor: str, ranks: int, folder: Path) -> None:
    module = reference.make_module(torch.float64, dropout=0.3)
    strategy = FederatedStrategy(
        partitioner=reference.unequal_clients(),
        clients_per_round=6,
        local_epochs=2,
        client_optimizer="keep",
        executor=executor,  # type: ignore[arg-type]
    )
    trainer = reference.quiet_trainer(devices=ranks, max_epochs=4, strategy=strategy)
    trainer.fit(module, reference.loader(reference.dataset(dtype=torch.float64)))
    assert strategy._federation is not None
    state = {"weights": dict(module.state_dict()), "kind": strategy._federation.fit.executor.kind}
    torch.save(state, folder / f"{executor}-{ranks}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    clock.install()
    weights(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads can otherwise abort the process as it exits
