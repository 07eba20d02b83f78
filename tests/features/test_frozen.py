"""Frozen parameters, which cost nothing until local training writes to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.local_rules import Ditto, fed_prox
from lightning_fedscale.server.asynchrony import FedBuff
from tests.features import reference_loop
from tests.laws import reference

SIZES = reference_loop.SIZES
NAMED: dict[str, Any] = {"buffers": {"teacher.*": "mean"}}


class Student(pl.LightningModule):
    """A student, a frozen backbone, and a frozen teacher to which ``write`` writes after each loss."""

    def __init__(self, write: Callable[[Student, int], object] = lambda module, batch_idx: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(12, 8).requires_grad_(False)
        self.student = nn.Linear(8, 4)
        self.teacher = nn.Linear(8, 4).requires_grad_(False)
        self.write = write
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        hidden = torch.relu(self.backbone(batch[0]))
        output, aim = self.student(hidden), self.teacher(hidden)
        loss = nn.functional.cross_entropy(output, batch[1]) + 0.1 * (output - aim).square().mean() / self.steps
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.write(self, batch_idx)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps"] = self.steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class InHook(Student):
    """Writes when a batch has ended, through the data."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)


class Unfreezing(Student):
    """Clients unfreeze the teacher, which the optimizer then trains."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.teacher.requires_grad_(True)


def in_place(module: Student, batch_idx: int) -> None:
    with torch.no_grad():
        for mine, other in zip(module.teacher.parameters(), module.student.parameters(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)


def by_foreach(module: Student, batch_idx: int) -> None:
    torch._foreach_lerp_([p.data for p in module.teacher.parameters()], [*module.student.parameters()], 0.1)


def replaced(module: Student, batch_idx: int) -> None:
    for mine, other in zip(module.teacher.parameters(), module.student.parameters(), strict=True):
        mine.data = mine.data * 0.9 + other.data * 0.1


def assigned(module: Student, batch_idx: int) -> None:
    module.teacher.weight = nn.Parameter(module.teacher.weight.data + 0.1, requires_grad=False)


def loaded(module: Student, batch_idx: int) -> None:
    module.teacher.load_state_dict(module.student.state_dict())


def at_the_end(module: Student, batch_idx: int) -> None:
    if batch_idx == 2:  # clients with fewer batches never do
        in_place(module, batch_idx)


def later(module: Student, batch_idx: int) -> None:
    if module.trainer.global_step >= 2:
        in_place(module, batch_idx)


def later_through_data(module: Student, batch_idx: int) -> None:
    if module.trainer.global_step >= 2:
        module.teacher.weight.data.add_(0.1)


def tied(module: Student, batch_idx: int) -> None:
    module.teacher.weight.data = module.student.weight.data


WRITES: dict[str, Callable[[], Student]] = {
    "in place": lambda: Student(in_place),
    "by foreach": lambda: Student(by_foreach),
    "replaced data": lambda: Student(replaced),
    "another parameter": lambda: Student(assigned),
    "a loaded state": lambda: Student(loaded),
    "in a hook": InHook,
    "by the optimizer": Unfreezing,
    "late in the round": lambda: Student(at_the_end),
    "in later rounds": lambda: Student(later),
    "in later rounds through data": lambda: Student(later_through_data),
    "tied in training": lambda: Student(tied),
}


class Run:
    """Rounds of four clients, two in each epoch."""

    def __init__(
        self,
        make: Callable[[], Student],
        *,
        executor: Any = "sequential",
        callbacks: list[pl.Callback] | None = None,
        ckpt: Path | None = None,
        rounds: int = 4,
        **options: Any,
    ) -> None:
        self.module, snapshots = make(), reference_loop.Snapshots()
        strategy = FederatedStrategy(
            partitioner=reference_loop.partition(), executor=executor, rounds_per_epoch=2, **options
        )
        self.trainer = reference.quiet_trainer(
            max_epochs=rounds // 2,
            strategy=strategy,
            callbacks=[snapshots, *(callbacks or [])],
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks or []),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.trainer.fit(self.module, reference.loader(reference_loop.data()), ckpt_path=ckpt)
        self.warnings = [str(w.message) for w in caught if str(w.message).startswith("frozen parameters")]
        self.state = reference_loop.state_of(self.module)
        self.logged = {name: value for name, value in self.trainer.callback_metrics.items() if "seconds" not in name}
        self.record = strategy.last_round

    @property
    def carried(self) -> list[str]:
        """The names of the frozen parameters that are in the vector."""
        federation = self.trainer.strategy._federation  # type: ignore[attr-defined]
        shared = federation.fit.tensors.shared()
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [names[id(tensor)] for tensor in shared.frozen]

    def is_same_as(self, other: Run) -> bool:
        return (
            reference_loop.same(self.state, other.state)
            and self.module.steps == other.module.steps
            and all(torch.equal(value, other.logged[name]) for name, value in self.logged.items() if "time" not in name)
        )


# ---- writes are noticed, and handled as if the parameters had been exchanged from the start


@pytest.mark.parametrize("name", WRITES)
def test_what_training_writes_to_takes_the_mean_from_its_first_write_on(name: str) -> None:
    run, named = Run(WRITES[name]), Run(WRITES[name], **NAMED)
    assert named.warnings == []
    assert len(run.warnings) == 1
    assert "'teacher.weight'" in run.warnings[0]
    assert "backbone" not in run.warnings[0]
    before = reference_loop.state_of(Student())
    assert not torch.equal(run.state["teacher.weight"], before["teacher.weight"])
    assert torch.equal(run.state["backbone.weight"], before["backbone.weight"])
    assert run.is_same_as(named)
    if name != "by the optimizer":  # then they are trainable
        assert set(named.carried) == {"teacher.weight", "teacher.bias"}
        assert set(run.carried) <= set(named.carried)


@pytest.mark.parametrize("name", ["in place", "replaced data", "in a hook", "in later rounds"])
@pytest.mark.parametrize("executor", ["vectorized", "auto"])
def test_whichever_executor_was_asked_for(executor: str, name: str) -> None:
    run = Run(WRITES[name], executor=executor)
    assert len(run.warnings) == 1
    assert run.is_same_as(Run(WRITES[name], executor=executor, **NAMED))


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "Ditto": lambda: {"personal": Ditto(0.1)},
    "async": lambda: {"mode": FedBuff(seconds=[1.0, 2.0, 3.0, 4.0]), "clients_per_round": 2},
    "personal": lambda: {"personal": ["teacher.bias"]},
    "FedProx": lambda: {"local_rule": fed_prox(mu=0.1)},
    "keep": lambda: {"client_optimizer": "keep"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["in place", "in later rounds"])
def test_with_every_kind_of_state_that_is_kept(method: str, name: str) -> None:
    named: dict[str, Any] = {"buffers": {"teacher.weight": "mean"}} if method == "personal" else NAMED
    run, other = Run(WRITES[name], **METHODS[method]()), Run(WRITES[name], **METHODS[method](), **named)
    assert len(run.warnings) == 1
    assert reference_loop.same(run.state, other.state)


def test_hooks_of_the_round_are_called_once() -> None:
    seen: list[str] = []

    class Spy(pl.Callback):
        def on_round_start(self, trainer: Any, module: Any, round: int, clients: Any) -> None:
            seen.append(f"start {round}")

        def on_client_end(self, trainer: Any, module: Any, update: Any) -> None:
            seen.append(f"client {update.client}")

    Run(WRITES["in place"], callbacks=[Spy()], rounds=2)
    assert seen == [each for round in range(2) for each in (f"start {round}", *(f"client {i}" for i in range(4)))]


def test_a_write_that_was_never_seen_before_and_cannot_be_undone_is_an_error() -> None:
    def by_another_client(module: Student, batch_idx: int) -> None:
        if module.trainer.global_step >= 2 and batch_idx == 1:  # the first client has one batch
            module.teacher.weight.data.add_(0.1)

    with pytest.raises(RuntimeError, match=r"client 2 wrote to 'teacher\.weight' in round 2\b.*buffers=\{'teacher\.w"):
        Run(lambda: Student(by_another_client))
    run = Run(lambda: Student(by_another_client), buffers={"teacher.weight": "mean"})
    assert run.warnings == []
    assert run.carried == ["teacher.weight"]


def test_a_client_that_fails_leaves_the_frozen_parameters_as_they_were() -> None:
    class Fails(Student):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            in_place(self, batch_idx)
            replaced(self, batch_idx)
            raise LookupError("on purpose")

    module = Fails()
    before = copy.deepcopy(reference_loop.state_of(module))
    with pytest.raises(LookupError):
        Run(lambda: module)
    assert reference_loop.same(reference_loop.state_of(module), before)


def test_a_module_that_writes_to_another_parameter_in_every_step_does_not_start_again_for_each() -> None:
    class Many(Student):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.ParameterList(nn.Parameter(torch.zeros(2), requires_grad=False) for _ in range(20))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.frozen[self.steps % 20].data.add_(1)
            return super().training_step(batch, batch_idx)

    run = Run(Many)
    assert len(run.warnings) == 3
    assert run.is_same_as(Run(Many, buffers={"frozen.*": "mean"}))


# ---- what the server does between rounds is no write of a client


class Moves(pl.Callback):
    """Moves the backbone, and once replaces its memory."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.backbone.weight.data.mul_(0.9)
        module.backbone.bias.data = module.backbone.bias.data + 0.1


