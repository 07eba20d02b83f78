"""FedAvg in plain PyTorch: nothing of the strategy's loops, nor of Lightning's.

Only the definitions of randomness (who is sampled, in which order a client reads, what it draws) are the package's.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler

from lightning_fedscale import partitioners, samplers
from lightning_fedscale.core.plan import client_seed, pass_order
from tests.fuzz.build import Anneal, Fuzzed, build, evaluated
from tests.fuzz.recipes import Recipe
from tests.fuzz.runs import Outcome, quiet

_STRATEGY = {
    "num_clients",
    "clients_per_round",
    "local_epochs",
    "rounds_per_epoch",
    "clients_per_wave",
    "cache_dataset",
    "client_log_every_n",
}
_TRAINER = {"precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps"}
# What buffers of these kinds become is the library's own policy, and so is what a client does to parameters' flags.
_POLICIES = {
    "blocks": {
        "counter",
        "counter_assigned",
        "counter_read",
        "queue",
        "first_batch",
        "spectral_norm",
        "old_spectral_norm",
    },
    "states": {"frozen_then_free"},
}


def defines(recipe: Recipe) -> bool:
    """Whether the loop below says what the recipe's training is."""
    return (
        recipe.strategy.keys() <= _STRATEGY
        and "num_clients" in recipe.strategy
        and recipe.trainer.keys() <= _TRAINER
        and recipe.precision in ("64-true", "32-true")
        and not recipe.hooks
        and not recipe.scheduler
        and not any(set(getattr(recipe, name)) & policies for name, policies in _POLICIES.items())
        and "LBFGS" not in recipe.optimizer
    )


def fed_avg(recipe: Recipe) -> Outcome:
    """``x <- sum_k n_k y_k / sum_k n_k``, with an optimizer made anew for each client of each round."""
    outcome, single = Outcome(), recipe.precision == "32-true"
    with quiet():
        module, loader, _ = build(recipe)
        module.train()
        if not single:
            module.double()
        strategy, trainer = evaluated(recipe.strategy, recipe), evaluated(recipe.trainer, recipe)
        count, epochs, per_epoch = (strategy.get(n, 1) for n in ("num_clients", "local_epochs", "rounds_per_epoch"))
        cohort_size = strategy.get("clients_per_round", count)
        cohort_size = max(1, round(cohort_size * count)) if isinstance(cohort_size, float) else cohort_size
        partitioner = partitioners.IidPartitioner(count)
        partitioner.dataset = loader.dataset
        # What a step may ask its Trainer; what it logs is not looked at.
        asked: Any = SimpleNamespace()
        module._trainer, module.log = asked, lambda *_, **__: None  # type: ignore[method-assign]
        server = _state(module)
        for number in range(recipe.epochs * per_epoch):
            asked.global_step, asked.current_epoch = number, number // per_epoch
            if number % per_epoch == 0:
                Anneal(recipe).on_train_epoch_start(asked, module)
                server = _state(module)
            cohort = samplers.uniform(seed=recipe.seed, round=number, num_clients=count, clients_per_round=cohort_size)
            total = {name: torch.zeros_like(value, dtype=_wide(value)) for name, value in server.items()}
            losses, held = [], 0
            for client in cohort.tolist():
                _load(module, server)
                seed = client_seed(recipe.seed, number, client)
                random.seed(seed)
                np.random.seed(seed & 0xFFFFFFFF)
                torch.manual_seed(seed)
                mine, batches = partitioner.load_partition(client), list[list[int]]()
                for turn in range(number * epochs, (number + 1) * epochs):
                    order = pass_order(mine, shuffle=recipe.shuffle, seed=recipe.seed, client=client, number=turn)
                    batches += _cut(recipe, order.tolist())
                losses.append(_train(recipe, module, loader, batches, asked, trainer, single))
                held += len(mine)
                for name, value in _state(module).items():
                    total[name] += len(mine) * value
            server = {name: _narrow(value / held, server[name]) for name, value in total.items()}
            _load(module, server)
            outcome.records.append({"clients": cohort.tolist(), "losses": losses})
    outcome.tensors = server
    return outcome


def _train(
    recipe: Recipe, module: Fuzzed, loader: Any, batches: list[list[int]], asked: Any, trainer: Any, single: bool
) -> float:
    """One client's batches; its mean loss over samples, NaN if it never had one."""
    made: Any = module.configure_optimizers()
    every, clip = trainer.get("accumulate_grad_batches", 1), trainer.get("gradient_clip_val")
    total, samples = 0.0, 0
    for index, positions in enumerate(batches):
        last = asked.is_last_batch = index + 1 == len(batches)
        batch = loader.collate_fn([loader.dataset[position] for position in positions])
        torch.set_default_dtype(torch.float32 if single else torch.float64)
        try:
            if not single and type(batch) in (tuple, list, dict):
                batch = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
            result = module.training_step(batch, index)
        finally:
            torch.set_default_dtype(torch.float32)
        loss = result["loss"] if isinstance(result, dict) else result
        if index % every == 0:
            made.zero_grad()
        if loss is not None:
            (loss.sum() / every).backward()
            total, samples = total + float(loss.detach().sum()) * len(positions), samples + len(positions)
        if last or (index + 1) % every == 0:
            if clip and trainer.get("gradient_clip_algorithm") == "value":
                nn.utils.clip_grad_value_(module.parameters(), clip)
            elif clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            made.step()
    return total / samples if samples else math.nan


def _cut(recipe: Recipe, order: list[int]) -> list[list[int]]:
    """The batches of a pass; with BatchNorm a last one of a single sample joins the one before it, as documented."""
    batches = [list(batch) for batch in BatchSampler(order, recipe.batch_size, recipe.drop_last)]
    if any("batch_norm" in block for block in recipe.blocks) and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved, without torchmetrics' own."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    now = dict((*module.named_parameters(), *module.named_buffers()))
    for name, value in state.items():
        now[name].copy_(value)
    for parameter in module.parameters():
        parameter.grad = None


def _wide(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def _narrow(value: Tensor, like: Tensor) -> Tensor:
    return (value if like.is_floating_point() or like.is_complex() else value.round()).to(like.dtype)
