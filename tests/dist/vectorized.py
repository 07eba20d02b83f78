"""Vectorized clients on several ranks: ``python vectorized.py EXECUTOR RANKS FOLDER`` saves how each rank ends.

EXECUTOR is the strategy's, or "eager" for an "auto" that vectorizes whatever it can, or "torn" for an "auto" whose
ranks are machines that would choose differently.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import torch

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.executors import auto
from lightning_fedscale.core.executors.machine import Machine
from lightning_fedscale.core.executors.vectorized import executor as vectorized
from tests import clock
from tests.laws import reference


def weights(executor: str, ranks: int, folder: Path) -> None:
    module = reference.make_module(torch.float64, dropout=0.3)
    strategy = FederatedStrategy(
        partitioner=reference.equal_clients(7, 29) if executor == "torn" else reference.unequal_clients(),
        clients_per_round=6,
        local_epochs=2,
        client_optimizer="keep",
        executor="auto" if executor in ("eager", "torn") else executor,  # type: ignore[arg-type]
    )
    trainer = reference.quiet_trainer(devices=ranks, max_epochs=4, strategy=strategy)
    trainer.fit(module, reference.loader(reference.dataset(dtype=torch.float64)))
    assert strategy._federation is not None
    choice = strategy._federation.fit.executor
    own = None if choice._forecast is None else choice._forecast.gain
    state = {"weights": dict(module.state_dict()), "kind": choice.kind, "gain": own}
    torch.save(state, folder / f"{executor}-{ranks}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    clock.install()
    if sys.argv[1] == "eager":
        auto._MARGIN = 0.0
    if sys.argv[1] == "torn":
        auto._MARGIN = 1.0
        slow_memory = os.environ["LOCAL_RANK"] == "0"
        machine = Machine(1e-6, 1e-15, 4e-9 if slow_memory else 1e-15)
        mock.patch.object(vectorized, "machine_of", return_value=machine).start()
    weights(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads can otherwise abort the process as it exits
