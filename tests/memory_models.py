"""Memory models that tests share, and the account that torch's own allocator keeps of real steps."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_fedscale.devices import SIMULATED, MemoryModel, estimate_memory
from lightning_fedscale.devices.profiling import scratch
from tests.keepers import KEEPERS
from tests.networks import GPT, KINDS, Classifier, mlp, resnet18, vectors


def given_out(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out in a step, by its own account, hidden copies included."""
    gc.disable()  # what earlier tests left in cycles would count as given back
    torch._C._autograd._enable_profiler_legacy(scratch._MEMORY)
    try:
        step()
    finally:
        threads = torch._C._autograd._disable_profiler_legacy()
        gc.enable()
    events: list[Any] = [event for thread in threads for event in thread]  # torch says that their kind is an int
    alive = [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
    return int(np.cumsum(alive).max())


def tracked(module: Any, batch: Any, *, accumulate: int = 1, dtype: torch.dtype | None = None) -> int:
    """Peak of two optimizer steps on real tensors, in the order in which Lightning runs them."""
    module = copy.deepcopy(module)
    module.log = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()
    there = [*module.parameters(), *module.buffers(), *tree_leaves(batch)]

    def closure(drop: bool) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = module.training_step(batch, 0)
        if drop:
            optimizer.zero_grad()
        (loss / accumulate).backward()
        return loss

    def steps() -> None:
        for batches in (1, accumulate):
            for number in range(batches):
                if number < batches - 1:
                    closure(number == 0)
                else:
                    optimizer.step(lambda drop=batches == 1: closure(drop))

    return given_out(steps) + sum(tensor.numel() * tensor.element_size() for tensor in there)


def allocated(model: MemoryModel, batch: int) -> int:
    """What of a peak torch's allocator gives out in a step: neither what libraries keep, nor what a round does."""
    return model.peak(batch) - kept(model, batch) - model.kept_besides


def kept(model: MemoryModel, batch: int) -> int:
    """What libraries keep for themselves."""
    return model.breakdown(batch).get("libraries", 0)


# One layer of a kind shows as much as several, of which the GPT with checkpointing has two.
SHORTER: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(width=16, stages=2, blocks=1),
    "gpt": lambda: GPT(layers=1),
    "gpt with checkpointing": lambda: GPT(saving=True),
    "encoder": lambda: nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(32 * 8, 10)
    ),
}


NETWORKS = {kind: (SHORTER.get(kind, make), batch_of) for kind, (make, batch_of) in KINDS.items()}


def assumed(module: Any, batch: Any, **options: Any) -> MemoryModel:
    """A memory model for which no process is started to measure what libraries keep: the usual is assumed."""
    with mock.patch.object(sys, "executable", ""):
        return estimate_memory(module, batch, **options)


@cache
def model_of(kind: str) -> MemoryModel:
    """The memory model that several tests ask; see `assumed`."""
    make, batch_of = NETWORKS[kind]
    return assumed(Classifier(make()), batch_of(2), extras=SIMULATED)


@cache
def keeper(kind: str) -> MemoryModel:
    """The memory model that several tests ask, with what libraries keep."""
    return KEEPERS[kind].model()


@cache
def small() -> MemoryModel:
    """The memory model that several tests ask, without extras."""
    return estimate_memory(Classifier(mlp()), vectors(2))


def as_new(model: MemoryModel) -> MemoryModel:
    """A copy that has run the smallest batch only."""
    again = copy.copy(model)
    again._known = {model.smallest: model._known[model.smallest]}
    return again
