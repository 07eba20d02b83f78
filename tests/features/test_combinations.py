"""Parts that do not go together are refused before training, with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_fedscale import FederatedStrategy, local_rules
from lightning_fedscale.aggregators import stacked
from lightning_fedscale.compressors import error_feedback, top_k
from lightning_fedscale.local_rules import Ditto, fed_dyn, fed_nova, fed_prox, scaffold
from lightning_fedscale.server.asynchrony import FedBuff
from tests.laws import reference
from tests.unit.test_contracts import example

FIRST = stacked(lambda update: 1.0, lambda stack, cohort: stack.deltas[0])


class Net(pl.LightningModule):
    def __init__(self, optimizer: Any = None, manual: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.automatic_optimization = not manual
        self._make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self._make(self.parameters())


def fit(module: pl.LightningModule, **strategy: Any) -> None:
    trainer = reference.quiet_trainer(max_epochs=1, strategy=FederatedStrategy(num_clients=4, **strategy))
    trainer.fit(module, reference.loader(reference.dataset()))


def test_names_stand_for_objects() -> None:
    strategy = FederatedStrategy(
        local_rule="scaffold", server_optimizer="fed_avgm", compressor="top_k", downlink_compressor="qsgd"
    )
    options = strategy._options
    assert options.algorithm.local_rule is not None
    assert options.algorithm.compressor is not None
    assert options.downlink_compressor is not None
    assert (options.algorithm.local_rule.name, options.algorithm.compressor.name) == ("scaffold", "top_k(0.01)")
    assert options.downlink_compressor.name.startswith("qsgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_rule": "scafold"}, r"local_rule='scafold' is not known\. Did you mean 'scaffold'"),
        ({"local_rule": "fed_prox"}, r"local_rule='fed_prox' needs mu: pass an object, fed_prox\(mu=\.\.\.\)"),
        ({"compressor": "topk"}, r"compressor='topk' is not known\. Did you mean 'top_k'"),
        ({"downlink_compressor": "sgn"}, r"downlink_compressor='sgn' is not known"),
        ({"server_optimizer": "fedadam"}, r"server_optimizer='fedadam' is not known\. Did you mean 'fed_adam'"),
        ({"mode": "asinc"}, r"mode='asinc': choose 'sync', 'async'"),
        ({"mode": "async", "local_rule": "scaffold"}, r"local_rule='scaffold' with mode='async'.*fed_prox, fed_nova"),
        ({"mode": "async", "local_rule": fed_dyn(0.1)}, r"local_rule='fed_dyn' with mode='async'"),
        ({"mode": "async", "sampler": lambda **_: None}, r"sampler=.* with mode='async'"),
        ({"personal": Ditto(0.1), "client_optimizer": "keep"}, r"personal=Ditto.*client_optimizer='reset'"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_rule": 3}, "local_rule=3: pass a local_rules.LocalRule"),
        ({"compressor": 0.1}, "compressor=0.1: pass a compressor"),
        ({"privacy": 1.0}, "privacy=1.0: "),
        ({"personal": "head"}, "personal='head': pass a list of patterns"),
    ],
)
def test_kinds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FederatedStrategy(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (lambda: Net(), {"mode": "async"}, r"mode='async': .* pass population="),
        (lambda: Net(), {"mode": FedBuff(seconds=[1.0, 2.0])}, "seconds: 2 .* 4 clients"),
        (
            lambda: Net(),
            {"mode": FedBuff(concurrency=4, seconds=[1.0] * 4), "clients_per_round": 2},
            "concurrency=4 with clients_per_round=2: this needs 5 clients",
        ),
        (lambda: Net(), {"personal": ["haed.*"]}, r"personal=\['haed.\*'\] matches no .*'net.0.weight'"),
        (lambda: Net(), {"personal": ["*"]}, r"personal=\['\*'\] matches all"),
        (lambda: Net(torch.optim.Adam), {"local_rule": "scaffold"}, r"local_rule='scaffold' .* Adam .*option='I'"),
        (
            lambda: Net(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
            {"local_rule": scaffold()},
            r"local_rule='scaffold' .*momentum=0.9 .*\(plain SGD\)",
        ),
        (
            lambda: Net(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
            {"local_rule": fed_nova()},
            "local_rule='fed_nova' .*Nesterov",
        ),
        (lambda: Net(manual=True), {"local_rule": fed_nova()}, "local_rule='fed_nova' .*automatic_optimization=False"),
        (
            lambda: Net(manual=True),
            {"local_rule": scaffold("I")},
            r"automatic_optimization=False.*local_rules.fed_prox\(mu=0.01\)",
        ),
    ],
)
def test_what_only_the_model_shows(module: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(), **arguments)


def test_any_optimizer_with_the_other_option() -> None:
    fit(Net(torch.optim.Adam), local_rule=scaffold(option="I"))
    fit(Net(torch.optim.Adam), local_rule=fed_prox(0.1))


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}
ADVISED = re.compile(r"local_rules\.\w+\([^)]*\)")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", local_rules.FACTORIES)
def test_a_refusal_advises_what_takes_the_optimizer(name: str, optimizer: str) -> None:
    rule = example("local_rules", name)
    try:
        fit(Net(OPTIMIZERS[optimizer]), local_rule=rule)
    except ValueError as error:
        advised = ADVISED.findall(str(error))
        assert rule.needs_sgd
        assert advised, "name a rule that takes any optimizer, LocalRule(instead=...)"
        for expression in advised:
            fit(Net(OPTIMIZERS[optimizer]), local_rule=eval(expression, {"local_rules": local_rules}))
    else:
        assert optimizer == "plain SGD" or not rule.needs_sgd or rule.knows_momentum


def test_the_page_advises_what_takes_the_optimizer() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/algorithms.md").read_text("utf8")
    rows = [row for row in page.partition("## Which one")[2].partition("```")[0].splitlines() if ADVISED.search(row)]
    assert len(rows) > 3
    assert any("scaffold" in row and "SGD" not in row for row in rows)
    for row in rows:
        optimizer = OPTIMIZERS["plain SGD" if "SGD" in row else "Adam"]
        for expression in ADVISED.findall(row):
            fit(Net(optimizer), local_rule=eval(expression, {"local_rules": local_rules}), aggregator="uniform")


def test_warnings(recwarn: pytest.WarningsRecorder) -> None:
    FederatedStrategy(local_rule="scaffold", aggregator=FIRST)
    fit(Net(), compressor=error_feedback(top_k(0.5)), clients_per_round=1)
    said = [str(warning.message) for warning in recwarn]
    assert any(re.match("local_rule='scaffold' with aggregator=.*hostile clients", message) for message in said)
    assert any(re.match(r"compressor=error_feedback\(.* 1 of 4 clients", message) for message in said)
