"""`ComputeAccounting` in whole runs: exact counts, by any executor, after any interruption, and an honest position."""

from __future__ import annotations

import copy
import json
import logging
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
from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.scaling import Chinchilla, ComputeOnly, Farseer, Porian, Range, Rosenfeld, Unfitted, position_of
from tests.laws import reference
from tests.networks import GPT, Classifier, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*this is an extrapolation")

FORWARD, BACKWARD = 2 * (12 * 16 + 16 * 4), 2 * (12 * 16 + 2 * 16 * 4)
PER_SAMPLE = FORWARD + BACKWARD
LAW = Rosenfeld(E=0.6, A=1.0, B=0.5, alpha=0.4, beta=0.4)
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

    run.callbacks.append(Keep())  # type: ignore[attr-defined]
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
        loader: DataLoader[Any] = DataLoader(sequences, 4, collate_fn=padded)  # type: ignore[arg-type]
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
        # A law of sizes, which no loss speaks against.
        accounting = ComputeAccounting(law=Porian(size=1.0).replace(fitted_on=Range("any")))
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
    assert resumed.position is not None
    assert resumed.position == whole.position


def test_copies_of_the_trainers_callbacks_count_an_evaluation_once() -> None:
    class Copies(Callback):
        copied: list[Callback]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.copied = copy.deepcopy(trainer.callbacks)  # type: ignore[attr-defined]

    copies, module = Copies(), Net()
    trainer(ComputeAccounting(law=None), copies).fit(module, data())
    (accounting,) = (each for each in copies.copied if isinstance(each, ComputeAccounting))
    trainer(*copies.copied).validate(module, data(40), verbose=False)
    assert accounting.ledger.flops["evaluation"] == 40 * FORWARD


def test_another_callback_may_call_its_hooks() -> None:
    class Wrapper(Callback):
        inner = ComputeAccounting(law=None)

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            self.inner.setup(trainer, pl_module, stage)

        def on_validation_batch_start(self, *arguments: Any) -> None:
            self.inner.on_validation_batch_start(*arguments)

        def on_validation_batch_end(self, *arguments: Any) -> None:
            self.inner.on_validation_batch_end(*arguments)

        def on_validation_end(self, *arguments: Any) -> None:
            self.inner.on_validation_end(*arguments)

    wrapper = Wrapper()
    trainer(wrapper).validate(Net(), data(40), verbose=False)
    assert wrapper.inner.ledger.flops["evaluation"] == 40 * FORWARD