class MovesFirst(pl.Callback):
    """Does the same when a round begins."""

    def on_round_start(self, trainer: Any, module: Any, round: int, clients: Any) -> None:
        Moves().on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
@pytest.mark.parametrize("callback", [Moves, MovesFirst])
def test_the_server_may_write_to_frozen_parameters(callback: type[pl.Callback], executor: str) -> None:
    run = Run(Student, callbacks=[callback()], executor=executor)
    assert run.warnings == []
    assert run.carried == []
    expected = reference_loop.state_of(Student())["backbone.bias"]
    for _ in range(4):
        expected = expected + 0.1
    assert torch.equal(run.state["backbone.bias"], expected)


class Unfreezes(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        module.teacher.requires_grad_(trainer.current_epoch == 1)


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_what_a_callback_unfreezes_joins_in_the_next_round(executor: str) -> None:
    run = Run(Student, callbacks=[Unfreezes()], executor=executor)
    assert run.warnings == []
    assert not torch.equal(run.state["teacher.weight"], reference_loop.state_of(Student())["teacher.weight"])
    assert run.record is not None
    assert run.record.upload_bytes == 4 * 2 * 4 * (8 * 4 + 4)


# ---- resume


@pytest.mark.parametrize("name", ["in place", "in later rounds"])
@pytest.mark.parametrize("method", ["keep", "Ditto", "async"])
def test_a_resumed_run_is_the_same(name: str, method: str, tmp_path: Path) -> None:
    def saving() -> list[pl.Callback]:
        return [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)]

    whole = Run(WRITES[name], callbacks=saving(), rounds=6, **METHODS[method]())
    for step in (1, 2, 3):
        again = Run(WRITES[name], ckpt=tmp_path / f"step={step}.ckpt", rounds=6, **METHODS[method]())
        assert reference_loop.same(again.state, whole.state)
        assert len(again.warnings) == (name == "in later rounds" and step < 3)


