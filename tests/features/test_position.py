"""Where `ComputeAccounting` says a run stands: by which law, for how many clients, at which rho, and when it cannot."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, local_rules
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.callbacks.compute_accounting.parameter_counts import count_parameters
from lightning_fedscale.callbacks.compute_accounting.task import has_targets_for_tokens, predicts_its_tokens, size_by
from lightning_fedscale.scaling import LAWS, Chinchilla, DiLoCo, Kaplan, Law, Porian, Rosenfeld, position_of
from lightning_fedscale.scaling.form import Range
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.made_for import made_for as made_for_of
from lightning_fedscale.scaling.runs import read_runs
from tests.laws import reference
from tests.networks import GPT, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, WIDTH = 20, 8


class Speaks(LightningModule):
    """A model of language: an embedding table and a head over its rows."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        text = batch[0] if isinstance(batch, (list, tuple)) else batch
        scores = self.head(self.body(self.table(text[:, :-1])))
        return nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def text(samples: int = 40) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randint(VOCABULARY, (samples, 9))), 4)


def run(accounting: ComputeAccounting, module: LightningModule, data: Any, *others: Callback, **options: Any) -> Any:
    trainer = reference.quiet_trainer(**{"max_epochs": 2, "callbacks": [accounting, *others], **options})
    trainer.fit(module, data)
    return trainer


def federated(clients: int = 5, cohort: int | None = 3) -> FederatedStrategy:
    return FederatedStrategy(num_clients=clients, clients_per_round=cohort, executor="sequential")


def known(name: str) -> Law:
    """A law of the registry, with constants made up where none are published."""
    law = LAWS[name]()
    types = {each.name: str(each.type) for each in dataclasses.fields(law)}
    return law.replace(**{each: (0.5, 0.5) if "tuple" in types[each] else 0.5 for each in law.missing})


@pytest.mark.parametrize("strategy", ["auto", "federated"])
@pytest.mark.parametrize("name", LAWS)
def test_every_law_of_the_registry_runs(name: str, strategy: str) -> None:
    for law in (known(name), known(name).replace(fitted_on=Range("text"))):  # as it is, and as if it held anywhere
        accounting = ComputeAccounting(law=law)
        kind: Any = federated() if strategy == "federated" else "auto"
        trainer = run(accounting, Speaks(), text(), strategy=kind, log_every_n_steps=1)
        assert (accounting.position is None) == bool(accounting.no_position)
        assert accounting.clients == (3 if strategy == "federated" else 1)
        assert math.isfinite(float(trainer.callback_metrics["compute/flops_total"]))
    if name in ("Porian", "DiLoCo"):  # which know sizes here, and no loss
        assert accounting.position is not None
        assert math.isnan(accounting.position.predicted_loss)
        assert json.dumps(accounting.position.as_dict(), allow_nan=False)


# ---- how many clients


LAW = Rosenfeld(E=0.2, A=5.0, B=20.0, alpha=0.4, beta=0.4)


def test_clients_who_wait_do_not_count() -> None:
    accounting = ComputeAccounting(law=LAW, rho=1.0)
    trainer = run(accounting, Speaks(), text(), strategy=federated(10, 2))
    position, ledger = accounting.position, accounting.ledger
    assert position is not None
    assert position.clients == accounting.clients == 2
    assert float(trainer.callback_metrics["compute/flops_per_client"]) == ledger.training_flops / 2
    other = ComputeAccounting(law=LAW, rho=1.0, clients=10)
    run(other, Speaks(), text(), strategy=federated(10, 2))
    assert other.position is not None
    assert other.position.clients == 10


def test_a_checkpoint_from_before_cohorts_were_counted() -> None:
    accounting = ComputeAccounting(law=LAW)
    run(accounting, Speaks(), text(), strategy=federated(5, None))
    state = accounting.state_dict()
    del state["ledger"]["cohort_tokens"], state["losses"]
    older = ComputeAccounting(law=LAW)
    older.load_state_dict(state)
    assert older.clients == 5


