"""`ComputeAccounting` in whole runs: exact counts, by any executor, after any interruption, and an honest position."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.scaling import Chinchilla, Farseer, Rosenfeld, Unfitted, position_of
from tests.laws import reference
from tests.networks import GPT, Classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")

FORWARD, BACKWARD = 2 * (12 * 16 + 16 * 4), 2 * (12 * 16 + 2 * 16 * 4)
PER_SAMPLE = FORWARD + BACKWARD
PARAMETERS = 12 * 16 + 16 + 16 * 4 + 4


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def data(samples: int = 100, batch: int = 8) -> DataLoader[Any]:
    return DataLoader(reference.dataset(samples), batch)


def federated(**options: Any) -> FederatedStrategy:
    return FederatedStrategy(**{"num_clients": 7, "local_epochs": 2, **options})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_plain_training_is_counted_to_the_last_flop(options: dict[str, Any]) -> None:
    accounting = ComputeAccounting(law=None)
    trainer(accounting, **options).fit(Net(), data(), data(40))
    ledger = accounting.ledger
    assert ledger.training_flops == 2 * 100 * PER_SAMPLE  # 12 batches of 8 and one of 4
    assert ledger.flops["evaluation"] == 2 * 40 * FORWARD
    assert ledger.samples == ledger.tokens == 200
    assert ledger.average_params == PARAMETERS
    assert accounting.position is None


@pytest.mark.parametrize("executor", ["sequential", "vectorized", "auto"])
@pytest.mark.parametrize("cache", [True, False])
def test_clients_are_counted_by_any_executor(executor: str, cache: bool) -> None:
    accounting = ComputeAccounting(law=None)
    strategy = federated(executor=executor, cache_dataset=cache, clients_per_round=4)
    run = trainer(accounting, strategy=strategy, max_epochs=5)
    records = []

    class Keep(Callback):
        def on_round_end(self, trainer: Any, module: Any, record: Any) -> None:
            records.append(record)

    run.callbacks.append(Keep())
    run.fit(Net(), data())
    ledger = accounting.ledger
    assert len(records) == 5
    for record in records:
        assert record.flops.tolist() == (record.samples * PER_SAMPLE).tolist()
        assert record.tokens.tolist() == record.samples.tolist()
    assert ledger.training_flops == sum(record.samples.sum() for record in records) * PER_SAMPLE
    assert sum(ledger.clients.values()) == ledger.training_flops
    assert ledger.upload_bytes == sum(record.upload_bytes for record in records)
    assert ledger.flops["aggregation"] == 2 * PARAMETERS * 4 * 5


def test_sequences_of_any_length_are_counted() -> None:
    """Batches padded to their longest sequence, in plain and in federated training."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (60,), generator=generator).tolist()
    sequences = [torch.randn(length, 12, generator=generator) for length in lengths]

    class Each(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch.shape[0] * batch.shape[1])
            return self.net(batch).square().mean()

    def padded(samples: Any) -> Tensor:
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    for strategy in ("auto", federated(executor="sequential"), federated(executor="vectorized")):
        seen: list[int] = []
        accounting = ComputeAccounting(law=None)
        loader = DataLoader(sequences, 4, collate_fn=padded)  # type: ignore[arg-type]
        trainer(accounting, strategy=strategy, max_epochs=1).fit(Each(), loader)
        if strategy == "auto" or strategy._options.executor == "sequential":  # type: ignore[union-attr]
            expected = accounting.ledger.training_flops
            # The meter itself runs the step, once for each form.
            assert expected <= sum(seen) * PER_SAMPLE
            total = expected
        else:
            assert accounting.ledger.training_flops == total
        assert accounting.ledger.training_flops % PER_SAMPLE == 0


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_nothing_is_counted_twice_after_an_interruption(strategy: str, tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> tuple[ComputeAccounting, pl.Trainer]:
        accounting = ComputeAccounting(law="Chinchilla")
        kind: Any = federated(executor="sequential") if strategy == "federated" else "auto"
        fit = trainer(accounting, strategy=kind, max_epochs=epochs)
        fit.fit(Net(), data(), data(16), ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
        return accounting, fit

    whole, _ = run(6)
    _, stopped = run(2)
    stopped.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = run(6, tmp_path / "stop.ckpt")
    mine, theirs = resumed.ledger.state_dict(), whole.ledger.state_dict()
    assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert resumed.position == whole.position


def test_a_second_run_begins_at_nothing() -> None:
    accounting = ComputeAccounting(law=None)
    for _ in range(2):
        trainer(accounting).fit(Net(), data())
        assert accounting.ledger.training_flops == 2 * 100 * PER_SAMPLE


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_a_budget_ends_the_run(strategy: str) -> None:
    accounting = ComputeAccounting(law=None, max_flops=450 * PER_SAMPLE)
    kind: Any = federated(executor="sequential") if strategy == "federated" else "auto"
    run = trainer(accounting, strategy=kind, max_epochs=20)
    run.fit(Net(), data())
    spent = accounting.ledger.training_flops / PER_SAMPLE
    # To the end of the step, or round, in which it was spent.
    assert 450 <= spent <= (458 if strategy == "auto" else 600)
    assert accounting.remaining == 0
    assert run.current_epoch < 20


def test_the_position_is_that_of_the_law(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    law = Rosenfeld(E=0.2, A=50.0, B=30.0, alpha=0.4, beta=0.3)
    accounting = ComputeAccounting(law=law, rho=0.5)
    trainer(accounting, strategy=federated(), logger=logger, max_epochs=4, log_every_n_steps=1).fit(Net(), data())
    position = accounting.position
    assert position is not None
    expected = position_of(law, params=PARAMETERS, tokens=800, flops=800 * PER_SAMPLE, clients=7, rho=0.5)
    assert position == expected
    assert position.optimal_params == pytest.approx(
        law.replace(flops_per=PER_SAMPLE / PARAMETERS).optimal(800 * PER_SAMPLE * 7**-0.5).params
    )
    assert position.excess_loss >= 0
    saved = json.loads((Path(logger.log_dir) / "position.json").read_text())
    assert saved["size_ratio"] == pytest.approx(position.size_ratio)
    assert saved["advice"] == position.advice()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert {
        "compute/flops_total", "compute/flops_per_client", "compute/tokens", "compute/params",
        "compute/optimal_params", "compute/size_ratio", "compute/predicted_loss", "compute/excess_loss",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    totals = [event.value for event in events.Scalars("compute/flops_total")]
    assert totals == pytest.approx([200 * (i + 1) * PER_SAMPLE for i in range(4)])
    assert "compute/position" in events.Tags()["images"]


def test_a_law_knows_its_domain(capsys: pytest.CaptureFixture[str]) -> None:
    accounting = ComputeAccounting()
    trainer(accounting).fit(Net(), data())
    assert accounting.law is None
    assert accounting.position is None
    text = TensorDataset(*tokens(24))
    accounting = ComputeAccounting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(accounting).fit(Classifier(GPT()), DataLoader(text, 8))
    assert accounting.law == Chinchilla()
    assert accounting.position is not None
    assert accounting.ledger.tokens == 2 * 24 * 32
    assert "Best size under Chinchilla" in capsys.readouterr().out


def test_a_fitted_law_is_read_from_its_file(tmp_path: Path) -> None:
    constants = {"E": 0.2, "A": 5.0, "B": 3.0, "alpha": 0.4, "beta": 0.3}
    document = {"law": "Rosenfeld", "constants": constants, "rho": [0.3, 0.2, 0.4]}
    (tmp_path / "law.json").write_text(json.dumps(document))
    accounting = ComputeAccounting(law=str(tmp_path / "law.json"))
    trainer(accounting, strategy=federated()).fit(Net(), data())
    assert accounting.position is not None
    assert accounting.position.rho == 0.3
    assert accounting.position.law == "Rosenfeld"


def test_counting_changes_no_bit() -> None:
    def weights(*callbacks: Callback, strategy: Any) -> Tensor:
        torch.manual_seed(3)
        module = Net()
        trainer(*callbacks, strategy=strategy).fit(
            module, DataLoader(reference.dataset(100), 8, shuffle=True), data(16)
        )
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    for make in (lambda: "auto", lambda: federated(executor="sequential"), lambda: federated(executor="vectorized")):
        assert torch.equal(weights(ComputeAccounting(), strategy=make()), weights(strategy=make()))


def test_operators_of_unknown_cost_are_said() -> None:
    class Spectral(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.fft.rfft(self.net(batch[0])).abs().mean()

    with pytest.warns(UserWarning, match="FLOPs are not known .*fft.* the count is too low"):
        trainer(ComputeAccounting(law=None)).fit(Spectral(), data())


def test_logs_reach_any_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(ComputeAccounting(max_flops=1e9), logger=logger, log_every_n_steps=5).fit(Net(), data())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {"compute/flops_total", "compute/budget_used"} <= set(header.split(","))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"law": "chinchila"}, ValueError, "Did you mean 'Chinchilla'"),
        ({"law": "Farseer"}, Unfitted, "constants are not published"),
        ({"law": 3}, TypeError, "law=3: pass 'auto'"),
        ({"rho": float("nan")}, ValueError, "rho=nan"),
        ({"budget": 0}, ValueError, "budget=0: pass a number of FLOPs above 0"),
        ({"max_flops": -1}, ValueError, "max_flops=-1"),
        ({"tokens_fn": 3}, TypeError, "tokens_fn=3"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ComputeAccounting(**options)


def test_a_law_that_cannot_place_the_run_says_so() -> None:
    accounting = ComputeAccounting(law=Farseer())
    with pytest.warns(UserWarning, match="no position under Farseer"):
        trainer(accounting).fit(Net(), data())
    assert accounting.position is None