def test_a_second_run_begins_at_nothing() -> None:
    accounting = ComputeAccounting(law=None)
    for _ in range(2):
        trainer(accounting).fit(Net(), data())
        assert accounting.ledger.training_flops == 2 * 100 * PER_SAMPLE


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_a_budget_ends_the_run(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    accounting = ComputeAccounting(law=None, max_flops=450 * PER_SAMPLE)
    kind: Any = federated(executor="sequential") if strategy == "federated" else "auto"
    run = trainer(accounting, strategy=kind, max_epochs=20)
    with caplog.at_level(logging.INFO):
        run.fit(Net(), data())
    assert caplog.text.count(f"{accounting.ledger.training_flops:.3g} of max_flops=") == 1
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
    band = ("compute/params_by_law", "compute/optimal_params_low", "compute/optimal_params_high")
    (steps,) = {tuple(event.step for event in events.Scalars(tag)) for tag in band}  # TensorBoard draws no other band
    assert steps
    totals = [event.value for event in events.Scalars("compute/flops_total")]
    assert totals == pytest.approx([200 * (i + 1) * PER_SAMPLE for i in range(4)])
    assert "compute/position" in events.Tags()["images"]


def test_without_a_report_the_run_is_counted_logged_and_placed_as_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law, found = Rosenfeld(E=0.2, A=50.0, B=30.0, alpha=0.4, beta=0.3), {}
    for report in (True, False):
        logger = TensorBoardLogger(tmp_path, name=str(report))
        accounting = ComputeAccounting(law=law, rho=0.5, report=report)
        run = trainer(accounting, strategy=federated(), logger=logger, log_every_n_steps=1)
        run.fit(Net(), data())
        assert ("What the run cost" in capsys.readouterr().out) == report
        assert (Path(logger.log_dir) / "position.json").exists() == report
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        tags = events.Tags()
        assert ("compute/position" in tags["images"]) == report
        assert any("compute/advice" in tag for tag in tags["tensors"]) == report
        logged = {tag: events.Scalars(tag)[-1].value for tag in tags["scalars"] if tag.startswith("compute/flops")}
        found[report] = logged, accounting.position
    assert found[True][1] is not None
    assert found[True][0]["compute/flops_total"] > 0
    assert found[False] == found[True]


def test_without_a_report_a_missing_position_is_an_attribute_and_no_warning() -> None:
    accounting = ComputeAccounting(law=ComputeOnly(3.0, 0.05), report=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ComputeAccounting: no position")
        trainer(accounting).fit(Net(), data())
    assert "every size is as good" in accounting.no_position


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
    # Text, and no run that the law says anything of.
    assert accounting.law == Chinchilla()
    assert accounting.position is None
    assert "times less than the smallest number that Chinchilla was fitted on" in accounting.no_position
    assert accounting.ledger.tokens == 2 * 24 * 32
    assert "No position: " in capsys.readouterr().out


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

    with pytest.warns(UserWarning, match=r"ComputeAccounting: the FLOPs are underestimated.*fft"):
        trainer(ComputeAccounting(law=None)).fit(Spectral(), data())


class Saves(Callback):
    """Listed before the accounting, and so told before it."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("strategy", "hook"),
    [("auto", "on_train_batch_end"), ("federated", "on_train_batch_end"), ("federated", "on_round_end")],
)
def test_a_checkpoint_holds_what_was_spent_whoever_saves_it(strategy: str, hook: str, tmp_path: Path) -> None:
    kind: Any = federated(executor="sequential", local_epochs=1) if strategy == "federated" else "auto"
    trainer(Saves(tmp_path / "a.ckpt", hook), ComputeAccounting(law=None), strategy=kind, max_epochs=5).fit(
        Net(), data()
    )
    (key,) = [key for key in torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"] if "Accounting" in key]
    ledger = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][key]["ledger"]
    assert ledger["updates"] == 3
    assert ledger["samples"] == (300 if strategy == "federated" else 24)


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_a_spent_budget_stays_spent(strategy: str, tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> tuple[ComputeAccounting, pl.Trainer]:
        accounting = ComputeAccounting(law=None, max_flops=450 * PER_SAMPLE)
        kind: Any = federated(executor="sequential") if strategy == "federated" else "auto"
        fit = trainer(accounting, strategy=kind, max_epochs=20)
        fit.fit(Net(), data(), ckpt_path=checkpoint, weights_only=True)
        return accounting, fit

    once, fit = run(None)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    again, resumed = run(str(tmp_path / "end.ckpt"))
    assert resumed.global_step == fit.global_step
    assert again.ledger.training_flops == once.ledger.training_flops


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_closures_that_run_several_times_are_counted_each_time(strategy: str) -> None:
    class Line(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.training and type(self.trainer).__name__ == "Trainer":  # not the meter's copy
                calls.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    calls: list[int] = []
    accounting = ComputeAccounting(law=None)
    kind: Any = federated(executor="sequential", local_epochs=1) if strategy == "federated" else "auto"
    # Batches of one size, since clients' evaluations are counted over all of their batches.
    run = trainer(accounting, strategy=kind, max_epochs=2)
    run.fit(Line(), data(112, 8))
    assert len(calls) > 2 * 14
    assert accounting.ledger.training_flops == sum(calls) * PER_SAMPLE
    callbacks: list[Callback] = run.callbacks  # type: ignore[attr-defined]
    assert not [callback for callback in callbacks if type(callback).__name__ == "Evaluations"]


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_halves_of_batches_are_probing(strategy: str) -> None:
    accounting = ComputeAccounting(law=None)
    kind: Any = federated(executor="sequential", local_epochs=1) if strategy == "federated" else "auto"
    phase = CriticalPhase(action="observe", noise_every=1)
    trainer(phase, accounting, strategy=kind, max_epochs=2).fit(Net(), data(112, 8))
    looks = 7 if strategy == "federated" else 28  # each client's first batch after the first round, or every batch
    assert accounting.ledger.flops["probing"] == looks * 8 * PER_SAMPLE
    assert accounting.ledger.training_flops == 2 * 112 * PER_SAMPLE


def test_real_steps_of_the_batch_probe_are_probing() -> None:
    accounting, probe = ComputeAccounting(law=None), MaxBatchProbe(budget="1GiB", verify=True, max_samples=16)
    trainer(probe, accounting, max_epochs=1).fit(Net(), data())
    assert probe.result is not None
    assert probe.result.real_steps == 2
    probing = accounting.ledger.flops["probing"] / PER_SAMPLE
    assert probing == int(probing) > 16  # two steps of two batches


def test_nothing_is_left_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(ComputeAccounting(law="Chinchilla")).fit(Net(), data())
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_is_left_out_of_the_curve(tmp_path: Path) -> None:
    class Diverges(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx > 5 else 1.0)

    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="the loss is nan, and is left out of the curve"):
        trainer(ComputeAccounting(law="Chinchilla"), logger=logger, log_every_n_steps=1).fit(Diverges(), data())
    events = EventAccumulator(logger.log_dir).Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if "loss_by" in tag]
    assert len(events.Scalars(tag)) == 6  # then the weights are lost


def test_curves_share_a_tag_with_a_sibling_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    law = Rosenfeld(E=0.2, A=50.0, B=30.0, alpha=0.4, beta=0.3)
    trainer(ComputeAccounting(law=law), logger=logger, log_every_n_steps=1, strategy=federated(), max_epochs=4).fit(
        Net(), data()
    )
    run, sibling = (
        EventAccumulator(str(path)).Reload() for path in (logger.log_dir, Path(logger.log_dir, "predicted_optimal"))
    )
    (tag,) = sibling.Tags()["scalars"]
    optimum, loss = sibling.Scalars(tag), run.Scalars(tag)
    assert [event.step for event in optimum] == [event.step for event in loss]
    per_round = 200 * PER_SAMPLE
    assert [event.step for event in loss] == [per_round * rounds // 1000 for rounds in (1, 2, 3, 4)]
    best = [law.replace(flops_per=PER_SAMPLE / PARAMETERS).optimal(per_round * n / 7).loss for n in (1, 2, 3, 4)]
    assert [event.value for event in optimum] == pytest.approx(best)
    assert [event.value for event in loss] == [event.value for event in run.Scalars("round/loss")]


@pytest.mark.parametrize("tokens_fn", [lambda batch: -1, lambda batch: batch[0].sum()])
@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_nonsense_about_tokens_ends_the_run_before_it_begins(strategy: str, tokens_fn: Any) -> None:
    module = Net()
    before = [parameter.clone() for parameter in module.parameters()]
    kind: Any = federated() if strategy == "federated" else "auto"
    with pytest.raises(ValueError, match="tokens_fn returned"):
        trainer(ComputeAccounting(tokens_fn=tokens_fn), strategy=kind).fit(module, data())
    assert all(map(torch.equal, before, module.parameters()))


def test_all_promised_names_are_logged() -> None:
    run = trainer(
        CriticalPhase(action="observe"), ComputeAccounting(law=LAW, budget=1e9), strategy=federated(),
        max_epochs=10,
    )  # fmt: skip
    run.fit(Net(), data(112, 8))
    names = (
        "flops_total flops_per_client tokens params optimal_params size_ratio predicted_loss excess_loss budget_used"
        " critical_batch_ratio clients learning_rate size_ratio_low size_ratio_high"
    )
    assert {f"compute/{name}" for name in names.split()} <= set(run.callback_metrics)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    assert values["compute/budget_used"] == pytest.approx(values["compute/flops_total"] / 1e9)
    assert values["compute/size_ratio"] == pytest.approx(values["compute/params"] / values["compute/optimal_params"])


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
        ({"law": Farseer()}, Unfitted, "Farseer: its constants are not published"),
        ({"law": 3}, TypeError, "law=3: pass 'auto'"),
        ({"rho": float("nan")}, ValueError, "rho=nan"),
        ({"rho": "automatic"}, ValueError, "rho='automatic': pass a number"),
        ({"rho": (0.5, 1.0, 2.0)}, ValueError, "rho="),
        ({"clients": 0}, ValueError, "clients=0"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"max_flops": -1}, ValueError, "max_flops=-1"),
        ({"tokens_fn": 3}, TypeError, "tokens_fn=3"),
        ({"report": "no"}, TypeError, "report='no'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ComputeAccounting(**options)


def test_a_law_that_cannot_place_the_run_says_so() -> None:
    accounting = ComputeAccounting(law=ComputeOnly(3.0, 0.05))
    with pytest.warns(UserWarning, match=r"no position under ComputeOnly: .*every size is as good"):
        trainer(accounting).fit(Net(), data())
    assert accounting.position is None
