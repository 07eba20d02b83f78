"""Layers that are frozen and unfrozen while training goes on, by whoever does it, also in runs that are resumed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_fedscale import FederatedStrategy, aggregators, compressors, local_rules, server
from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.server.asynchrony import FedBuff
from tests.features import reference_loop
from tests.laws import reference
from tests.unit.test_contracts import example

CLIENTS = 3
EPOCHS = 5


class Model(pl.LightningModule):
    """A backbone with BatchNorm, which has a mode of its own, and a head; the optimizer holds what is trainable."""

    optimizer: Callable[..., Any] = staticmethod(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), weight_norm(nn.Linear(8, 8)))
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Adagrad(Model):
    """Its state is there, and is not zero, before the first step."""

    optimizer = staticmethod(lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1))


class Scheduled(Model):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class Hooked(Model):
    """Unfreezes and freezes by itself, in an optimizer that holds everything; hooks on the gradients go along."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)
        self.head.weight.register_hook(lambda gradient: 2 * gradient)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch in (1, 3):
            self.backbone.requires_grad_(self.current_epoch == 1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class InClients(Model):
    """Clients unfreeze the backbone from the third round on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2:
            self.backbone.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Backbone(BackboneFinetuning):
    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=2, train_bn=False)

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


class Gradually(BaseFinetuning):
    """Nothing is trainable before the first epoch; a layer more is in each."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        layers = [pl_module.head, pl_module.backbone[3], pl_module.backbone[1], pl_module.backbone[0]]
        if epoch < len(layers):
            self.unfreeze_and_add_param_group(layers[epoch], optimizer)


class Plainly(Callback):
    """A project's own, which keeps nothing in checkpoints: groups are added, and layers are frozen again later."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.backbone.requires_grad_(False).eval()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone[0].requires_grad_(True).train()
            trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone[0].parameters()), "lr": 0.02})
        if trainer.current_epoch == 2:
            pl_module.backbone[1:].requires_grad_(True).train()
            trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone[1:].parameters())})
        if trainer.current_epoch == 3:
            pl_module.backbone.requires_grad_(False).eval()
            trainer.accumulate_grad_batches = 2


class HeadFirst(Model):
    """The optimizer holds what is frozen, too."""

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.head.parameters())


class Flat(Model):
    """Without layers whose weights are parametrized, which cannot be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 8), nn.ReLU())


RUNS: dict[str, tuple[type[Model], Callable[[], list[Callback]], dict[str, Any]]] = {
    "backbone": (Model, lambda: [Backbone()], {}),
    "backbone, kept": (Scheduled, lambda: [Backbone()], {"client_optimizer": "keep"}),
    "gradually": (HeadFirst, lambda: [Gradually()], {}),
    "own callback": (Model, lambda: [Plainly()], {}),
    "own callback, kept": (Model, lambda: [Plainly()], {"client_optimizer": "keep", "rounds_per_epoch": 2}),
    "module": (Hooked, list, {"client_optimizer": "keep"}),
    "state from the start": (Adagrad, lambda: [Backbone()], {}),
    "in clients": (InClients, list, {}),
    "personal backbone": (Model, lambda: [Backbone()], {"personal": ["backbone.0.*"]}),
    "personal head": (Model, lambda: [Backbone()], {"personal": ["head.*"]}),
}


def fit(
    name: str, executor: str = "sequential", *, folder: Path | None = None, ckpt: Path | None = None, **options: Any
) -> pl.Trainer:
    kind, callbacks, strategy = RUNS[name]
    torch.manual_seed(0)
    module, every = kind(), callbacks()
    if folder is not None:
        saves = {"every_n_train_steps": 1, "save_top_k": -1, "auto_insert_metric_name": False}
        every.append(ModelCheckpoint(folder, filename="{step}", **saves))  # type: ignore[arg-type]
        every.append(ModelCheckpoint(folder, filename="validated-{epoch}", **{**saves, "every_n_train_steps": None,
                     "every_n_epochs": 1, "save_on_train_epoch_end": False}))  # type: ignore[arg-type]  # fmt: skip
    made = FederatedStrategy(partitioner=reference.equal_clients(CLIENTS, 16), executor=executor, **strategy)  # type: ignore[arg-type]
    trainer = reference.quiet_trainer(
        max_epochs=EPOCHS,
        strategy=made,
        callbacks=every,
        **{"enable_checkpointing": folder is not None, **options},
    )
    data = reference.dataset(48)
    trainer.fit(module, reference.loader(data), reference.loader(data, shuffle=False), ckpt_path=ckpt)
    return trainer


