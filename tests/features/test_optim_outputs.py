"""What ``training_step`` and ``on_train_batch_start`` may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference
from tests.strategies import sequential

INDICES = [0, 0, 0, 1, 0, 1, 2]
"""``batch_idx`` of a round's local batches: four clients with 1, 1, 2 and 3 of them."""


class Module(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


def loop(rounds: int, step: Callable[[Any, Optimizer, list[Tensor], int], None]) -> reference_loop.State:
    module = local_loops.make(Module)

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = module.configure_optimizers()
        for index, batch in enumerate(batches):
            step(module, optimizer, batch, index)

    return local_loops.rounds(module, local, rounds)[-1]


def usual(module: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
    optimizer.zero_grad()
    local_loops.loss_of(module, batch).backward()
    optimizer.step()


class Dictionary(Module):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[dict[str, Any]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "size": len(batch[0]), "index": batch_idx, "inputs": batch[0]}

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        assert torch.equal(outputs["inputs"], batch[0])
        self.outputs.append(outputs)


def test_dictionary_with_extras() -> None:
    module = local_loops.make(Dictionary)
    trainer = local_loops.fit(module, 1)
    assert reference.difference(module.state_dict(), loop(1, usual)) == 0.0
    assert [output["size"] for output in module.outputs] == [3, 8, 8, 5, 8, 8, 5]
    assert [output["index"] for output in module.outputs] == INDICES
    assert not any(output["loss"].requires_grad for output in module.outputs)
    weighted = sum(float(output["loss"]) * output["size"] for output in module.outputs) / 45
    assert float(trainer.callback_metrics["round/loss"]) == pytest.approx(weighted, rel=1e-6)


class Nothing(Module):
    """No loss for small batches; so client 0, whose only batch has 3 samples, learns nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[tuple[float, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if len(batch[0]) < 8:
            return None
        loss = super().training_step(batch, batch_idx)
        self.losses.append((float(loss.detach()), len(batch[0])))
        return {"loss": loss} if batch_idx else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_none_for_some_batches() -> None:
    module, clients = local_loops.make(Nothing), local_loops.Clients()
    trainer = local_loops.fit(module, 3, callbacks=[clients])

    def step(by_loop: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
        if len(batch[0]) == 8:
            usual(by_loop, optimizer, batch, index)

    assert reference.difference(module.state_dict(), loop(3, step)) == 0.0
    assert float(clients.deltas[0][0].abs().max()) == 0.0
    record = trainer.strategy.last_round  # type: ignore[attr-defined]
    assert record.samples.tolist() == [3, 8, 13, 21]
    assert record.losses[0] != record.losses[0]
    last = module.losses[-4:]
    assert record.losses[1:].tolist() == pytest.approx([last[0][0], last[1][0], (last[2][0] + last[3][0]) / 2])


class Stopping(Module):
    """Ends the client's epoch before its second batch by returning -1."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[int] = []

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> int | None:
        self.started.append(batch_idx)
        return -1 if batch_idx == 1 else None


@pytest.mark.parametrize("workers", [0, 1])
def test_minus_one_ends_the_clients_round(workers: int) -> None:
    """The next client gets its own batches all the same."""
    module = local_loops.make(Stopping)
    strategy = sequential(partitioner=reference_loop.partition())
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(reference_loop.data(), batch_size=8, num_workers=workers))
    assert module.started == [0, 0, 0, 1, 0, 1] * 2

    def step(by_loop: Any, optimizer: Optimizer, batch: list[Tensor], index: int) -> None:
        if index == 0:
            usual(by_loop, optimizer, batch, index)

    assert reference.difference(module.state_dict(), loop(2, step)) == 0.0
    assert strategy.last_round is not None
    assert strategy.last_round.local_steps.tolist() == [1, 1, 1, 1]
    assert strategy.last_round.samples.tolist() == [3, 8, 8, 8]
