"""What rules, compressors, privacy and personal models compute besides plain training is in the ledger.

The registries are read, so that a new method is covered. What really runs is counted by torch's own counter, which
knows nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_fedscale import FederatedStrategy, compressors, local_rules
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.devices import DeviceClass, Population
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.privacy import dp_fed_avg
from tests.unit.test_contracts import example

CLIENTS, EACH, BATCH, WIDTH, HIDDEN, OUT = 4, 12, 4, 6, 8, 3
ELEMENTS = HIDDEN * (WIDTH + 1) + OUT * (HIDDEN + 1)
ROUNDS = 6  # by the last of them nothing is tried out, recorded or verified any more


def made(argument: str, make: Callable[[], Any]) -> dict[str, Any]:
    return {argument: make()}


RULES: dict[str, Callable[[], Any]] = {
    **{name: partial(example, "local_rules", name) for name in local_rules.FACTORIES},
    "scaffold by gradients": lambda: local_rules.scaffold("I"),
}
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: partial(made, "local_rule", make) for name, make in RULES.items()},
    **{f"compressed by {n}": partial(made, "compressor", make) for n, make in compressors.FACTORIES.items()},
    "errors fed back": lambda: {"compressor": compressors.error_feedback(compressors.top_k(0.1))},
    "compressed downwards": lambda: {"downlink_compressor": compressors.qsgd(4)},
    "private": lambda: {"privacy": dp_fed_avg(0.1, 1.0, delta=1e-3), "sampler": "poisson"},
    "personal models": lambda: {"personal": Ditto(0.5)},
    "personal layers": lambda: {"personal": ["net.2.*"]},
}
executors = pytest.mark.parametrize("executor", ["sequential", "vectorized"])


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Independent(pl.Callback):
    """Counts all products that run in the last round, whosever they are."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.records: list[Any] = []

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, cohort: Any) -> None:
        if round == ROUNDS - 1:
            self.counter.__enter__()

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: Any, delta: Any
    ) -> None:
        if record.round == ROUNDS - 1:
            self.counter.__exit__(None, None, None)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: Any) -> None:
        self.records.append(record)


def trained(
    executor: str,
    max_flops: float | None = None,
    *,
    rounds: int = ROUNDS,
    save: Path | None = None,
    resume: Path | None = None,
    **method: Any,
) -> tuple[ComputeAccounting, Independent]:
    generator = torch.Generator().manual_seed(0)
    samples = CLIENTS * EACH
    data = TensorDataset(torch.randn(samples, WIDTH, generator=generator), torch.arange(samples) % OUT)
    accounting, independent = ComputeAccounting(law=None, max_flops=max_flops), Independent()
    strategy = FederatedStrategy(**{"num_clients": CLIENTS, "executor": executor, "verify_executor": False, **method})
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=rounds, logger=False,
        callbacks=[accounting, *([independent] if max_flops is None else [])], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(data, BATCH), ckpt_path=resume, weights_only=None if resume is None else True)
    if save is not None:
        trainer.save_checkpoint(save)
    return accounting, independent


@executors
@pytest.mark.parametrize("name", METHODS)
def test_what_runs_is_what_the_ledger_says(name: str, executor: str) -> None:
    accounting, independent = trained(executor, **METHODS[name]())
    last = independent.records[-1]
    assert last.flops.sum() == independent.counter.get_total_flops() > 0
    assert accounting.ledger.training_flops == sum(record.flops.sum() for record in independent.records)


FORWARD = 2 * (WIDTH * HIDDEN + HIDDEN * OUT)  # of a sample
BACKWARD = 2 * (WIDTH * HIDDEN + 2 * HIDDEN * OUT)  # nobody asks for the gradient of the inputs
ROUND = CLIENTS * EACH * (FORWARD + BACKWARD)
TWICE: dict[str, Callable[[], dict[str, Any]]] = {
    "scaffold by gradients": METHODS["scaffold by gradients"],
    "personal models": METHODS["personal models"],
}


