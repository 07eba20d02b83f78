"""What `ComputeAccounting` makes of modules and batches that no copy could be run on: it counts what ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting

SAMPLES, BATCH, WIDTH, OUT = 50, 8, 6, 3  # six batches of 8 and one of 2
FORWARD = 2 * WIDTH * OUT  # of a sample; the gradient of the weights costs the same, and nobody asks for another
STRATEGIES = ("plain", "sequential", "vectorized", "auto")


def strategy_of(name: str) -> Any:
    return "auto" if name == "plain" else FederatedStrategy(num_clients=3, executor=name)  # type: ignore[arg-type]


def fit(module: pl.LightningModule, loader: Any, strategy: str, *more: Any, epochs: int = 3, **options: Any) -> Any:
    """The ledger of a run, in which every warning of the callback's own is an error."""
    accounting = ComputeAccounting(law=None, **options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy_of(strategy), max_epochs=epochs, logger=False,
        callbacks=[accounting, *more], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader)
    return accounting


class Rows(Dataset[dict[str, Any]]):
    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(samples, WIDTH, generator=generator), torch.arange(samples) % OUT

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"source": f"row-{index}", "x": self.x[index], "labels": self.y[index]}


class Graphs:
    """A batch that nothing opens."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> Graphs:
        return Graphs(self.x.to(device), self.y.to(device))

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Graphs:
        return cls(torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows]))


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(WIDTH, OUT)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["x"], batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch["x"], batch["labels"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Pops(Net):
    """Its step takes apart the batch that it is given."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return self.loss(batch.pop("x"), labels)


class Opens(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch.x, batch.y)


class Holds(Net):
    """What cannot be copied is in it, and which of its rows count is in the batch's contents."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = (each for each in "")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        kept = batch["labels"] >= 0
        if int(kept.sum()) == 0:
            raise ValueError("there is not a row in this batch")
        return self.loss(batch["x"][kept], batch["labels"][kept])


class Measured(Net):
    """Its loss is a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.measure = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found: Tensor = self.measure(self.net(batch["x"]).sum(1), batch["labels"].float())
        return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("module", "collate"), [(Net, None), (Pops, None), (Opens, Graphs.of), (Holds, None), (Measured, None)]
)
def test_what_ran_is_counted(strategy: str, module: type[Net], collate: Any, recwarn: pytest.WarningsRecorder) -> None:
    calls: list[int] = []

    class Watched(module):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            found: Tensor = super().training_step(batch, batch_idx)
            return found

    ledger = fit(Watched(), DataLoader(Rows(), BATCH, collate_fn=collate), strategy).ledger
    assert ledger.flops["forward"] == ledger.flops["backward"] == 3 * SAMPLES * FORWARD
    assert ledger.tokens == ledger.samples == 3 * SAMPLES
    assert ledger.average_params == WIDTH * OUT + OUT
    assert ledger.error == 0
    assert ledger.counted > 0
    assert not [str(w.message) for w in recwarn if "ComputeAccounting" in str(w.message)]
    if strategy in ("plain", "sequential"):
        assert len(calls) == ledger.steps > ledger.counted  # and none of its own


class Adversaries(Net):
    """A generator that is trained in every fifth batch, by hand, and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.ran = nn.Linear(OUT, 1), [0, 0]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        critic, generator = optimizers
        self.ran[0] += 1
        fake = self.net(batch["x"]).detach()
        critic.zero_grad()
        self.manual_backward(self.critic(fake).mean())
        critic.step()
        if batch_idx % 5 == 0:
            self.ran[1] += 1
            generator.zero_grad()
            self.manual_backward(self.critic(self.net(batch["x"])).mean())
            generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.critic, self.net)]


@pytest.mark.parametrize("strategy", ["plain", "sequential"])
def test_steps_that_go_by_their_number_have_an_interval(strategy: str) -> None:
    module = Adversaries()
    ledger = fit(module, DataLoader(Rows(12 * BATCH), BATCH), strategy, epochs=40).ledger
    ours, critics = BATCH * 2 * WIDTH * OUT, BATCH * 2 * OUT
    steps, both = module.ran
    truth = steps * (ours + 2 * critics) + both * (ours + critics + critics + critics + ours)
    low, high = ledger.flops_interval
    assert low < truth < high
    assert abs(ledger.training_flops / truth - 1) < 0.1
    assert 0 < ledger.counted < 0.6 * ledger.steps


class Elementwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Identity(), nn.Parameter(torch.ones(WIDTH))  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.scale * batch["x"]).square().mean()


class Spectral(Elementwise):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.fft.rfft(self.scale * batch["x"]).abs().mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("module", "what"), [(Elementwise, "no matrix multiplication"), (Spectral, r"only .*fft")])
def test_where_nothing_can_be_counted_that_is_said(strategy: str, module: type[Net], what: str) -> None:
    loader = DataLoader(Rows(), BATCH)
    with pytest.warns(UserWarning, match=f"unknown, since the steps of {module.__name__} contain {what}"):
        fit(module(), loader, strategy)
    with pytest.raises(
        ValueError,
        match=rf"max_flops=1e\+09 is never reached, .*{what}.* pass max_steps",
    ):
        fit(module(), loader, strategy, max_flops=1e9)


def test_where_nothing_can_be_counted_a_resumed_run_says_why(tmp_path: Path) -> None:
    def train(steps: int, path: Path | None, **options: Any) -> pl.Trainer:
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[ComputeAccounting(law=None, **options)], accelerator="cpu", devices=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Spectral(), DataLoader(Rows(), BATCH), ckpt_path=path, weights_only=True)
        return trainer

    with pytest.warns(UserWarning, match="unknown, since the steps of Spectral contain only"):
        train(6, None).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"max_flops=1e\+09 is never reached, .*only .*fft"):
        train(8, tmp_path / "run.ckpt", max_flops=1e9)


def test_clients_evaluations_are_counted_as_they_run() -> None:
    accounting = ComputeAccounting(law=None)
    metrics = ClientMetrics()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy_of("sequential"), max_epochs=2, logger=False,
        callbacks=[accounting, metrics], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(Rows(), BATCH), DataLoader(Rows(30), 10))
    # After both rounds the loader's thirty rows, and once more as the clients' own, shared out among them.
    assert accounting.ledger.flops["evaluation"] == 2 * (30 + 30) * FORWARD


@pytest.mark.parametrize("strategy", ["plain", "sequential"])
def test_a_resumed_run_counts_on_with_what_was_known(strategy: str, tmp_path: Path) -> None:
    """Also where costs vary: the same ledger to the last bit."""

    def run(epochs: int, checkpoint: str | None = None) -> tuple[ComputeAccounting, pl.Trainer]:
        accounting = ComputeAccounting(law=None)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, strategy=strategy_of(strategy), max_epochs=epochs, logger=False,
            callbacks=[accounting], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Adversaries(), DataLoader(Rows(12 * BATCH), BATCH), ckpt_path=checkpoint, weights_only=True)
        return accounting, trainer

    whole, _ = run(30)
    _, first = run(12)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(30, str(tmp_path / "half.ckpt"))
    mine, theirs = resumed.ledger.state_dict(), whole.ledger.state_dict()
    assert {**mine, "seconds": 0, "energy": 0, "meters": 0} == {**theirs, "seconds": 0, "energy": 0, "meters": 0}
    assert theirs["counted"] < theirs["steps"]
