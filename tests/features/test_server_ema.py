"""ServerEMA: the average of global models, by hand; and why the scaling rule is what it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import RoundEvents, ServerEMA
from lightning_fedscale.samplers import uniform
from lightning_fedscale.types import IntArray
from tests.laws import reference


class Watch(RoundEvents):
    """Every round's global model."""

    def __init__(self) -> None:
        self.models: list[dict[str, torch.Tensor]] = []

    def on_round_end(self, trainer: Any, pl_module: Any, record: Any) -> None:
        self.models.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def growing(*, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
    """One client, two, three, ..."""
    return uniform(seed=seed, round=round, num_clients=num_clients, clients_per_round=1 + round)


def train(ema: ServerEMA, rounds: int, folder: Path, ckpt: str | None = None) -> tuple[pl.LightningModule, Watch]:
    module, watch = reference.make_module(), Watch()
    trainer = reference.quiet_trainer(
        max_epochs=rounds,
        strategy=FederatedStrategy(num_clients=6, sampler=growing, executor="sequential"),
        callbacks=[ema, watch, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        enable_checkpointing=True,
    )
    trainer.fit(module, reference.loader(reference.dataset()), ckpt_path=ckpt)
    return module, watch


def test_it_averages_the_global_model_of_each_round(tmp_path: Path) -> None:
    module, watch = train(ServerEMA(decay=0.8, reference_clients=2), 5, tmp_path / "whole")
    expected = dict(watch.models[0])
    for round, model in enumerate(watch.models[1:], start=1):
        decay = 0.8 ** ((1 + round) / 2)
        expected = {name: decay * expected[name] + (1 - decay) * model[name] for name in model}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, watch.models[-1][name]) for name, value in module.state_dict().items())


def test_interruption_does_not_matter(tmp_path: Path) -> None:
    whole, _ = train(ServerEMA(decay=0.8, reference_clients=2), 5, tmp_path / "whole")
    resumed, _ = train(
        ServerEMA(decay=0.8, reference_clients=2), 5, tmp_path / "again", str(tmp_path / "whole" / "epoch=2.ckpt")
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_scaling_rule_by_its_own_argument() -> None:
    """``kappa`` small rounds and one large one leave the average in the same place, as far as the model moved little.

    Exactly for a model that stays; for one that moves by ``step`` a round the difference is in proportion to it.
    """
    ema, kappa = ServerEMA(decay=0.9, reference_clients=10), 4

    def difference(step: float) -> float:
        small = large = 1.0
        for i in range(1, kappa + 1):
            small = ema.decay_of(10) * small + (1 - ema.decay_of(10)) * i * step
        decay = ema.decay_of(10 * kappa)
        large = decay * large + (1 - decay) * kappa * step
        return large - small

    assert abs(difference(0.0)) < 1e-15
    assert difference(0.02) / difference(0.01) == pytest.approx(2.0)
    # Without the rule it would not even hold for a model that stays.
    assert abs(0.9 - 0.9**kappa) > 0.2


def test_integer_buffers_are_copied() -> None:
    average = ServerEMA(decay=0.5)._average
    assert average(torch.tensor(4), torch.tensor(9), 1).item() == 9
    assert average(torch.tensor(4.0), torch.tensor(9.0), 1).item() == 6.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0: pass a number in \[0, 1\)"),
        ({"reference_clients": 0}, "reference_clients=0: pass"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerEMA(**options)


def test_other_strategies_are_refused() -> None:
    trainer = reference.quiet_trainer(max_epochs=1, callbacks=[ServerEMA()])
    with pytest.raises(TypeError, match="ServerEMA averages over rounds"):
        trainer.fit(reference.make_module(), reference.loader(reference.dataset()))


def test_without_a_reference_every_round_counts_alike() -> None:
    assert np.unique([ServerEMA(0.9).decay_of(clients) for clients in (1, 10, 100)]).tolist() == [0.9]


def test_the_average_is_where_the_model_is_trained() -> None:
    """When the average is made, Lightning has not brought the module to its device yet."""

    class Elsewhere(FederatedStrategy):
        root_device = torch.device("meta")

    trainer: Any = SimpleNamespace(global_step=0, strategy=Elsewhere(num_clients=2))
    for given, expected in ((None, "meta"), ("cpu", "cpu")):
        ema = ServerEMA(device=given)
        ema.setup(trainer, reference.make_module(), "fit")
        assert ema._average_model is not None
        assert {parameter.device.type for parameter in ema._average_model.parameters()} == {expected}