@pytest.mark.parametrize("executor", ["sequential", "vectorized", "auto"])
@pytest.mark.parametrize(("name", "rounds"), [("fed_prox", 4), *((name, 2) for name in TWICE)])
def test_a_budget_pays_for_every_pass(name: str, rounds: int, executor: str) -> None:
    accounting, _ = trained(executor, max_flops=4 * ROUND, **METHODS[name]())
    ledger = accounting.ledger
    assert ledger.updates == rounds
    assert ledger.training_flops == 4 * ROUND
    assert ledger.flops["backward"] == 4 * CLIENTS * EACH * BACKWARD
    assert ledger.clients == dict.fromkeys(range(CLIENTS), ledger.training_flops / CLIENTS)
    # A sample that is computed on again is the same sample.
    assert ledger.tokens == ledger.samples == rounds * CLIENTS * EACH
    assert ledger.steps == 4 * CLIENTS * EACH / BATCH


def by_purpose(name: str | None, executor: str = "sequential") -> dict[str, float]:
    return trained(executor, **({} if name is None else METHODS[name]()))[0].ledger.flops


@pytest.mark.parametrize("name", METHODS)
def test_executors_agree_about_what_is_counted_element_by_element(name: str) -> None:
    one, other = by_purpose(name), by_purpose(name, "vectorized")
    assert one == other
    plain = by_purpose(None)
    acts = name not in ("fed_prox", "personal models", "personal layers")  # upon updates
    assert (one["aggregation"] > plain["aggregation"]) == acts
    if name in ("private", "personal layers"):
        return  # in which other clients, and other parameters, take part
    steps = ROUNDS * CLIENTS * EACH / BATCH
    for_each = {
        "fed_prox": 2.0,  # the distance, and its part of the gradient
        "scaffold": 1.0,
        "scaffold by gradients": 1.0,
        "fed_dyn": 3.0 - 1 / ROUNDS,  # whoever takes part for the first time is pulled, and has nothing to correct yet
        "personal models": 1.0 + 3.0,  # a step more, and its pull
    }.get(name, 0.0)
    assert one["optimizer"] - plain["optimizer"] == pytest.approx(for_each * steps * ELEMENTS)


def test_compressors_that_hold_others_cost_what_these_do_and_more() -> None:
    class Phase:
        critical = False

    inner = compressors.power_sgd(3)
    assert compressors.error_feedback(inner).operations > inner.operations > compressors.power_sgd(1).operations
    either = compressors.phase_driven(Phase(), critical=compressors.top_k(0.1), otherwise=inner)
    assert either.operations == inner.operations
    assert compressors.adaptive().operations > 2 * compressors.top_k(0.1).operations


def test_clients_on_simulated_hardware_take_the_time_of_every_pass() -> None:
    device = DeviceClass("slow", memory=10**12, flops=1e6, memory_bandwidth=1e6, up=float("inf"), down=float("inf"))

    def seconds(**method: Any) -> float:
        population = Population({device: 1.0}, batch_size="loader")
        record = trained("sequential", population=population, **method)[1].records[-1]
        found: float = record.simulated.seconds
        return found

    plain = seconds()
    assert plain > 0
    for method in TWICE.values():
        assert seconds(**method()) == pytest.approx(2 * plain)
    assert seconds(local_epochs=None, local_steps=2, **TWICE["personal models"]()) == pytest.approx(
        2 * seconds(local_epochs=None, local_steps=2)
    )


@executors
def test_an_interrupted_run_has_the_same_ledger(executor: str, tmp_path: Path) -> None:
    whole = trained(executor, **METHODS["scaffold by gradients"]())[0].ledger
    trained(executor, rounds=2, save=tmp_path / "at.ckpt", **METHODS["scaffold by gradients"]())
    resumed = trained(executor, resume=tmp_path / "at.ckpt", **METHODS["scaffold by gradients"]())[0].ledger
    assert resumed.flops == whole.flops
    assert resumed.clients == whole.clients
