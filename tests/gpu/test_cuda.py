"""The same laws on a CUDA device. Skipped where there is none; nothing here was ever needed to pass on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fedscale.core.executors import transfer
from lightning_fedscale.core.lightning import client_log, log_series
from lightning_fedscale.types import FloatArray
from tests.laws import reference
from tests.strategies import sequential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def weights(rounds: int = 5, ckpt_path: Path | None = None, **options: Any) -> dict[str, Tensor]:
    trainer_options = {"accelerator": "gpu", "max_epochs": rounds, **options.pop("trainer", {})}
    strategy = sequential(**{"partitioner": reference.unequal_clients(), "clients_per_round": 4, **options})
    module = reference.make_module()
    reference.quiet_trainer(strategy=strategy, **trainer_options).fit(
        module, reference.loader(reference.dataset()), ckpt_path=ckpt_path
    )
    return {name: value.cpu() for name, value in module.state_dict().items()}


def test_agrees_with_the_cpu() -> None:
    module = reference.make_module(dropout=0.0)
    expected = reference.fed_avg(
        module, reference.dataset(), reference.unequal_clients(), rounds=5, clients_per_round=4
    )
    on_device = reference.make_module(dropout=0.0)
    strategy = sequential(partitioner=reference.unequal_clients(), clients_per_round=4)
    reference.quiet_trainer(accelerator="gpu", max_epochs=5, strategy=strategy).fit(
        on_device, reference.loader(reference.dataset())
    )
    got = {name: value.cpu() for name, value in on_device.state_dict().items()}
    assert reference.difference(got, expected) < 1e-4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_same_seed_same_bits_with_dropout(precision: str, client_optimizer: str) -> None:
    options: dict[str, Any] = {
        "trainer": {"precision": precision},
        "client_optimizer": client_optimizer,
        "local_steps": 5,
    }
    first, second = weights(**options), weights(**options)
    assert reference.difference(first, second) == 0.0


def test_resume_equals_never_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"client_optimizer": "keep", "local_steps": 5}
    saver = ModelCheckpoint(tmp_path, save_last=True)
    weights(3, trainer={"enable_checkpointing": True, "callbacks": [saver]}, **options)
    resumed = weights(6, ckpt_path=tmp_path / "last.ckpt", **options)
    assert reference.difference(resumed, weights(6, **options)) == 0.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_equal_one() -> None:
    # fork cannot follow CUDA; spawn brings the weights back.
    two = weights(trainer={"devices": 2}, start_method="spawn")
    assert reference.difference(two, weights()) == 0.0


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.parametrize("options", [{}, {"cache_dataset": False}, {"clients_per_wave": 2}], ids=str)
def test_the_executor_does_not_matter(client_optimizer: str, options: dict[str, Any]) -> None:
    options = {"client_optimizer": client_optimizer, **options}
    vectorized = weights(**options, executor="vectorized")
    assert reference.difference(vectorized, weights(**options)) < 1e-4
    assert reference.difference(vectorized, weights(**options, executor="vectorized")) == 0.0


@pytest.mark.parametrize("workers", [0, 2])
def test_ways_of_the_data_to_the_device(workers: int) -> None:
    """Kept there, brought batch by batch, or on its way ahead of use from worker processes."""

    def trained(cached: bool | str) -> dict[str, Tensor]:
        module = reference.make_module()
        strategy = sequential(partitioner=reference.unequal_clients(), cache_dataset=cached)
        train = DataLoader(reference.dataset(), batch_size=8, shuffle=True, num_workers=workers)
        reference.quiet_trainer(accelerator="gpu", max_epochs=3, strategy=strategy).fit(module, train)
        return {name: value.cpu() for name, value in module.state_dict().items()}

    kept = trained("auto")
    for cached in (True, False):
        assert reference.difference(trained(cached), kept) == 0.0


@dataclass
class Batch:
    """Of a type in which torch does not find the tensors."""

    x: Tensor


@pytest.mark.parametrize("make", [lambda x: {"x": x, "name": "a"}, Batch], ids=["dict", "dataclass"])
def test_batches_on_their_way_ahead_are_whole(make: Callable[[Tensor], Any]) -> None:
    device = torch.device("cuda", 0)
    heavy, wrong = torch.randn(4096, 4096, device=device), list[Tensor]()
    result = torch.empty_like(heavy)
    batches = (make(torch.full((1000, 1000), float(i))) for i in range(40))
    for i, batch in enumerate(transfer._ahead(batches, device)):
        x = batch.x if isinstance(batch, Batch) else batch["x"]
        assert x.device == device
        for _ in range(5):  # the device falls behind, and later batches are copied while it still needs this one
            torch.mm(heavy, heavy, out=result)
        wrong.append((x != i).any())
        del batch, x
    assert not bool(torch.stack(wrong).any())


def test_logged_values_stay_on_the_device_until_the_round_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read(values: list[Any], device: torch.device) -> FloatArray:
        reads.append(len(values))
        return log_series.read_numbers(values, device)

    monkeypatch.setattr(client_log, "read_numbers", read)
    on_device: list[float] = []
    on_host: list[float] = []
    for accelerator, found in (("gpu", on_device), ("cpu", on_host)):
        strategy = sequential(partitioner=reference.unequal_clients())
        trainer = reference.quiet_trainer(accelerator=accelerator, max_epochs=3, strategy=strategy)
        trainer.fit(reference.make_module(dropout=0.0), reference.loader(reference.dataset()))
        found.append(float(trainer.callback_metrics["train_loss"]))
    assert on_device == pytest.approx(on_host, rel=1e-4)
    # The very first value goes through Lightning; from then on there is one read a round.
    assert len(reads) == 2 * 3
