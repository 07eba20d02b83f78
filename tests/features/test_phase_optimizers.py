"""`CriticalPhase` where modules step their optimizers themselves: several, in turns, often, seldom, past Lightning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.phases import (
    DETECTORS,
    Decision,
    Detector,
    Observation,
    accordion,
    page_hinkley,
    relative_change,
)
from tests.laws import reference

BATCHES = 24


class Gan(pl.LightningModule):
    """Two networks against each other; what differs from module to module is how they are stepped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12))
        self.discriminator = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))

    def score(self, samples: Tensor, real: float) -> Tensor:
        logits = self.discriminator(samples)
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    def made(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.generator(inputs[:, :3])
        return made

    def of_generator(self, inputs: Tensor) -> Tensor:
        return self.score(self.made(inputs), 1.0)

    def of_discriminator(self, inputs: Tensor) -> Tensor:
        return self.score(inputs, 1.0) + self.score(self.made(inputs).detach(), 0.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = cast(list[Any], self.optimizers())
        self.turns(generator, discriminator, batch[0], batch_idx)

    def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
        for optimizer, loss in ((generator, self.of_generator), (discriminator, self.of_discriminator)):
            self.toggle_optimizer(optimizer)
            self.descend(optimizer, loss(inputs))
            self.untoggle_optimizer(optimizer)

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.05, momentum=0.9),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.01),
        ]


class Critics(Gan):
    """The generator steps after every fifth step of the discriminator."""

    def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
        self.descend(discriminator, self.of_discriminator(inputs))
        if batch_idx % 5 == 4:
            self.descend(generator, self.of_generator(inputs))


class Often(Gan):
    """Several steps with each batch."""

    def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
        for _ in range(3):
            self.descend(discriminator, self.of_discriminator(inputs))
        self.descend(generator, self.of_generator(inputs))
        self.descend(generator, self.of_generator(inputs.flip(0)))


class Seldom(Gan):
    """Gradients are added up over batches, and the generator begins late."""

    def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            discriminator.zero_grad()
        self.manual_backward(self.of_discriminator(inputs) / 2)
        if batch_idx % 2:
            discriminator.step()
        if batch_idx % 2 and batch_idx >= 4:
            self.descend(generator, self.of_generator(inputs))


class Partly(Gan):
    """Now and then a layer takes no part."""

    def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
        self.discriminator[0].requires_grad_(batch_idx % 3 > 0)
        super().turns(generator, discriminator, inputs, batch_idx)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Leave the layer alone."""

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Leave the layer alone."""


class Past(Gan):
    """Steps that Lightning does not hear of."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        for optimizer, loss in ((generator, self.of_generator), (discriminator, self.of_discriminator)):
            self.descend(optimizer, loss(batch[0]))


class Search(Gan):
    """One optimizer that asks for gradients several times in each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self.of_discriminator(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.discriminator.parameters(), lr=0.1, max_iter=4)


GANS = [Gan, Critics, Often, Seldom, Partly, Past]
MODULES = [*GANS, Search]
BY_NORM = [name for name, make in DETECTORS.items() if make().needs == "layer_norms"]


