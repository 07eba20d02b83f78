"""Federated runs on simulated hardware."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.compressors import error_feedback, top_k
from lightning_fedscale.devices import ON_CLIENT, DeviceClass, Population, estimate_memory
from lightning_fedscale.devices.communication import star
from lightning_fedscale.devices.performance import roofline
from lightning_fedscale.local_rules import Ditto, scaffold
from lightning_fedscale.partitioners import SizePartitioner
from tests.networks import Classifier, mlp, vectors

CLIENTS, SAMPLES = 8, 800


class Watched(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp(), torch.optim.SGD, lr=0.05)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


torch.manual_seed(0)
START = Watched()
DATA = TensorDataset(*vectors(SAMPLES))
MODEL = estimate_memory(START, DATA[:2], extras=ON_CLIENT)
SMALL = DeviceClass("small", MODEL.peak(20), 1e9, 1e9, 1e6, 1e6)
LARGE = DeviceClass("large", MODEL.peak(50), 1e10, 1e10, 1e7, 1e7)


def mixed(**options: Any) -> Population:
    return Population({SMALL: 0.5, LARGE: 0.5}, headroom=0.0, **options)


def fit(population: Population | None, **options: Any) -> tuple[pl.Trainer, Watched, list[Any]]:
    module, records = copy.deepcopy(START), []

    class Keep(pl.Callback):
        def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: Any) -> None:
            records.append(record)

    of_trainer = {
        name: options.pop(name) for name in ("max_epochs", "logger", "callbacks", "ckpt_path") if name in options
    }
    ckpt_path = of_trainer.pop("ckpt_path", None)
    loader = options.pop("loader", DataLoader(DATA, 10, shuffle=True))
    of_strategy = {"num_clients": CLIENTS, "population": population, "executor": "sequential", **options}
    strategy = FederatedStrategy(**of_strategy)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Keep(), *of_trainer.pop("callbacks", [])], enable_checkpointing=ckpt_path is not None
        or bool(options.get("save")), **{"max_epochs": 3, "logger": False, **of_trainer},
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module, records


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_every_client_trains_with_the_batch_of_its_device() -> None:
    _, module, records = fit(mixed(), max_epochs=1)
    # 100 samples each: five batches of 20 on the four small ones, two of 50 on the four large ones.
    assert Counter(module.sizes) == {20: 20, 50: 8}
    (record,) = records
    kinds = mixed().assign(CLIENTS)
    assert record.simulated.batch_sizes.tolist() == [(20, 50)[kind] for kind in kinds]
    assert record.local_steps.tolist() == [(5, 2)[kind] for kind in kinds]


def test_simulated_time_by_hand() -> None:
    _, _, records = fit(mixed(), max_epochs=2, local_epochs=2)
    message = MODEL.parameter_bytes
    expected = []
    for kind in mixed().assign(CLIENTS):
        device, batch, steps = ((SMALL, 20, 10), (LARGE, 50, 4))[kind]
        compute = steps * roofline(MODEL.cost(batch), device)
        expected.append(star(message, device.up, device.down, device.latency) + compute)
    for number, record in enumerate(records):
        assert record.simulated.client_seconds == pytest.approx(expected)
        assert record.simulated.seconds == pytest.approx(max(expected))
        assert record.simulated.total == pytest.approx((number + 1) * max(expected))
        assert record.simulated.dropped == ()


def test_a_deadline_drops_the_slow_who_then_do_not_train() -> None:
    _, _, (all_,) = fit(mixed(), max_epochs=1)
    kinds = mixed().assign(CLIENTS)
    between = float(np.mean([all_.simulated.client_seconds[kinds == kind].mean() for kind in (0, 1)]))
    trainer, module, records = fit(mixed(deadline=between), max_epochs=1)
    assert Counter(module.sizes) == {50: 8}
    (record,) = records
    assert record.clients.tolist() == np.flatnonzero(kinds == 1).tolist()
    assert record.simulated.dropped == tuple(np.flatnonzero(kinds == 0))
    assert record.simulated.seconds == between  # the server waits until then
    assert trainer.callback_metrics["round/dropped"] == 4
    assert record.metrics()["round/clients"] == 4


def test_without_anybody_in_time_the_server_waits_for_the_first() -> None:
    _, _, records = fit(mixed(deadline=1e-9, min_clients=2), max_epochs=1)
    assert len(records[0].clients) == 2
    assert (mixed().assign(CLIENTS)[records[0].clients] == 1).all()
    assert records[0].simulated.seconds == records[0].simulated.client_seconds.max()


def test_over_selection_takes_the_fastest() -> None:
    _, _, records = fit(mixed(over_selection=2.0), clients_per_round=4, max_epochs=6)
    kinds = mixed().assign(CLIENTS)
    for record in records:
        assert len(record.clients) == 4
        assert (kinds[record.clients] == 1).all()  # all eight are asked, and the four large ones are faster
    plain = fit(mixed(), clients_per_round=4, max_epochs=6)[-1]
    assert records[-1].simulated.total < plain[-1].simulated.total


def test_clients_that_cannot_be_reached() -> None:
    shy = DeviceClass("shy", MODEL.peak(20), 1e9, 1e9, 1e6, 1e6, availability=0.5)
    _, _, records = fit(Population({shy: 1}, headroom=0.0), max_epochs=30)
    took_part = [len(record.clients) for record in records]
    assert 1 <= min(took_part) < max(took_part) < 8 + 1
    assert 3 < np.mean(took_part) < 5
    assert all(len(record.clients) + len(record.simulated.dropped) == CLIENTS for record in records)


def test_batches_of_the_loader_change_nothing_but_time() -> None:
    plain = fit(None)[1]
    simulated = fit(mixed(batch_size="loader"))[1]
    assert torch.equal(weights(plain), weights(simulated))


@pytest.mark.parametrize("options", [{}, {"local_steps": 3}])
def test_tails_that_are_dropped_leave_nobody_without_a_batch(options: dict[str, Any]) -> None:
    loader = DataLoader(DATA, 10, shuffle=True, drop_last=True)
    sizes = SizePartitioner([12, 300, 88, 400])
    population = Population({SMALL: 0.5, LARGE: 0.5}, headroom=0.0)
    _, module, records = fit(population, max_epochs=1, loader=loader, partitioner=sizes, num_clients=4, **options)
    assert set(module.sizes) == {12}  # what the smallest client can fill
    assert len(records[0].clients) == 4


@pytest.mark.parametrize("options", [{}, {"local_steps": 3}, {"client_optimizer": "keep"}])
def test_executors_agree(options: dict[str, Any]) -> None:
    one, other = [
        weights(fit(mixed(over_selection=1.5), clients_per_round=4, executor=executor, **options)[1])
        for executor in ("sequential", "vectorized")
    ]
    assert torch.allclose(one, other, atol=1e-6)


def test_interrupted_runs_go_on(tmp_path: Path) -> None:
    population = {"over_selection": 1.5, "deadline": 1.0}
    whole = fit(mixed(**population), clients_per_round=4, max_epochs=6)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(mixed(**population), clients_per_round=4, max_epochs=3, callbacks=[saver], ckpt_path="last")
    again = fit(mixed(**population), clients_per_round=4, max_epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(whole[1]), weights(again[1]))
    assert whole[2][-1].simulated.total == again[2][-1].simulated.total
    assert again[2][0].simulated.total == pytest.approx(whole[2][3].simulated.total)


def test_another_population_is_another_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(mixed(), max_epochs=1, callbacks=[saver], ckpt_path="last")
    with pytest.warns(UserWarning, match=r"population=.*differs"):
        fit(mixed(seed=1), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


def test_logged_and_tabulated(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, *_ = fit(mixed(), logger=logger)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert all(name in text for name in ("round/simulated_seconds", "round/simulated_total", "round/dropped"))
    assert isinstance(trainer.strategy, FederatedStrategy)
    table = trainer.strategy.population_table()
    assert table["batch_size"].to_dict() == {"small": 20, "large": 50}
    assert table["clients"].to_dict() == {"small": 4, "large": 4}
    plain, _, records = fit(None, max_epochs=1)
    assert records[0].simulated is None
    assert "round/simulated_seconds" not in plain.callback_metrics
    assert isinstance(plain.strategy, FederatedStrategy)
    with pytest.raises(RuntimeError, match="population="):
        plain.strategy.population_table()


# ---- what cannot be


def test_a_device_that_does_not_hold_the_model() -> None:
    tiny = DeviceClass("tiny", 1000, 1e9, 1e9, 1e6, 1e6)
    with pytest.raises(ValueError, match=r"device class 'tiny': .*a step with one sample takes .* largest part is"):
        fit(Population({tiny: 1}))


def test_a_batch_sampler_of_ones_own() -> None:
    class Own(BatchSampler):
        pass

    loader = DataLoader(DATA, batch_sampler=Own(RandomSampler(DATA), 10, False))
    with pytest.raises(ValueError, match=r"population: batch_size='largest' .*batch_sampler"):
        fit(mixed(), loader=loader)
    _, module, records = fit(mixed(batch_size="loader"), loader=loader, max_epochs=1)
    assert set(module.sizes) == {10}
    assert records[0].simulated.seconds > 0


def test_the_fastest_batch_for_steps_that_change_is_refused() -> None:
    population = Population({SMALL: 0.5, LARGE: 0.5}, batch_size="fastest")
    with pytest.raises(ValueError, match=r"population: batch_size='fastest' .*local_steps="):
        fit(population, local_steps=lambda round: 1 + round % 2)
    *_, records = fit(mixed(), local_steps=lambda round: 1 + round % 2, max_epochs=2)
    assert [set(record.local_steps.tolist()) for record in records] == [{1}, {2}]


def test_not_a_population() -> None:
    with pytest.raises(TypeError, match=r"population=\{'phone': 1\}"):
        FederatedStrategy(population={"phone": 1})  # type: ignore[arg-type]


def test_compressed_messages_take_less_time() -> None:
    loader = mixed(batch_size="loader")
    _, _, plain = fit(loader, max_epochs=1)
    _, _, up = fit(loader, max_epochs=1, compressor=top_k(0.1))
    _, _, both = fit(loader, max_epochs=1, compressor=top_k(0.1), downlink_compressor=top_k(0.1))
    dense, sent = plain[0].upload_bytes / CLIENTS, up[0].upload_bytes / CLIENTS
    assert sent < 0.2 * dense
    assert both[0].download_bytes / CLIENTS == sent
    speeds = np.array([1e6 if size == 20 else 1e7 for size in (20, 50)])
    saved = plain[0].simulated.client_seconds - up[0].simulated.client_seconds
    again = up[0].simulated.client_seconds - both[0].simulated.client_seconds
    for found in (saved, again):  # the same link both ways
        assert set(np.round(found * 1e9).tolist()) == set(np.round((dense - sent) / speeds * 1e9).tolist())


def test_what_rules_keep_on_a_device_leaves_less_room() -> None:
    roomy = Population({DeviceClass("roomy", 4 * MODEL.peak(20), 1e9, 1e9, 1e6, 1e6): 1.0}, headroom=0.0)
    rules = {"personal": Ditto(0.1), "compressor": error_feedback(top_k(0.1)), "local_rule": scaffold("I")}
    loader = DataLoader(DATA, 1, shuffle=True)
    partitioner = SizePartitioner(partition_sizes=[SAMPLES // 2] * 2)
    common = {"max_epochs": 1, "num_clients": 2, "partitioner": partitioner, "loader": loader}
    (_, free, _), (_, full, _) = fit(roomy, **common), fit(roomy, **common, **rules)
    assert max(full.sizes) < max(free.sizes)
