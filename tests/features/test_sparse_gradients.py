"""``nn.Embedding(sparse=True)`` trains to what it trains to with dense gradients, under every local rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, local_rules
from lightning_fedscale.core.lightning.half_batch_gradients import half_batch_gradients
from tests.laws import reference
from tests.unit.test_contracts import example

PERSONAL = {"ditto": lambda: {"personal": local_rules.Ditto(0.1)}}
RULES: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: lambda name=name: {"local_rule": example("local_rules", name)}  # type: ignore[misc]
        for name in local_rules.FACTORIES
    },
    "fed_nova, proximal": lambda: {"local_rule": local_rules.fed_nova(0.1)},
    "scaffold, option I": lambda: {"local_rule": local_rules.scaffold("I")},
    **PERSONAL,
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


class Words(pl.LightningModule):
    """Two tables of 30 words, most of which a batch does not have; one of them is reduced at once."""

    def __init__(self, sparse: bool, optimizer: str = "sgd") -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(30, 4, sparse=sparse), nn.EmbeddingBag(30, 4, sparse=sparse, mode="sum")
        self.head, self.optimizer = nn.Linear(4, 3), optimizer
        self.layouts = set[torch.layout]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.table(batch[0]).mean(1) + self.bag(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Looking(Words):
    """Notes as what the optimizer gets its gradients; clips by itself."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in (self.table.weight, self.bag.weight):
            assert parameter.grad is not None
            self.layouts.add(parameter.grad.layout)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    words, labels = torch.randint(0, 30, (48, 3), generator=generator), torch.randint(0, 3, (48,), generator=generator)
    return DataLoader(TensorDataset(words, labels), batch_size=4)


def fit(module: pl.LightningModule, executor: str, options: dict[str, Any], **trainer: Any) -> pl.Trainer:
    strategy = FederatedStrategy(num_clients=3, executor=executor, aggregator="uniform", **options)  # type: ignore[arg-type]
    run = reference.quiet_trainer(max_epochs=2, strategy=strategy, **trainer)
    run.fit(module, data())
    return run


def made(kind: type[Words], sparse: bool, optimizer: str = "sgd") -> Words:
    torch.manual_seed(0)
    return kind(sparse, optimizer)


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
@pytest.mark.parametrize("rule", RULES)
def test_every_local_rule(rule: str, executor: str) -> None:
    models, kept = [], []
    for sparse in (True, False):
        module = made(Words, sparse)
        strategy: Any = fit(module, executor, RULES[rule]()).strategy
        models.append(module.state_dict())
        kept += [strategy.personal_model(1)] if rule in PERSONAL else []
    assert reference.difference(*models) < 1e-6
    assert not kept or reference.difference(*kept) < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", ["reset", "keep"])
def test_corrected_gradients_go_to_any_optimizer_that_takes_sparse_ones(optimizer: str, keep: str) -> None:
    """As sparse ones, in Lightning's own steps and in accumulation too."""
    models = []
    for sparse in (True, False):
        module = made(Looking, sparse, optimizer)
        options = {"local_rule": local_rules.fed_prox(0.5), "client_optimizer": keep}
        fit(module, "sequential", options, gradient_clip_val=1.0, accumulate_grad_batches=2)
        models.append(module.state_dict())
        assert module.layouts == {torch.sparse_coo if sparse else torch.strided}
    assert reference.difference(*models) < 1e-6


class Lazily(Words):
    """Adam for sparse gradients alone, which refuses dense ones."""

    def __init__(self, sparse: bool, optimizer: str = "sgd") -> None:
        super().__init__(sparse)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(loss)
        for each in optimizers:
            each.step()

    def configure_optimizers(self) -> Any:
        tables = [self.table.weight, self.bag.weight]
        return torch.optim.SparseAdam(tables, lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize("options", [*PERSONAL.values(), lambda: {"local_rule": local_rules.fed_prox(0.1)}])
def test_optimizers_for_sparse_gradients_only(options: Callable[[], dict[str, Any]]) -> None:
    module = made(Lazily, True)
    before = module.table.weight.detach().clone()
    fit(module, "auto", options())
    assert not torch.equal(module.table.weight, before)


def test_the_noise_of_halves() -> None:
    found = []
    for sparse in (True, False):
        module = made(Words, sparse)
        trainer = fit(module, "sequential", {})
        halves = half_batch_gradients(trainer, made(Words, sparse), next(iter(data())))
        assert halves is not None
        found.append((halves.difference_square(), torch.cat([g.flatten() for g in halves.mean()])))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_of_sparse_gradients_is_refused(algorithm: str) -> None:
    """Torch has none; a module may have."""
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.1\): the gradient of 'table' is sparse"):
        fit(made(Words, True), "auto", {}, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    fit(made(Looking, True), "auto", {}, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
