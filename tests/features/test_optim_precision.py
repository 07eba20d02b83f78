"""Every precision that Lightning offers on a CPU, against the same arithmetic written by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_fedscale.types import ClientUpdate
from tests.features import local_loops, reference_loop
from tests.features.local_loops import Batches
from tests.laws import reference


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("precision", "dtype", "context"),
    [
        ("32-true", torch.float32, nullcontext),
        ("64-true", torch.float64, nullcontext),
        ("bf16-true", torch.bfloat16, nullcontext),
        ("16-true", torch.float16, nullcontext),
        ("bf16-mixed", torch.float32, autocast),
    ],
)
def test_precision(precision: str, dtype: torch.dtype, context: Callable[[], Any]) -> None:
    by_loop = local_loops.make(reference.Classifier).to(dtype)

    def local(round: int, client: int, batches: Batches) -> None:
        optimizer = by_loop.configure_optimizers()
        for batch in batches:
            optimizer.zero_grad()
            with context():
                loss = local_loops.loss_of(by_loop, batch)
            loss.backward()
            optimizer.step()

    expected = local_loops.rounds(by_loop, local, 3, convert=lambda inputs: inputs.to(dtype))[-1]
    module = local_loops.make(reference.Classifier)
    trainer = local_loops.fit(module, 3, precision=precision)
    assert {value.dtype for value in module.state_dict().values()} == {dtype}
    assert reference.difference(module.state_dict(), expected) == 0.0
    numbers = 12 * 16 + 16 + 16 * 4 + 4
    assert trainer.strategy.last_round.upload_bytes == 4 * numbers * dtype.itemsize  # type: ignore[attr-defined]


def new_scaler() -> Any:
    """One that overflows at first and grows soon, so that clients leave it in different states."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)


class Scales(pl.Callback):
    def __init__(self) -> None:
        self.states: list[tuple[float, int]] = []
        self.at_start: list[float] = []
        self.steps: list[int] = []

    def on_client_start(self, trainer: pl.Trainer, module: Any, client: int) -> None:
        self.at_start.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]

    def on_client_end(self, trainer: pl.Trainer, module: Any, update: ClientUpdate) -> None:
        self.steps.append(update.optimizer_steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        state = trainer.precision_plugin.scaler.state_dict()  # type: ignore[attr-defined]
        self.states.append((state["scale"], state["_growth_tracker"]))


def test_float16_with_loss_scaling() -> None:
    """Each client starts from the round's scale; the next round starts from the smallest that a client left."""
    by_loop = local_loops.make(reference.Classifier)
    left: dict[int, list[tuple[float, int]]] = {}
    starts: list[tuple[float, int]] = []
    steps: list[int] = []

    def local(round: int, client: int, batches: Batches) -> None:
        if round and not left.get(round):
            scale = min(pair[0] for pair in left[round - 1])
            growth = min(pair[1] for pair in left[round - 1] if pair[0] == scale)
            starts.append((scale, growth))
        scaler = new_scaler()
        if round:
            scaler.load_state_dict({**scaler.state_dict(), "scale": starts[-1][0], "_growth_tracker": starts[-1][1]})
        optimizer = by_loop.configure_optimizers()
        steps.append(0)
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = local_loops.loss_of(by_loop, batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(by_loop.parameters(), 0.5)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            steps[-1] += scaler.get_scale() >= before
        state = scaler.state_dict()
        left.setdefault(round, []).append((state["scale"], state["_growth_tracker"]))

    rounds = 12
    expected = local_loops.rounds(by_loop, local, rounds)
    module, scales, snapshots = local_loops.make(reference.Classifier), Scales(), reference_loop.Snapshots()
    plugin = MixedPrecision("16-mixed", "cpu", new_scaler())
    local_loops.fit(module, rounds, plugins=[plugin], gradient_clip_val=0.5, callbacks=[scales, snapshots])
    for got, right in zip(snapshots.after_round, expected[1:], strict=True):
        assert reference.difference(got, right) == 0.0
    assert scales.states[:-1] == starts
    assert scales.at_start == [2.0**20] * 4 + [scale for scale, _ in starts for _ in range(4)]
    assert scales.steps == steps  # those that the scaler took
    assert 0 in steps
    # Steps were skipped at first, later ones were not, and clients of one round did differ.
    assert reference.difference(expected[0], expected[1]) == 0.0
    assert reference.difference(expected[-2], expected[-1]) > 0.0
    assert any(len(set(pairs)) > 1 for pairs in left.values())


class Unread(torch.amp.GradScaler):
    """One whose scale must not be read while a client trains, since on a GPU each read waits for the device."""

    in_client = False

    def get_scale(self) -> float:
        assert not self.in_client
        return super().get_scale()


class InClient(pl.Callback):
    def __init__(self, scaler: Unread) -> None:
        self.scaler = scaler
        self.steps = 0

    def on_client_start(self, trainer: pl.Trainer, module: Any, client: int) -> None:
        self.scaler.in_client = True

    def on_client_end(self, trainer: pl.Trainer, module: Any, update: ClientUpdate) -> None:
        self.scaler.in_client = False
        self.steps += update.optimizer_steps


def test_counting_steps_does_not_read_the_scale() -> None:
    scaler = Unread("cpu", init_scale=2.0)
    watching = InClient(scaler)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    local_loops.fit(local_loops.make(reference.Classifier), 1, plugins=[plugin], callbacks=[watching])
    assert watching.steps > 0


def test_16_mixed_by_name_is_what_lightning_makes_of_it_on_a_cpu() -> None:
    results = []
    for precision, context in (("bf16-mixed", nullcontext()), ("16-mixed", pytest.warns(match="Using .*bf16-mixed"))):
        module = local_loops.make(reference.Classifier)
        with context:
            local_loops.fit(module, 2, precision=precision)
        results.append(module.state_dict())
    assert reference.difference(*results) == 0.0
