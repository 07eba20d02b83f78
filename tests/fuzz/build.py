"""From a recipe to a module, a loader, and a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_fedscale
from lightning_fedscale import (
    FederatedStrategy,
    Partition,
    aggregators,
    compressors,
    local_rules,
    partitioners,
    privacy,
    samplers,
    server,
)
from lightning_fedscale.server import asynchrony
from tests.fuzz.batches import FORMS, Columns
from tests.fuzz.habits import GLOBALS, HOOKS, LOGS, LOSSES, STATES, make_metrics
from tests.fuzz.layers import BLOCKS, CLASSES, INPUTS, ON_INPUTS, ON_TOKENS, TOKENS, VOCABULARY, WIDTH
from tests.fuzz.recipes import Recipe
from tests.laws.reference import quiet_trainer


class Fuzzed(pl.LightningModule):
    """The module of a recipe; hooks are mixed in by `make_module`."""

    manual = False
    coefficient = 1.0

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.on_inputs = ON_INPUTS[recipe.inputs]()
        self.on_tokens = ON_TOKENS[recipe.tokens]() if recipe.tokens else None
        self.blocks = nn.ModuleList([BLOCKS[name]() for name in recipe.blocks])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.recipe = recipe
        self.unpack = (lambda batch: Columns(*batch)) if recipe.batch == "cut" else FORMS[recipe.batch].read
        self.automatic_optimization = not self.manual
        for name in recipe.states:
            STATES[name].make(self)
        make_metrics(self, recipe.logs)

    def forward(self, columns: Columns) -> Tensor:
        hidden = self.on_inputs(columns.inputs)
        if self.on_tokens is not None:
            hidden = hidden + self.on_tokens(columns.tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        columns = self._columns(batch)
        outputs = self(columns)
        coefficient: Any = columns.factor
        for name in self.recipe.states:
            coefficient = coefficient * STATES[name].read(self, batch_idx)
        result = LOSSES[self.recipe.loss](outputs, columns.labels, coefficient, batch_idx)
        loss = result["loss"] if isinstance(result, dict) else result
        for name in self.recipe.logs if loss is not None else ():
            LOGS[name](self, loss.reshape(()), outputs, columns.labels, batch_idx)
        if self.manual and loss is not None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss.sum())
            optimizer.step()
        return result

    def _columns(self, batch: Any) -> Columns:
        """Precision plugins do not look into every batch."""
        columns = self.unpack(batch)
        return columns._replace(inputs=columns.inputs.to(self.head.weight.dtype))

    def evaluate(self, batch: Any) -> Tensor:
        columns = self._columns(batch)
        return nn.functional.cross_entropy(self(columns), columns.labels)

    def configure_optimizers(self) -> Any:
        made = eval(self.recipe.optimizer, {name: _of(kind, self) for name, kind in vars(torch.optim).items()})
        if not self.recipe.scheduler:
            return made
        schedulers = vars(torch.optim.lr_scheduler)
        return [made], [eval(self.recipe.scheduler, {name: _of(kind, made) for name, kind in schedulers.items()})]


def _of(kind: Any, owner: Any) -> Callable[..., Any]:
    """The class with its first argument: what a module trains, or an optimizer."""

    def make(**options: Any) -> Any:
        first = list(owner.parameters()) if isinstance(owner, nn.Module) else owner
        return kind(first, **options)

    return make


class Samples(Dataset[int]):
    """Samples by their number; they are put together by `_Collate`."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> int:
        return index


class _Collate:
    def __init__(self, data: Columns, recipe: Recipe) -> None:
        self.data, self.pack, self.noisy = data, FORMS[recipe.batch].pack, recipe.noisy

    def __call__(self, indices: list[int]) -> Any:
        inputs, tokens, labels, _ = (part[indices] if isinstance(part, Tensor) else part for part in self.data)
        if self.noisy:
            inputs = inputs + 0.1 * torch.randn(inputs.shape) + 0.1 * float(np.random.randn())
        return self.pack(Columns(inputs, tokens, labels))


class Anneal(pl.Callback):
    """Changes what states say is to be changed between epochs."""

    def __init__(self, recipe: Recipe) -> None:
        self.changes = [STATES[name].change for name in recipe.states]

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for change in self.changes:
            if change is not None:
                change(module, trainer.current_epoch)


class EMA(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=lambda average, now, count: 0.5 * average + 0.5 * now)


class SWA(StochasticWeightAveraging):
    def __init__(self) -> None:
        super().__init__(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


class Built(NamedTuple):
    """What a recipe is made into; the dataset's numbers are in ``data``."""

    module: Fuzzed
    loader: DataLoader[Any]
    data: Columns


def make_data(recipe: Recipe) -> Columns:
    rng = np.random.default_rng(recipe.seed)
    labels = rng.integers(0, CLASSES, recipe.samples)
    centres = rng.normal(size=(CLASSES, INPUTS))
    inputs = centres[labels] + rng.normal(size=(recipe.samples, INPUTS))
    tokens = rng.integers(0, VOCABULARY, (recipe.samples, TOKENS))
    # More of the first label and of the first clients' inputs: clients should differ in everything.
    inputs *= np.linspace(0.5, 1.5, recipe.samples)[:, None]
    return Columns(torch.tensor(inputs, dtype=torch.float32), torch.tensor(tokens), torch.tensor(labels))


def build(recipe: Recipe) -> Built:
    """Module and loader, the same every time."""
    GLOBALS.clear()
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)
    kind = type("Fuzzed", (*(HOOKS[name] for name in recipe.hooks), Fuzzed), {"coefficient": 1.0})
    module = kind(recipe)
    data = make_data(recipe)
    options: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "shuffle": recipe.shuffle,
        "drop_last": recipe.drop_last,
    }
    if recipe.batch == "cut":
        return Built(module, DataLoader(TensorDataset(*data[:3]), **options), data)
    return Built(module, DataLoader(Samples(data.labels), collate_fn=_Collate(data, recipe), **options), data)


_NAMES: dict[str, Any] = {
    "torch": torch,
    "Partition": Partition,
    "aggregators": aggregators,
    "asynchrony": asynchrony,
    "compressors": compressors,
    "local_rules": local_rules,
    "partitioners": partitioners,
    "privacy": privacy,
    "samplers": samplers,
    "server": server,
    "fedscale": lightning_fedscale,
    "EMA": EMA,
    "SWA": SWA,
}


def evaluated(options: Any, recipe: Recipe) -> dict[str, Any]:
    """Arguments as Python objects, made anew for every run."""
    clients = int(recipe.strategy.get("num_clients", 4))
    names = {**_NAMES, "clients": clients, "samples": recipe.samples}
    return {name: eval(expression, names) for name, expression in options.items()}


def make_strategy(recipe: Recipe, executor: str) -> FederatedStrategy:
    options: dict[str, Any] = {"executor": executor, "seed": recipe.seed}
    return FederatedStrategy(**options, **evaluated(recipe.strategy, recipe))


def make_trainer(recipe: Recipe, strategy: Any, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    given = evaluated(recipe.trainer, recipe)
    callbacks = [Anneal(recipe), *given.pop("callbacks", []), *callbacks]
    options = {"max_epochs": recipe.epochs, **given, **options}
    return quiet_trainer(**options, strategy=strategy, callbacks=callbacks)
