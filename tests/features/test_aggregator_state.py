"""What an aggregator keeps between rounds: saved, resumed, given up, and refused where it is another's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fedscale import FederatedStrategy, aggregators
from lightning_fedscale.aggregators import Aggregator, Stack, centered_clipping, mean, median, stacked
from lightning_fedscale.types import Cohort
from tests.laws import reference
from tests.strategies import sequential
from tests.unit.test_contracts import example


def halfway(stack: Stack, cohort: Cohort, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Half of the previous aggregate and half of the mean; what is kept is the very tensor that is returned."""
    delta = 0.5 * (state["last"] + stack.deltas.mean(dim=0))
    return delta, {"last": delta, "rounds": state["rounds"] + 1}


def slow(start: float = 0.0) -> Aggregator:
    init_state = lambda like, cohort: {"last": torch.full_like(like, start), "rounds": 0}  # noqa: E731
    return stacked(mean("uniform").weigh, halfway, init_state)


def fit(
    aggregator: Any, rounds: int = 4, ckpt: Path | None = None, *callbacks: pl.Callback, save: Path | None = None
) -> tuple[dict[str, Tensor], FederatedStrategy]:
    strategy = sequential(6, clients_per_round=5, aggregator=aggregator)
    trainer = reference.quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[*callbacks])
    module = reference.make_module()
    trainer.fit(module, reference.loader(reference.dataset(48)), ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.state_dict(), strategy


def saved(folder: Path, aggregator: Any) -> Path:
    """A checkpoint after two rounds."""
    fit(aggregator, 2, save=folder / "at.ckpt")
    return folder / "at.ckpt"


def state_in(path: Path) -> Any:
    return torch.load(path, weights_only=True)["federated"]["server"].get("aggregator")


def states_of(strategy: FederatedStrategy) -> dict[str, Any]:
    assert strategy._federation is not None
    return strategy._federation.fit.server.states


def test_a_rule_from_scratch_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    path = saved(tmp_path, slow())
    state = state_in(path)
    assert state["rounds"] == 2
    assert float(state["last"].norm()) > 0
    whole, _ = fit(slow())
    resumed, strategy = fit(slow(), 4, path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert states_of(strategy)["aggregator"]["rounds"] == 4


def test_the_state_is_what_it_was_whatever_becomes_of_the_delta() -> None:
    """SCAFFOLD, callbacks and the server may write to the aggregated delta."""

    class Zeroes(pl.Callback):
        def on_before_server_step(self, trainer: Any, module: Any, record: Any, delta: dict[str, Tensor]) -> None:
            for value in delta.values():
                value.zero_()

    _, strategy = fit(slow(), 1, None, Zeroes())
    record = strategy.last_round
    assert record is not None
    assert float(states_of(strategy)["aggregator"]["last"].norm()) == pytest.approx(record.delta_norm) != 0


def test_the_first_state_is_made_by_the_rule() -> None:
    far, near = fit(slow(1.0), 1)[0], fit(slow(0.0), 1)[0]
    assert all(torch.allclose(far[name], near[name] - 0.5, atol=1e-6) for name in far)


def test_a_round_that_fails_leaves_the_state_of_the_round_before() -> None:
    class Fails(pl.Callback):
        def on_before_server_step(self, trainer: pl.Trainer, module: Any, record: Any, delta: Any) -> None:
            if trainer.global_step == 2:
                raise LookupError

    strategy = sequential(6, aggregator=slow())
    trainer = reference.quiet_trainer(max_epochs=4, strategy=strategy, callbacks=[Fails()])
    with pytest.raises(LookupError):
        trainer.fit(reference.make_module(), reference.loader(reference.dataset(48)))
    assert states_of(strategy)["aggregator"]["rounds"] == 2


def test_a_checkpoint_inside_a_client_has_the_state_of_the_rounds_start(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_client_end(self, trainer: pl.Trainer, module: Any, update: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    fit(slow(), 4, None, Saves())
    assert state_in(tmp_path / "inside.ckpt")["rounds"] == 2


def test_the_state_of_another_rule_is_refused_and_given_up_by_a_rule_without(tmp_path: Path) -> None:
    path = saved(tmp_path, centered_clipping(1.0))
    with pytest.raises(ValueError, match=r"aggregator='a custom rule' differs from 'centered_clipping\(radius=1"):
        fit(slow(), 4, path)
    with pytest.warns(UserWarning, match=r"aggregator=None differs from centered_clipping\("):
        _, strategy = fit(median(), 4, path)
    assert "aggregator" not in states_of(strategy)


def test_other_arguments_of_the_same_rule_take_the_state_over(tmp_path: Path) -> None:
    path = saved(tmp_path, centered_clipping(1.0))
    center = state_in(path)
    # With so short a radius the aggregate stays where it was.
    with pytest.warns(UserWarning, match=r"aggregator=centered_clipping\(radius=1e-09.* differs from"):
        _, strategy = fit(centered_clipping(1e-9), 3, path)
    torch.testing.assert_close(states_of(strategy)["aggregator"], center, rtol=0, atol=2e-9)


@pytest.mark.parametrize("then", [median(), centered_clipping(1.0)], ids=["median", "centered clipping"])
def test_checkpoints_from_before_there_was_a_state_are_resumed(then: Aggregator, tmp_path: Path) -> None:
    path = saved(tmp_path, median())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["federated"]["settings"]["aggregator"]  # as versions before wrote it
    assert "aggregator" not in checkpoint["federated"]["server"]
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, strategy = fit(then, 4, path)
    told = [str(each.message) for each in caught if str(each.message).startswith("ckpt_path: ")]
    assert len(told) == ("aggregator" in states_of(strategy)) == (then.kept is not None)


class Remembers:
    """The same rule as `slow`, with a memory that nobody knows of."""

    def __init__(self) -> None:
        self.last: Any = 0.0

    def __call__(self, total: Tensor, cohort: Cohort) -> Tensor:
        self.last = 0.5 * (self.last + mean().finish_with(total, cohort, None)[0])
        return self.last.clone()


def in_closure() -> Any:
    last: Any = 0.0

    def finish(total: Tensor, cohort: Cohort) -> Tensor:
        nonlocal last
        last = 0.5 * (last + mean().finish_with(total, cohort, None)[0])
        return last.clone()

    return finish


@pytest.mark.parametrize("finish", [Remembers(), in_closure()], ids=["attribute", "closure"])
def test_a_memory_that_no_checkpoint_has_is_noticed(finish: Any) -> None:
    with pytest.warns(UserWarning, match=r"aggregator: finish.*last .*round 0.*init_state"):
        fit(mean()._replace(finish=finish), 2)


@pytest.mark.parametrize("name", aggregators.FACTORIES)
def test_no_rule_of_this_package_is_suspected(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="aggregator:")
        fit(example("aggregators", name), 1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (slow()._replace(init_state=None), r"missing 1 required positional argument: 'state'"),
        (
            mean()._replace(finish=lambda total, cohort, state: (total[:-1], state)),
            r"'state'.*: pass a function of \(total, cohort\), .*init_state",
        ),
        (slow()._replace(finish=mean().finish), r"too many.*: pass a function of \(total, cohort, state\)\."),
        (
            slow()._replace(finish=lambda total, cohort, state: total[:5]),
            r"Tensor: return a tuple",
        ),
        (
            mean()._replace(finish=lambda total, cohort: (total[:-1], 0)),  # type: ignore[arg-type]
            r"tuple: return the delta, a tensor",
        ),
        (
            slow()._replace(finish=lambda total, cohort, state: (total[:-1], {"last": [np.ones(2)]})),
            r"aggregator: its state .* ndarray",
        ),
        (
            slow()._replace(finish=lambda total, cohort, state: (total[:-1], np.float64(1))),
            r"aggregator: its state .* float64",
        ),
    ],
)
def test_rules_that_do_not_keep_to_the_shape_are_told(rule: Aggregator, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fit(rule, 1)
