"""What stays with each client does so under all of its names, or is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.local_rules import Ditto
from tests.features import reference_loop
from tests.laws import reference

EXECUTORS = ["sequential", "vectorized"]


class Language(pl.LightningModule):
    """Predicts the next of 11 words; ``tie`` makes the head share with the embedding in one way or another."""

    def __init__(self, tie: Callable[[Any], None] = lambda module: None) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.again = nn.Linear(6, 11)
        tie(self)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.body(self.words(batch[0][:, :-1])).tanh()
        logits = self.head(hidden) + self.again(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def tie_parameter(module: Any) -> None:
    module.head.weight = module.words.weight


def tie_module(module: Any) -> None:
    module.last = module.head


def tie_memory(module: Any) -> None:
    module.head.weight.data = module.words.weight.data


def tie_buffer(module: Any) -> None:
    module.head.register_buffer("scale", torch.ones(3))
    module.body.register_buffer("scale", module.head.scale)


def tie_view(module: Any) -> None:
    module.head.register_buffer("row", module.words.weight.detach()[3])


def tie_within(module: Any) -> None:
    module.again.weight = module.head.weight


REFUSED: dict[str, tuple[Callable[[Any], None], list[str], str, str]] = {
    "a parameter": (tie_parameter, ["head.*"], "head.weight", "words.weight"),
    "the other way round": (tie_parameter, ["words.*"], "words.weight", "head.weight"),
    "a module": (tie_module, ["last.*"], "last.weight", "head.weight"),
    "memory": (tie_memory, ["head.*"], "head.weight", "words.weight"),
    "a buffer": (tie_buffer, ["head.*"], "head.scale", "body.scale"),
    "a view": (tie_view, ["head.*"], "head.row", "words.weight"),
    "half of a block": (tie_within, ["again.*"], "again.weight", "head.weight"),
}
KEPT: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "under all names": (tie_parameter, ["head.*", "words.*"]),
    "by a pattern of each": (tie_parameter, ["*.weight"]),
    "a module": (tie_module, ["last.*", "head.*"]),
    "a buffer": (tie_buffer, ["head.*", "body.scale"]),
    "within a block": (tie_within, ["head.*", "again.*"]),
}


def fit(module: pl.LightningModule, executor: str, **options: Any) -> pl.Trainer:
    torch.manual_seed(1)
    data = TensorDataset(torch.randint(0, 11, (36, 5)))
    strategy = FederatedStrategy(num_clients=3, executor=executor, **options)  # type: ignore[arg-type]
    trainer = reference.quiet_trainer(max_epochs=2, strategy=strategy)
    trainer.fit(module, DataLoader(data, batch_size=4))
    return trainer


def made(tie: Callable[[Any], None] = lambda module: None) -> Any:
    torch.manual_seed(0)
    return Language(tie)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_is_shared_under_another_name_is_refused(case: str, executor: str) -> None:
    tie, personal, own, shared = REFUSED[case]
    module = made(tie)
    before = reference_loop.state_of(module)
    with pytest.raises(ValueError, match=rf"personal=.* matches '{own}' but not '{shared}', .* add '{shared}'"):
        fit(module, executor, personal=personal)
    assert reference_loop.same(reference_loop.state_of(module), before)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", KEPT)
def test_a_tensor_of_several_names_stays_under_all_of_them(case: str, executor: str) -> None:
    tie, personal = KEPT[case]
    module = made(tie)
    before = reference_loop.state_of(module)
    strategy: Any = fit(module, executor, personal=personal).strategy
    models = [strategy.personal_model(client) for client in range(3)]
    after, kept = module.state_dict(), set(strategy._federation.fit.tensors.shared().personal)
    own = {id(dict(module.named_parameters(remove_duplicate=False)).get(name)) for name in kept}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if id(tensor) in own:
            assert torch.equal(after[name], before[name])
            assert not torch.equal(models[0][name], models[1][name])
        else:
            assert not torch.equal(after[name], before[name])
            assert all(torch.equal(model[name], after[name]) for model in models)
    for one, other in [("head.weight", "words.weight")] if tie is tie_parameter else []:
        assert all(torch.equal(model[one], model[other]) for model in models)
    shared = sum(p.numel() * 4 for p in module.parameters() if id(p) not in own)
    shared += sum(b.numel() * 4 for name, b in module.named_buffers() if name not in kept)
    assert strategy.last_round.upload_bytes == 3 * shared


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tie", [tie_parameter, tie_module, tie_memory])
def test_personal_models_of_tied_modules_stay_tied(tie: Callable[[Any], None], executor: str) -> None:
    strategy: Any = fit(made(tie), executor, personal=Ditto(0.1)).strategy
    first, second = ("head.weight", "last.weight") if tie is tie_module else ("head.weight", "words.weight")
    models = [strategy.personal_model(client) for client in range(3)]
    assert all(torch.equal(model[first], model[second]) for model in models)
    assert not torch.equal(models[0][first], models[1][first])


class Thawing(pl.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.head.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.head.requires_grad_(trainer.current_epoch % 2 == 1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_frozen_layers_stay_with_their_clients_as_these_left_them(executor: str) -> None:
    """In the third round the head is frozen again: each client trains the body below its own head."""
    rounds = {}
    for epochs in (2, 3):
        torch.manual_seed(1)
        data = TensorDataset(torch.randint(0, 11, (36, 5)))
        strategy = FederatedStrategy(num_clients=3, executor=executor, personal=["head.*"])  # type: ignore[arg-type]
        trainer = reference.quiet_trainer(max_epochs=epochs, strategy=strategy, callbacks=[Thawing()])
        trainer.fit(made(), DataLoader(data, batch_size=4))
        rounds[epochs] = (
            [strategy.personal_model(client) for client in range(3)],
            trainer.callback_metrics["round/loss"],
        )
    (two, _), (three, _) = rounds[2], rounds[3]
    for before, after in zip(two, three, strict=True):
        assert before is not None
        assert after is not None
        assert torch.equal(before["head.weight"], after["head.weight"])
        assert not torch.equal(before["body.weight"], after["body.weight"])
    assert not torch.equal(two[0]["head.weight"], two[1]["head.weight"])  # type: ignore[index]