class Recorder(Callback):
    """The norms of all gradients before each step, as torch itself tells of them, by number of the optimizer."""

    def __init__(self, change: Callable[[int, Optimizer], None] = lambda number, optimizer: None) -> None:
        self.steps: list[tuple[int, list[float]]] = []
        self._change = change

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._hooks = [
            each.register_step_pre_hook(lambda optimizer, *_, number=number: self._note(number, optimizer))
            for number, each in enumerate(trainer.optimizers)
        ]

    def _note(self, number: int, optimizer: Optimizer) -> None:
        norms = [float(p.grad.norm()) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.steps.append((number, norms))
        self._change(number, optimizer)


def phase(**options: Any) -> CriticalPhase:
    return CriticalPhase(**{"every_n_steps": 1, "noise_every": None, **options})


def data(batches: int = BATCHES, size: int = 8) -> DataLoader[Any]:
    return DataLoader(reference.dataset(batches * size), size, shuffle=False)


def trained(
    module: pl.LightningModule, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> tuple[Tensor, pl.Trainer]:
    options = {"max_epochs": 1, "log_every_n_steps": 10, "logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    checkpoint = None if resume is None else str(resume)
    trainer.fit(module, data(), ckpt_path=checkpoint, weights_only=True)
    return torch.cat([p.detach().flatten() for p in module.parameters()]), trainer


def federated() -> FederatedStrategy:
    return FederatedStrategy(num_clients=4, clients_per_round=3, local_epochs=1)


def by_hand(detector: Detector, steps: list[tuple[int, list[float]]]) -> Iterator[tuple[dict[int, Decision], bool]]:
    """What a detector of its own says of each optimizer after each step, and whether one of them says "critical"."""
    states: dict[int, Any] = {}
    last: dict[int, Decision] = {}
    for number, norms in steps:
        state = states.get(number) or detector.init()
        last[number], states[number] = detector.update(state, Observation(norms))
        yield dict(last), any(decision.critical for decision in last.values())


def critical_steps(callback: CriticalPhase) -> set[int]:
    return {at for first, last in callback.record.spans for at in range(first, last + 1)}


# ---- plain Lightning


@pytest.mark.parametrize(
    ("make", "name"), [*((make, "page_hinkley") for make in GANS), *((Critics, name) for name in BY_NORM)]
)
def test_each_optimizer_has_a_detector_of_its_own(make: type[Gan], name: str) -> None:
    recorder, detector = Recorder(), DETECTORS[name]()
    callback = phase(detector=detector, action="observe", every_n_steps=4)
    trained(make(), callback, recorder)
    judged = recorder.steps[: len(recorder.steps) // 4 * 4]
    assert len(callback.record.rows) == len(judged) > BATCHES // 2
    flags = [critical for _, critical in by_hand(detector, judged)]
    assert critical_steps(callback) == {at for at, flag in enumerate(flags) if flag}
    assert callback.critical == flags[-1]


def test_two_networks_that_take_turns_are_no_noise() -> None:
    """Norms a factor of 1000 apart, each as steady as can be: one detector for both would see change without end."""

    class Steady(Gan):
        def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
            for optimizer, network, size in (
                (generator, self.generator, 1.0),
                (discriminator, self.discriminator, 1e3),
            ):
                total = torch.stack([p.sum() for p in network.parameters()]).sum()
                self.descend(optimizer, size * (1 + 0.001 * (batch_idx % 2)) * total)

    callback = phase(detector=relative_change(0.05, window=4), action="observe")
    trained(Steady(), callback)
    assert callback.record.spans == [[0, 8]]  # until each has made its fifth step
    norms = [row[1] for row in callback.record.rows[1:]]
    assert max(norms) < 1.01 * min(norms)  # of both together


def test_what_has_not_stepped_for_long_is_not_heard() -> None:
    class Pretrained(Gan):
        """The generator for three batches, in the critical warm-up of its detector, and never again."""

        def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
            if self.current_epoch == 0 and batch_idx < 3:
                self.descend(generator, self.of_generator(inputs))
            else:
                self.descend(discriminator, self.of_discriminator(inputs))

    callback = phase(detector=relative_change(1e6, window=4), action="observe")
    trained(Pretrained(), callback, max_epochs=5)
    assert callback.record.spans == [[0, 102]]  # 100 steps after the generator's last
    assert not callback.critical


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize(("strategy", "level"), [("auto", "step"), ("federated", "round"), ("federated", "step")])
def test_observing_changes_no_bit(make: type[Gan], strategy: str, level: Any) -> None:
    def run(*callbacks: Callback) -> tuple[Tensor, dict[str, Any]]:
        kind = federated() if strategy == "federated" else "auto"
        weights, trainer = trained(make(), *callbacks, strategy=kind, max_epochs=2)
        return weights, trainer.callback_metrics

    callback = CriticalPhase(action="observe", level=level, every_n_steps=3)
    ours, metrics = run(callback)
    assert torch.equal(ours, run()[0])
    assert len(callback.record.rows) >= 2
    assert metrics["phase/critical"] in (0.0, 1.0)
    several = {f"phase/{name}/{number}" for name in ("critical", "grad_norm") for number in (0, 1)}
    watched = make is not Search and (strategy == "auto" or level == "step")
    assert several & metrics.keys() == (several if watched else set())


def test_a_step_that_asks_for_gradients_several_times_is_one() -> None:
    callback = phase(action="observe")
    trained(Search(), callback)
    assert len(callback.record.rows) == BATCHES


@pytest.mark.parametrize("make", GANS)
def test_every_optimizers_updates_are_scaled(make: type[Gan]) -> None:
    """Against factors by hand: SGD's gradients and Adam's learning rate, once no optimizer is in its warm-up."""
    detector = relative_change(1e6, window=3)
    seen: list[tuple[int, list[float]]] = []

    def change(number: int, optimizer: Optimizer) -> None:
        group = optimizer.param_groups[0]
        group.setdefault("as_it_was", group["lr"])
        seen.append((number, [1.0]))
        *_, (_, critical) = by_hand(detector, seen)
        factor = 1.0 if critical else 2.0
        if number == 1:
            group["lr"] = group["as_it_was"] * factor
        else:
            torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], factor)

    callback = phase(detector=detector, scale=2.0)
    ours, trainer = trained(make(), callback)
    theirs, _ = trained(make(), Recorder(change))
    assert torch.equal(ours, theirs)
    assert 0 < len(critical_steps(callback)) < len(callback.record.rows)
    assert [group["lr"] for each in trainer.optimizers for group in each.param_groups] == [0.05, 0.01]
    assert not any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in trainer.optimizers)


@pytest.mark.parametrize("make", GANS)
def test_every_optimizers_updates_are_made_noisy(make: type[Gan]) -> None:
    def run(seed: int, target: float = 2) -> list[Tensor]:
        module = make()
        trained(module, phase(action="noise", target_batch=target, noise_in="all", seed=seed))
        return [
            torch.cat([p.detach().flatten() for p in network.parameters()])
            for network in (module.generator, module.discriminator)
        ]

    for one, again, other in zip(run(0), run(0), run(1), strict=True):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    plain, _ = trained(make())
    assert torch.equal(torch.cat(run(0, target=10**6)), plain)  # as large a batch as there is needs no noise


def test_optimizers_have_noise_of_their_own() -> None:
    class Twins(Gan):
        """Two copies of one network, on the same samples: only what is added can tell them apart."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
            self.generator.load_state_dict(self.discriminator.state_dict())

        def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
            for optimizer, network in ((generator, self.generator), (discriminator, self.discriminator)):
                self.descend(optimizer, network(inputs).square().mean())

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.generator, self.discriminator)]

    def apart(**options: Any) -> float:
        module = Twins()
        trained(module, phase(**options))
        one, other = module.generator[0], module.discriminator[0]
        assert isinstance(one, nn.Linear)
        assert isinstance(other, nn.Linear)
        return float((one.weight - other.weight).detach().abs().max())

    assert apart(action="observe") == 0.0
    assert apart(action="noise", target_batch=2, noise_in="all") > 1e-6


def test_a_step_length_that_nothing_changes_is_refused_for_any_optimizer() -> None:
    class Second(Gan):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers()[0], torch.optim.Rprop(self.discriminator.parameters())]

    with pytest.raises(ValueError, match=r"action='scale': .*Rprop"):
        trained(Second(), phase())
    trained(Second(), phase(action="observe"))


@pytest.mark.parametrize("strategy", ["auto", "federated"])
def test_training_without_steps_for_long_goes_on(strategy: str) -> None:
    class Never(Gan):
        """As one that adds gradients up over more batches than there are."""

        def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.of_discriminator(inputs))

    callback = phase(level="step")
    kind = federated() if strategy == "federated" else "auto"
    with pytest.warns(UserWarning, match=r"no gradients were seen in \d+ batches.*critical=True") as said:
        trained(Never(), callback, strategy=kind, max_epochs=4)
    assert len([each for each in said if "no gradients" in str(each.message)]) == 1
    assert callback.record.rows == []
    assert callback.critical


# ---- clients


@pytest.mark.parametrize("make", GANS)
def test_each_clients_optimizers_have_a_detector_of_their_own(make: type[Gan]) -> None:
    class Clients(Recorder):
        def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, client: int) -> None:
            rounds[trainer.global_step, client] = self.steps = []

    rounds: dict[tuple[int, int], list[tuple[int, list[float]]]] = {}
    detector = page_hinkley(false_alarms=30, hold=6)
    callback = phase(detector=detector, level="step", action="observe")
    trained(make(), callback, Clients(), strategy=federated(), max_epochs=6)
    past: dict[int, list[tuple[int, list[float]]]] = defaultdict(list)
    expected = set()
    for round in range(6):
        flags = []
        for client in [client for at, client in rounds if at == round]:
            steps = rounds[round, client]
            past[client] += steps
            if not steps:
                continue
            *_, (last, _) = by_hand(detector, past[client])
            flags += [last[number].critical for number in {number for number, _ in steps}]
        expected |= {round} if any(flags) else set()
    assert critical_steps(callback) == expected
    assert expected


@pytest.mark.parametrize("level", ["round", "step"])
@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_detector_trains_with_clients(level: Any, name: str) -> None:
    detector = DETECTORS[name]()
    callback = CriticalPhase(detector, scale=1.5, level=level, noise_every=2)
    if level == "step" and detector.needs != "layer_norms":
        with pytest.raises(ValueError, match="level='step'"):
            trained(Critics(), callback, strategy=federated(), max_epochs=2)
        return
    weights, _ = trained(Critics(), callback, strategy=federated(), max_epochs=2)
    assert weights.isfinite().all()
    assert len(callback.record.rows) == 2


# ---- checkpoints


PLAIN: list[dict[str, Any]] = [
    {"scale": 1.5, "every_n_steps": 7},
    {"scale": 1.5, "detector": accordion(interval=1, accumulate=5)},
    {"action": "noise", "target_batch": 2, "noise_in": "all"},
]


@pytest.mark.parametrize(
    ("make", "strategy", "options"),
    [
        *((make, "auto", PLAIN[0]) for make in MODULES),
        *((make, "auto", options) for make in (Critics, Partly) for options in PLAIN[1:]),
        *((make, "federated", {"scale": 1.5, "level": "step"}) for make in (Gan, Often, Past)),
        (Gan, "federated", {"scale": 1.5, "level": "round"}),
    ],
)
def test_resuming_is_exact(make: type[Gan], strategy: str, options: dict[str, Any], tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Tensor, CriticalPhase, pl.Trainer]:
        callback = phase(**{"detector": relative_change(0.05, window=3), **options})
        kind = federated() if strategy == "federated" else "auto"
        weights, trainer = trained(make(), callback, resume=resume, strategy=kind, max_epochs=epochs)
        return weights, callback, trainer

    whole, never, _ = run(2)
    _, _, stopped = run(1)
    stopped.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, callback, _ = run(2, tmp_path / "stop.ckpt")
    assert torch.equal(resumed, whole)
    assert str(callback.record.rows) == str(never.record.rows)
    assert callback.record.spans == never.record.spans


@pytest.mark.parametrize("options", PLAIN)
def test_checkpoints_of_one_watched_optimizer_still_load(options: dict[str, Any], tmp_path: Path) -> None:
    """As they were before there could be several; the layer that is frozen had no place among the tensors."""

    class One(Gan):
        def turns(self, generator: Any, discriminator: Any, inputs: Tensor, batch_idx: int) -> None:
            self.descend(discriminator, self.of_discriminator(inputs))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.discriminator[0].requires_grad_(False)
            self.turns(None, self.optimizers(), batch[0], batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.discriminator.parameters(), lr=0.05)

    def run(epochs: int, resume: Path | None = None) -> tuple[Tensor, pl.Trainer]:
        callback = phase(**{"detector": relative_change(0.05, window=3), **options})
        return trained(One(), callback, resume=resume, max_epochs=epochs)

    whole, _ = run(2)
    _, stopped = run(1)
    stopped.save_checkpoint(tmp_path / "now.ckpt")
    checkpoint = torch.load(tmp_path / "now.ckpt", weights_only=True)
    watch = checkpoint["callbacks"]["CriticalPhase"]["watch"]
    ((_, memory),) = watch.pop("optimizers") or [(0, {"sums": [], "summed": 0, "diagonal": None})]
    watch.pop("seen")
    watch["pending"] = [norms for _, norms in watch["pending"]]
    watch |= {"sums": [tensor for _, tensor in memory["sums"]]}
    watch |= {"summed": memory["summed"], "diagonal": memory["diagonal"]}
    assert watch["pending"] or watch["sums"] or watch["diagonal"]
    torch.save(checkpoint, tmp_path / "before.ckpt")
    resumed, _ = run(2, tmp_path / "before.ckpt")
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(("level", "expected"), [("round", {0.07}), ("step", {0.04, 0.03})])
def test_a_detector_sees_every_groups_learning_rate(level: Any, expected: set[float]) -> None:
    """Added up, so that none falls unseen: of each optimizer by itself, in a round of all of them."""

    class Grouped(Gan):
        def configure_optimizers(self) -> Any:
            first, *others = self.discriminator
            groups: list[dict[str, Any]] = [
                {"params": first.parameters()},
                {"params": nn.Sequential(*others).parameters(), "lr": 0.02},
            ]
            return torch.optim.SGD(self.generator.parameters(), lr=0.04), torch.optim.SGD(groups, lr=0.01)

    def update(state: Any, observation: Observation) -> tuple[Decision, Any]:
        seen.add(round(observation.learning_rate, 9))
        return detector.update(state, observation)

    seen: set[float] = set()
    detector = accordion()
    options: dict[str, Any] = {"strategy": federated(), "max_epochs": 2} if level == "round" else {}
    callback = phase(detector=detector._replace(update=update), action="observe", level=level)
    trained(Grouped(), callback, **options)
    assert seen == expected