def outcome(trainer: pl.Trainer) -> dict[str, Any]:
    """The model, and all that decides how training would go on."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "model": reference_loop.state_of(module),
        "trainable": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
        "modes": {n: (m.training, getattr(m, "track_running_stats", None)) for n, m in module.named_modules()},
        "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "options": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }  # fmt: skip


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    rest = all(left[key] == right[key] for key in ("trainable", "modes", "groups", "options"))
    return rest and reference_loop.same(left["model"], right["model"])


@pytest.mark.parametrize("name", RUNS)
def test_resumed_after_any_round_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = outcome(fit(name, folder=tmp_path))
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) >= 2 * EPOCHS
    for path in saved:
        assert same(outcome(fit(name, ckpt=path)), whole), path.name


@pytest.mark.parametrize("name", RUNS)
def test_both_executors_train_what_is_trainable(name: str, tmp_path: Path) -> None:
    one, many = outcome(fit(name)), outcome(fit(name, "vectorized", folder=tmp_path))
    for tensor, value in one["model"].items():
        torch.testing.assert_close(many["model"][tensor], value, rtol=1e-4, atol=1e-5)
    assert {**one, "model": 0} == {**many, "model": 0}
    assert same(outcome(fit(name, "vectorized", ckpt=tmp_path / "3.ckpt")), many)


@pytest.mark.parametrize("name", ["backbone, kept", "gradually", "own callback", "module"])
def test_one_client_learns_what_the_plain_trainer_learns(name: str) -> None:
    kind, callbacks, _ = RUNS[name]
    results = []
    data = reference.dataset(32)
    for strategy in ("auto", FederatedStrategy(num_clients=1, client_optimizer="keep", executor="sequential")):
        torch.manual_seed(0)
        module = kind()
        norm = module.backbone[1]
        assert isinstance(norm, nn.BatchNorm1d)
        norm.momentum = 0.0
        trainer = reference.quiet_trainer(max_epochs=4, strategy=strategy, callbacks=callbacks())
        trainer.fit(module, reference.loader(data, 16, shuffle=False))
        results.append(outcome(trainer))
    assert reference_loop.same(results[0]["model"], results[1]["model"])
    assert results[0]["trainable"] == results[1]["trainable"]


ROOMS = {
    "server_optimizer": "server",
    "local_rule": "local_rules",
    "compressor": "compressors",
    "downlink_compressor": "compressors",
    "aggregator": "aggregators",
}
# In place of the README's examples: rules for so few clients, wrappers, and schedules that are short enough to matter.
GIVEN: dict[str, Callable[[], Any]] = {
    "error_feedback": lambda: compressors.error_feedback(compressors.top_k()),
    "phase_driven": lambda: compressors.phase_driven(CriticalPhase(), compressors.top_k(), compressors.sign()),
    "krum": lambda: aggregators.krum(0),
    "multi_krum": lambda: aggregators.multi_krum(0, 2),
    "from_torch": lambda: server.from_torch(torch.optim.SGD, lr=0.7, momentum=0.9),
    "chain": lambda: server.chain(server.trace(0.9), server.scale(0.5)),
    "scheduled": lambda: server.scheduled(server.fed_avg(), torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
}
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"{argument}={name}": lambda argument=argument, name=name, room=room: {  # type: ignore[misc]
            argument: GIVEN[name]() if name in GIVEN else example(room, name)
        }
        for argument, room in ROOMS.items()
        for name in import_module(f"lightning_fedscale.{room}").FACTORIES
    },
    "personal=Ditto": lambda: {"personal": local_rules.Ditto(0.1)},
    "mode=async": lambda: {"mode": FedBuff(seconds=[1.0, 2.0, 3.0])},
    "compressor=error_feedback": lambda: {"compressor": GIVEN["error_feedback"]()},
}


class Exactly(Model):
    """With the one optimizer that every local rule knows."""

    optimizer = staticmethod(lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_when_layers_are_unfrozen_or_says_that_it_cannot(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for some parameters must not be taken for others."""

    def run(**options: Any) -> dict[str, Any]:
        monkeypatch.setitem(RUNS, "method", (Exactly, lambda: [Backbone()], METHODS[method]()))
        return outcome(fit("method", **options))

    whole, refusal = None, ""
    try:
        whole = run(folder=tmp_path)
    except ValueError as error:
        refusal = str(error)
    if whole is not None:
        assert "backbone.0.bias" in whole["trainable"]
        assert same(run(ckpt=tmp_path / "4.ckpt"), whole)
        return
    assert f"{method.partition('=')[0]}=" in refusal
    assert "'backbone.0.bias' is trainable now" in refusal
    with pytest.raises(ValueError, match=r"'backbone\.0\.bias' is trainable now"):
        run(ckpt=tmp_path / "2.ckpt")


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
@pytest.mark.parametrize("ticket", [True, False])
def test_pruned_models_resume_pruned(
    ticket: bool, executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning saves them in another form, from which it would train all of the weights again."""
    # A second ticket is not the first weights in a run that is not resumed: Lightning's copy of them is trained along.
    epochs = (1,) if ticket else (1, 3)

    def callbacks() -> list[Callback]:
        return [
            ModelPruning(
                "l1_unstructured",
                amount=lambda epoch: 0.3 if epoch in epochs else 0,
                use_lottery_ticket_hypothesis=ticket,
            ),
            ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ]

    monkeypatch.setitem(RUNS, "pruned", (Flat, callbacks, {"client_optimizer": "keep"}))
    whole = outcome(fit("pruned", executor, enable_checkpointing=True))
    assert (whole["model"]["backbone.0.weight"] == 0).any()
    for epoch in range(EPOCHS - 1):
        again = fit("pruned", executor, enable_checkpointing=True, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert same(outcome(again), whole), epoch


class Saving(InClients):
    """Saves a checkpoint while a client trains that has just unfrozen the backbone."""

    path: Path | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.path is not None and self.trainer.global_step == 2 and batch_idx == 1:
            self.trainer.save_checkpoint(self.path)
        return super().training_step(batch, batch_idx)


def test_saved_inside_a_client_the_flags_are_those_of_the_rounds_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "saving", (Saving, list, {}))
    monkeypatch.setattr(Saving, "path", tmp_path / "inside.ckpt")
    whole = outcome(fit("saving"))
    monkeypatch.setattr(Saving, "path", None)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["federated"]["flags"]
    assert not saved["trainable"]["backbone.0.weight"]
    assert saved["trainable"]["head.weight"]
    assert same(outcome(fit("saving", ckpt=tmp_path / "inside.ckpt")), whole)


def test_checkpoints_of_earlier_versions_still_load(tmp_path: Path) -> None:
    whole = outcome(fit("backbone", folder=tmp_path))
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    for name in ("flags", "accumulation"):
        del saved["federated"][name]
    torch.save(saved, tmp_path / "old.ckpt")
    assert same(outcome(fit("backbone", ckpt=tmp_path / "old.ckpt")), whole)


def test_another_accumulation_asked_for_on_resume_holds(tmp_path: Path) -> None:
    fit("own callback", folder=tmp_path, accumulate_grad_batches=3)
    trainers = {every: fit("own callback", ckpt=tmp_path / "4.ckpt", accumulate_grad_batches=every) for every in (3, 4)}
    assert [trainers[every].strategy.local_accumulation for every in (3, 4)] == [2, 4]  # type: ignore[attr-defined]


class Frozen(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.requires_grad_(trainer.current_epoch != 2)


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_a_round_in_which_nothing_can_be_learnt_is_refused(executor: Any) -> None:
    torch.manual_seed(0)
    module, snapshots = Model(), reference_loop.Snapshots()
    strategy = FederatedStrategy(num_clients=3, executor=executor)
    trainer = reference.quiet_trainer(max_epochs=4, strategy=strategy, callbacks=[Frozen(), snapshots])
    with pytest.raises(ValueError, match=r"the model has 9 parameter tensors .*requires_grad=True"):
        trainer.fit(module, reference.loader(reference.dataset(48)))
    assert trainer.global_step == 2
    assert reference_loop.same(reference_loop.state_of(module), snapshots.after_round[-1])