# ---- what the law's runs did


def made_for(strategy: FederatedStrategy, **changed: Any) -> MadeFor:
    """As the runs of a law that trained as this one did."""
    assert strategy.partition is not None
    facts = {"rules": strategy.method, "fingerprint": strategy.partition.fingerprint, "clients": (3,), "batch_size": 4}
    return MadeFor(**{**facts, **changed})


@pytest.mark.parametrize(
    ("changed", "has_verdict", "said"),
    [
        ({}, True, None),
        ({"batch_size": 8}, True, "may not hold for batch_size=4"),
        ({"rules": {"local_rule": "scaffold()"}}, False, "local_rule='none'"),
        ({"fingerprint": "0" * 64, "partition": "hospitals.json"}, False, "hospitals.json (00000000)"),
        ({"rules": None}, True, "do not record their method"),
        ({"fingerprint": None}, True, "whether it holds for partition='iid' is not known"),
        ({"passes": (0.1, 1.0), "samples": 40}, True, "2 passes over 40 samples, and the law's runs had at most 1"),
        ({"local_steps": 5}, True, None),  # which passes over the data do not have
    ],
)
def test_a_law_of_other_runs_gives_no_verdict(
    changed: dict[str, Any], has_verdict: bool, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A law that is known to be of another method or partition; what else differs, or is not known, is told."""
    before = federated()
    run(ComputeAccounting(law=None), Speaks(), text(), strategy=before, max_epochs=1)
    law = LAW.replace(made_for=made_for(before, **changed))
    accounting = ComputeAccounting(law=law, rho=1.0)
    run(accounting, Speaks(), text(), strategy=federated())
    position = accounting.position
    assert position is not None
    assert position.agreement is not None
    assert (position.verdict is not None) == has_verdict
    assert position.advice().startswith("no verdict: the law was fitted to runs with another") != has_verdict
    told = position.sentences()
    assert "".join(told.split()) in "".join(capsys.readouterr().out.split())
    assert position.as_dict()["differs"] == position.agreement.notes
    assert (said is None) == (not position.agreement.notes)
    assert said is None or said in told


def test_a_published_law_is_asked_of_anything() -> None:
    accounting = ComputeAccounting(law=LAW, rho=1.0)
    run(accounting, Speaks(), text(), strategy=federated())
    assert accounting.position is not None
    assert accounting.position.agreement is None


def test_runs_say_how_they_trained(tmp_path: Path) -> None:
    """A law that is fitted to folders of runs knows its method and partition too."""
    for number in (1, 2):
        logger = CSVLogger(tmp_path, "", number)
        strategy = FederatedStrategy(num_clients=3, local_steps=2, local_rule=local_rules.scaffold())
        run(ComputeAccounting(), Learns(), text(), strategy=strategy, logger=logger)
    table = read_runs(tmp_path, "train_loss")
    law = LAW.replace(made_for=made_for_of(table.assign(loss=1.0)))
    made = law.made_for
    assert made.rules == strategy.method
    assert strategy.partition is not None
    assert (made.fingerprint, made.partition) == (strategy.partition.fingerprint, "iid")
    assert (made.batch_size, made.local_steps, made.optimizer, made.clients) == (4, 2, "SGD", (3,))
    accounting = ComputeAccounting(law=law, rho=1.0)
    run(accounting, Learns(), text(), strategy=strategy)
    assert accounting.position is not None
    assert accounting.position.agreement is not None
    assert accounting.position.agreement.notes == []


class Learns(Speaks):
    """It logs its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


# ---- what division costs


def test_without_a_measured_rho_both_ends_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    accounting = ComputeAccounting(law=LAW)
    trainer = run(accounting, Speaks(), text(), strategy=federated())
    position = accounting.position
    assert position is not None
    assert [each.rho for each in position.readings] == [0.0, 1.0]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ratios = [each.size_ratio for each in position.readings]
    assert metrics["compute/size_ratio_low"] == pytest.approx(min(ratios))
    assert metrics["compute/size_ratio_high"] == pytest.approx(max(ratios))
    shown = capsys.readouterr().out
    assert "Best size under Rosenfeld, rho 0" in shown
    assert "Best size under Rosenfeld, rho 1" in shown


def test_a_measured_rho_brings_its_interval(tmp_path: Path) -> None:
    document = {"law": "Rosenfeld", "constants": LAW.constants, "rho": [0.5, 0.3, 0.8], "learning_rate": "tuned well"}
    (tmp_path / "law.json").write_text(json.dumps(document))
    accounting = ComputeAccounting(law=str(tmp_path / "law.json"))
    run(accounting, Speaks(), text(), strategy=federated())
    position = accounting.position
    assert position is not None
    assert (position.rho, *(each.rho for each in position.readings)) == (0.5, 0.3, 0.8)
    low, high = sorted(each.optimal_params for each in position.readings)
    assert position.ends == (low, high)
    assert position.as_dict()["rho_source"] == "measured, tuned well"
    assert "rho 0.5, 0.3 to 0.8: measured, tuned well" in position.advice()


# ---- which law


class Net(LightningModule):
    def __init__(self, rows: int, outputs: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(rows, WIDTH), nn.Linear(WIDTH, outputs)


IDS = torch.zeros(4, 9, dtype=torch.int64)
MASK = torch.ones(4, 9, dtype=torch.bool)
LABEL = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("module", "batch", "expected"),
    [
        (Speaks(), (IDS, IDS), True),
        (Speaks(tied=True), IDS, True),
        (Speaks(), {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}, True),
        (Speaks(), (IDS[:, :-1], IDS[:, 1:]), True),
        (Net(VOCABULARY, 3), (IDS, LABEL), False),  # a text with a label
        (Net(VOCABULARY, 5), (IDS, IDS), False),  # a label for each word
        (Net(7, 3), (IDS[:, :2], torch.randn(4, 5), LABEL), False),  # categories of a table
        (Net(VOCABULARY, 1), IDS[:, :3], False),  # user, item, and one that was not chosen
        (Speaks(), (torch.randn(4, 9), IDS), False),
        (Speaks(), (LABEL, IDS), False),
    ],
)
def test_language_has_a_target_for_each_token(module: nn.Module, batch: Any, expected: bool) -> None:
    assert (has_targets_for_tokens(batch) and predicts_its_tokens(module, count_parameters(module))) is expected


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_auto_is_a_law_of_text_for_language_only(strategy: str) -> None:
    class Labels(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            words, label = batch
            return nn.functional.cross_entropy(self.head(self.table(words).mean(1)), label)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    labelled = TensorDataset(torch.randint(VOCABULARY, (40, 9)), torch.randint(3, (40,)))
    for module, data, law in (
        (Labels(VOCABULARY, 3), DataLoader(labelled, 4), None),
        (Speaks(), text(), Chinchilla()),
    ):
        accounting = ComputeAccounting()
        kind: Any = federated() if strategy == "federated" else "auto"
        run(accounting, module, data, strategy=kind)
        assert accounting.law == law
        assert accounting.position is None  # far from any model of text


def test_a_run_that_is_far_away_gets_its_counts_and_the_reason(tmp_path: Path) -> None:
    near = LAW.replace(fitted_on=Range("words", params=(1e3, 1e9)))
    for law, reason in ((near, ""), (near.replace(fitted_on=Range("words", params=(1e7, 1e9))), "times less than")):
        accounting = ComputeAccounting(law=law)
        run(accounting, Speaks(), text())
        assert reason in accounting.no_position
        assert (accounting.position is None) == bool(reason)
        assert accounting.ledger.training_flops > 0


def test_adapters_are_not_judged_by_a_law_of_whole_models() -> None:
    module = Speaks()
    for part in (module.table, module.head):
        part.requires_grad_(False)
    accounting = ComputeAccounting(law=LAW)
    run(accounting, module, text())
    assert (
        "82% of the parameters are frozen, and Rosenfeld holds for models whose parameters are all trained"
        in accounting.no_position
    )
    own = ComputeAccounting(law=LAW.replace(fitted_on=Range("adapters")))  # fitted to such runs
    run(own, module, text())
    assert own.position is not None


@pytest.mark.parametrize(("floor", "applies"), [(2.5, True), (9.0, False), (0.1, False)])
def test_another_loss_is_another_task(floor: float, applies: bool) -> None:
    """The run's loss is near ln 20 = 3.0."""
    law = Rosenfeld(E=floor, A=0.1, B=0.1, alpha=0.4, beta=0.4).replace(fitted_on=Range("text"))
    accounting = ComputeAccounting(law=law)
    run(accounting, Speaks(), text())
    assert (accounting.position is not None) == applies
    assert applies or f"Rosenfeld predicts a loss of {floor:.3g}"[:34] in accounting.no_position


def test_a_training_loss_may_be_far_below_a_law_of_other_data() -> None:
    law = Rosenfeld(E=9.0, A=0.1, B=0.1, alpha=0.4, beta=0.4)
    accounting = ComputeAccounting(law=law)
    run(accounting, Speaks(), text())
    assert accounting.position is not None


# ---- sizes as laws count them


def test_embeddings_count_as_each_source_counts_them() -> None:
    apart, tied = Speaks(), Speaks(tied=True)
    table, body = VOCABULARY * WIDTH, WIDTH * WIDTH + WIDTH
    expected: dict[type[Law], tuple[int, int]] = {
        Chinchilla: (2 * table + body, table + body),
        DiLoCo: (2 * table + body, table + body),
        Porian: (table + body, table + body),
        Kaplan: (body, body),
        Rosenfeld: (table + body, table + body),
    }
    for law, sizes in expected.items():
        for module, size in zip((apart, tied), sizes, strict=True):
            counts = count_parameters(module)
            assert size_by(law(), counts.active, module, counts) == size, law
    assert {law.counts for law in LAWS.values()} <= {"all", "head", "blocks", "active"}


def test_the_position_counts_parameters_as_the_law_does() -> None:
    law = Porian(size=1.0).replace(fitted_on=Range("text"))
    whole = Chinchilla(E=2.5, A=0.1, B=0.1).replace(fitted_on=Range("text"))
    for each, size in ((law, 232), (whole, 392)):
        accounting = ComputeAccounting(law=each)
        run(accounting, Speaks(), text())
        assert accounting.position is not None
        assert accounting.position.params == size
        assert accounting.ledger.average_params == 232


def test_a_gpt_is_language() -> None:
    module = GPT()
    assert has_targets_for_tokens(tokens(4))
    assert predicts_its_tokens(module, count_parameters(module))


def test_a_head_by_hand_is_one_over_the_vocabulary() -> None:
    class ByHand(Speaks):
        def __init__(self) -> None:
            super().__init__()
            del self.head

        def head(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
            return nn.functional.linear(hidden, self.table.weight)

    accounting = ComputeAccounting()
    run(accounting, ByHand(), text())
    assert accounting.law == Chinchilla()
    module = ByHand()
    counts = count_parameters(module, ["table.weight"])
    sizes = {law: size_by(law(), counts.active, module, counts) for law in (Chinchilla, Porian, Kaplan)}
    assert list(sizes.values()) == [232, 232, 72]


def test_the_position_is_that_of_the_function() -> None:
    accounting = ComputeAccounting(law=LAW, rho=(0.5, 1.0))
    run(accounting, Speaks(), text(), strategy=federated())
    ledger = accounting.ledger
    assert accounting.position == position_of(
        LAW, params=232, tokens=ledger.tokens, flops=ledger.training_flops, clients=3, rho=(0.5, 1.0)
    )