@pytest.mark.parametrize("method", ["keep", "Ditto", "async"])
def test_checkpoints_of_earlier_versions_still_load(method: str, tmp_path: Path) -> None:
    """Their vectors have all frozen parameters."""
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Run(WRITES["in place"], callbacks=[saves], buffers={"*": "mean"}, **METHODS[method]())
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    del saved["federated"]["frozen"]
    saved["federated"]["settings"]["buffers"] = None
    torch.save(saved, tmp_path / "old.ckpt")
    again = Run(WRITES["in place"], ckpt=tmp_path / "old.ckpt", **METHODS[method]())
    assert reference_loop.same(again.state, whole.state)
    assert len(again.warnings) == (method == "keep")


def test_personal_models_take_the_value_from_before_the_first_write() -> None:
    """A client that has not trained since the second round has the teacher of that time."""

    def alternating(round: int, **_: Any) -> Any:
        return np.array([0, 1] if round < 2 else [2, 3])

    def models(**options: Any) -> list[dict[str, Any] | None]:
        run = Run(WRITES["in later rounds"], personal=Ditto(0.1), sampler=alternating, clients_per_round=2, **options)
        return [run.trainer.strategy.personal_model(client) for client in range(4)]  # type: ignore[attr-defined]

    for mine, named in zip(models(), models(**NAMED), strict=True):
        assert mine is not None
        assert named is not None
        assert reference_loop.same(mine, named)
