"""A project that depends on the package is checked by mypy against the package's own types (`py.typed`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RIGHT = """
from __future__ import annotations

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_fedscale import ClientUpdate, FedBuff, FederatedStrategy, Partition, RoundRecord
from lightning_fedscale import aggregators, compressors, local_rules, privacy, samplers, server
from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase, MaxBatchProbe, ServerEMA
from lightning_fedscale.devices import PerformanceModel, Population, StepTime
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.scaling import Chinchilla, Plan, plan


class Diary(Callback):
    def on_client_end(self, trainer: Trainer, module: LightningModule, update: ClientUpdate) -> None:
        print(update.client, update.loss)

    def on_round_end(self, trainer: Trainer, module: LightningModule, record: RoundRecord) -> None:
        print(record.losses.mean(), record.metrics()["round/drift"])


def half(delta: dict[str, Tensor], state: object, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], object]:
    return {name: 0.5 * value for name, value in delta.items()}, state


partitioner = DirichletPartitioner(10, alpha=0.5)
partitioner.dataset = np.arange(100) % 10
partition: Partition = partitioner.partition
sizes: list[int] = partition.sizes.tolist()

strategy = FederatedStrategy(
    partitioner=partition, clients_per_round=0.5, local_steps=lambda round: 1 + round, sampler=samplers.poisson,
    local_rule=local_rules.fed_prox(mu=0.01), aggregator=aggregators.trimmed_mean(0.2),
    server_optimizer=server.chain(server.trace(0.9), server.scale(0.1)), compressor=compressors.top_k(0.01),
    privacy=privacy.dp_fed_avg(1.0, 1.0, delta=1e-5), mode=FedBuff(), population=Population({"phone": 1.0}),
)
callbacks: list[Callback] = [Diary(), CriticalPhase(), MaxBatchProbe(), ComputeAccounting(), ServerEMA()]
trainer = Trainer(strategy=strategy, callbacks=callbacks)
last: RoundRecord | None = strategy.last_round
planned: Plan = plan(1e14, clients=10, law=Chinchilla())
best: float = Chinchilla().optimal_federated(1e20, clients=10).params
batch: int = PerformanceModel(StepTime(0.02, 0.001), noise_scale=800).best_batch(clients=4, local_steps=5)
"""

WRONG = """
from lightning_fedscale import FederatedStrategy

strategy = FederatedStrategy(num_clients="ten")
last: int = strategy.last_round
"""


def mypy(folder: Path, **sources: str) -> subprocess.CompletedProcess[str]:
    """Check a project of some files with the package as an installed one."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", *(f"{name}.py" for name in sources)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_dependent_project_is_typed(tmp_path: Path) -> None:
    # Together, for most of the time is spent on what both import.
    both = mypy(tmp_path, right=RIGHT, wrong=WRONG)
    assert both.returncode == 1, both.stderr
    *errors, summary = both.stdout.splitlines()
    assert all(line.startswith("wrong.py:") for line in errors), both.stdout
    assert summary.endswith("in 1 file (checked 2 source files)")
    assert 'Argument "num_clients" to "FederatedStrategy" has incompatible type "str"' in both.stdout
    assert "Incompatible types in assignment" in both.stdout
    assert "py.typed" not in both.stdout  # "missing library stubs or py.typed marker"
