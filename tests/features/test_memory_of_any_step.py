"""The memory model of any training step; nothing is left behind."""

from __future__ import annotations

import random
import threading
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, MetricCollection

from lightning_fedscale.devices import SIMULATED, estimate_memory
from tests.memory_models import model_of, tracked
from tests.networks import GPT, Classifier, mlp, tokens, vectors


class Demanding(Classifier):
    """Uses much of what a training step may use."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10)))
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.scores = MetricCollection({"a": Accuracy("multiclass", num_classes=10)}, prefix="train/")
        self.seen: list[Tensor] = []
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        inputs, targets = batch
        outputs = self.network(inputs + torch.randn_like(inputs) * random.random() * np.random.rand())
        loss = nn.functional.cross_entropy(outputs, targets)
        self.accuracy(outputs, targets)
        self.log("accuracy", self.accuracy, on_step=True)
        self.log_dict(self.scores(outputs, targets))
        logger: Any = self.logger
        logger.experiment.add_scalar("x", loss, self.trainer.global_step)
        self.seen.append(loss)
        self.steps += 1
        return {"loss": loss, "outputs": outputs}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        total = self.trainer.estimated_stepping_batches
        assert isinstance(total, int)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def everything(module: nn.Module) -> list[Any]:
    drawn = np.random.get_state(legacy=False)["state"]["key"]
    states = [*module.state_dict().values(), torch.get_rng_state(), torch.from_numpy(drawn.copy())]
    return [*(state.clone() for state in states), random.getstate(), module.training]


def test_nothing_is_left_behind() -> None:
    module, batch = Demanding(), vectors(4)
    module.eval()
    before, shapes = everything(module), [leaf.clone() for leaf in batch]
    model = estimate_memory(module, batch)
    assert model.exact
    model.max_batch(10**8)
    for old, new in zip(before, everything(module), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    assert all(map(torch.equal, batch, shapes))
    assert module.seen == []
    assert module.steps == 0
    assert module._trainer is None
    assert "log" not in vars(module)
    assert all(p.grad is None for p in module.parameters())


class ByHand(Classifier):
    """Manual optimization with two optimizers."""

    network: nn.Sequential

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = cast(list[Any], self.optimizers())
        inputs, targets = batch
        for optimizer in (first, second):
            with optimizer.toggle_model():
                loss = nn.functional.cross_entropy(self.network(inputs), targets)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5)
                optimizer.step()
        cast(Any, self.lr_schedulers()).step()

    def configure_optimizers(self) -> Any:
        parts = self.network[:2].parameters(), self.network[2:].parameters()
        optimizers = [torch.optim.Adam(part) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


def test_manual_optimization() -> None:
    model = estimate_memory(ByHand(), vectors(2))
    assert model.exact
    parameters = model.breakdown(4)["parameters"]
    assert model.breakdown(4)["optimizer state"] == pytest.approx(2 * parameters, rel=0.01)


class Selective(Classifier):
    """Learns from some of the samples only: which, depends on the data."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        chosen = inputs[:, 0] > -10
        if chosen.sum() > 0:
            inputs, targets = inputs[chosen], targets[chosen]
        return nn.functional.cross_entropy(self.network(inputs), targets)


def test_the_reason_for_real_tensors_is_not_that_batch_norm_refuses_one_sample() -> None:
    network = mlp()
    model = estimate_memory(Selective(nn.Sequential(nn.BatchNorm1d(vectors(2)[0].shape[1]), network)), vectors(2))
    assert model.smallest == 2
    assert "DataDependent" in model.fallback


def test_data_dependent_modules_are_probed_for_real() -> None:
    module = Selective(mlp())
    model = estimate_memory(module, vectors(2))
    assert not model.exact
    assert "DataDependent" in model.fallback
    assert model.assumed == ""  # of products nothing is
    before = everything(module)
    batch = model.max_batch(3 * 10**6, headroom=0.0)
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, everything(module), strict=True)
    )
    assert model.peak(batch) <= 3 * 10**6 < model.peak(batch + 1)
    assert model.peak(batch) == pytest.approx(tracked(module, vectors(batch)), rel=0.02)


def test_collectives_concern_nobody_else() -> None:
    class Talking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.trainer.strategy.barrier()
            return self.trainer.strategy.reduce(self.all_gather(loss)).mean()

    assert estimate_memory(Talking(mlp()), vectors(2)).exact


def test_modules_that_cannot_be_copied() -> None:
    module = Classifier(mlp())
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"module=Classifier cannot be copied.*lock"):
        estimate_memory(module, vectors(2))


def test_the_modules_own_error_is_shown() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        estimate_memory(Broken(mlp()), vectors(2))


def test_tied_weights_and_meta_modules() -> None:
    with torch.device("meta"):
        there = Classifier(GPT(layers=1))
    predicted = estimate_memory(there, tokens(2), extras=SIMULATED), model_of("gpt")
    assert predicted[0].peak(8) == predicted[1].peak(8)
    assert predicted[0].breakdown(8) == predicted[1].breakdown(8)


@pytest.mark.slow
def test_large_models_take_seconds_and_no_memory() -> None:
    with torch.device("meta"):
        large = Classifier(GPT(vocabulary=32_000, length=1024, width=4096, layers=4))
    assert sum(p.numel() for p in large.parameters()) > 9 * 10**8
    model = estimate_memory(large, tokens(1, 1024))
    assert model.breakdown(1)["optimizer state"] == pytest.approx(8 * model.trainable, rel=0.01)
    assert model.peak(4) > 16 * model.trainable
