"""Modules and data that do what Lightning allows, seldom as it is."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.trainer.connectors import data_connector
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_fedscale import ClientUpdate, Partition, RoundRecord, server
from lightning_fedscale.core.client_state import OptimizerKeeper
from tests.laws import reference
from tests.strategies import sequential

CLIENTS = {"num_clients": 6, "clients_per_round": 3}


def fit(
    module: pl.LightningModule,
    *,
    epochs: int = 5,
    loader: Any = None,
    ckpt_path: Path | None = None,
    strategy: dict[str, Any] = CLIENTS,
    **options: Any,
) -> pl.Trainer:
    trainer = reference.quiet_trainer(strategy=sequential(**strategy), max_epochs=epochs, **options)
    trainer.fit(module, loader or reference.loader(reference.dataset(80)), ckpt_path=ckpt_path)
    return trainer


def make(kind: type[Any] = reference.Classifier) -> Any:
    torch.manual_seed(0)
    return kind(dropout=0.0)


# ---- the end of a round


class SaveAtRoundEnd(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
        trainer.save_checkpoint(self.folder / f"{record.round}.ckpt")


class Scheduled(reference.Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


@pytest.mark.parametrize("rounds_per_epoch", [1, 2])
def test_a_checkpoint_saved_in_on_round_end_goes_on_with_the_next_round(rounds_per_epoch: int, tmp_path: Path) -> None:
    options = {**CLIENTS, "rounds_per_epoch": rounds_per_epoch, "server_optimizer": momentum()}
    whole = make(Scheduled)
    fit(whole, epochs=3, strategy=options, callbacks=[SaveAtRoundEnd(tmp_path)])
    for round in range(3 * rounds_per_epoch - 1):
        resumed = make(Scheduled)
        trainer = fit(resumed, epochs=3, strategy=options, ckpt_path=tmp_path / f"{round}.ckpt")
        assert trainer.global_step == 3 * rounds_per_epoch
        assert reference.difference(resumed.state_dict(), whole.state_dict()) == 0.0


def test_an_exception_in_on_round_end_does_not_repeat_the_round(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
            if record.round == 2:
                raise LookupError("on purpose")

    whole, resumed = make(), make()
    fit(whole)
    save = OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(LookupError):
        fit(make(), callbacks=[Fails(), save], enable_checkpointing=True)
    assert torch.load(tmp_path / "broken.ckpt", weights_only=True)["global_step"] == 3
    fit(resumed, ckpt_path=tmp_path / "broken.ckpt")
    assert reference.difference(resumed.state_dict(), whole.state_dict()) == 0.0


# ---- layers that are frozen and unfrozen while a server optimizer has state


def momentum() -> server.ServerOptimizer:
    return server.from_torch(torch.optim.SGD, lr=0.5, momentum=0.9)


def test_server_state_follows_parameters_by_name() -> None:
    one, two = (torch.full((2,), v, dtype=torch.float64) for v in (1.0, 2.0))
    rule = momentum()
    _, state = rule.update({"a": one, "b": two}, rule.init({"a": one, "b": two}), {"a": one, "b": two})
    step, state = rule.update({"b": two}, state, {"b": two})
    assert step["b"].tolist() == pytest.approx([0.5 * (0.9 * 2 + 2)] * 2), "b keeps its momentum, a is gone"
    step, state = rule.update({"a": one, "b": two}, state, {"a": one, "b": two})
    assert step["a"].tolist() == pytest.approx([0.5 * 1] * 2), "a starts without"
    assert step["b"].tolist() == pytest.approx([0.5 * (0.9 * (0.9 * 2 + 2) + 2)] * 2)


def test_server_state_that_is_there_from_the_start() -> None:
    one = torch.ones(2, dtype=torch.float64)
    rule = server.from_torch(torch.optim.Adagrad, lr=0.1)
    _, state = rule.update({"a": one}, rule.init({"a": one}), {"a": one})
    step, _ = rule.update({"a": one, "b": one}, state, {"a": one, "b": one})
    assert step["b"].tolist() == pytest.approx([0.1] * 2)
    assert step["a"].tolist() == pytest.approx([0.1 / 2**0.5] * 2)


@pytest.mark.parametrize("trains_from", [0, 2])
def test_freezing_and_unfreezing_with_server_momentum(trains_from: int, tmp_path: Path) -> None:
    class Freezes(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            module.net[0].requires_grad_(trains_from <= trainer.current_epoch < trains_from + 2)

    weights: list[Tensor] = []

    class Notes(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            weights.append(module.net[0].weight.detach().clone())

    fit(make(), strategy={**CLIENTS, "server_optimizer": momentum()}, callbacks=[Freezes(), Notes()])
    moved = [not torch.equal(*pair) for pair in zip([make().net[0].weight, *weights], weights, strict=False)]
    assert moved == [trains_from <= epoch < trains_from + 2 for epoch in range(5)]


# ---- buffers that cannot be written to


@pytest.mark.parametrize("buffer", [torch.ones(1).expand(4, 4), torch.eye(4).to_sparse()], ids=["expanded", "sparse"])
def test_buffers_that_nobody_can_write_to_are_left_alone(buffer: Tensor) -> None:
    with_buffer, without = make(), make()
    with_buffer.register_buffer("constant", buffer)
    fit(with_buffer)
    fit(without)
    assert with_buffer.constant is buffer
    assert reference.difference(with_buffer.net.state_dict(), without.net.state_dict()) == 0.0


# ---- an optimizer with state that belongs to no parameter


class Counting(torch.optim.SGD):
    """The step size falls with a counter that all parameters share."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.state["steps"] = 0  # type: ignore[index]

    def step(self, closure: Any = None) -> Any:
        self.state["steps"] += 1  # type: ignore[index]
        for group in self.param_groups:
            group["lr"] = 0.1 / self.state["steps"]  # type: ignore[index]
        return super().step(closure)


class WithCounting(reference.Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Counting(self.parameters())


def test_a_shared_counter_of_the_optimizer_is_kept_or_reset() -> None:
    data = reference.dataset(40)
    plain, kept, reset = (make(WithCounting) for _ in range(3))
    reference.quiet_trainer(max_epochs=3).fit(plain, reference.loader(data, shuffle=False))
    one = {"num_clients": 1}
    for module, how in ((kept, "keep"), (reset, "reset")):
        fit(module, epochs=3, loader=reference.loader(data, shuffle=False), strategy={**one, "client_optimizer": how})
    assert reference.difference(kept.state_dict(), plain.state_dict()) == 0.0
    afresh = make(WithCounting)
    for _ in range(3):
        reference.quiet_trainer(max_epochs=1).fit(afresh, reference.loader(data, shuffle=False))
    assert reference.difference(reset.state_dict(), afresh.state_dict()) == 0.0


class Late(torch.optim.SGD):
    """Begins to count in its groups at the first step, in place and by assignment."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            group.setdefault("total", torch.zeros(())).add_(1)
            group.setdefault("history", []).append(group["calls"])
            assert group["total"] == group["calls"] == len(group["history"])
            group["lr"] = 0.1 / group["calls"]
        return super().step(closure)


class WithLate(reference.Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Late(self.parameters(), lr=0.1)


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
def test_group_options_that_appear_during_training_are_the_clients(client_optimizer: str) -> None:
    """Also when a round fails and the next one begins where it began."""
    calls: list[tuple[int, int]] = []

    class Notes(pl.Callback):
        fails = True

        def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: ClientUpdate) -> None:
            calls.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["calls"]))
            if self.fails and trainer.global_step == 1:
                self.fails = False
                raise LookupError("on purpose")

    strategy = sequential(num_clients=2, client_optimizer=client_optimizer)
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2, callbacks=[Notes()])
    module, loader = make(WithLate), reference.loader(reference.dataset(32))
    with pytest.raises(LookupError):
        trainer.fit(module, loader)
    assert set(trainer.optimizers[0].param_groups[0]) == set(make(WithLate).configure_optimizers().param_groups[0])
    assert calls == [(0, 2), (0, 2), (1, 4 if client_optimizer == "keep" else 2)]


def test_kept_options_survive_a_round_that_fails() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = Late([parameter], lr=0.1)
    keeper = OptimizerKeeper(optimizer)
    keeper.open_round()

    def train() -> None:
        parameter.grad = torch.ones(2)
        optimizer.step()

    keeper.load(None)
    train()
    kept = keeper.unload()
    for _ in range(2):
        keeper.load(kept)
        assert optimizer.param_groups[0]["history"] == [1]
        train()
        keeper.close_round()


# ---- what Lightning says of loaders


@pytest.mark.parametrize(("workers", "cache", "said"), [(0, False, True), (2, False, False), (0, True, False)])
def test_few_workers_are_spoken_of_as_by_a_plain_trainer_unless_none_works(
    workers: int, cache: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 8)
    loader = DataLoader(reference.dataset(24), batch_size=8, num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make(), loader=loader, strategy={"num_clients": 2, "cache_dataset": cache})
    found = [str(each.message) for each in caught if "does not have many workers" in str(each.message)]
    assert [message[:22] for message in found] == ["The 'train_dataloader'"] * said


# ---- batches that are None


def none_for(bad: set[int]) -> Any:
    """A collate function as of a dataset with broken samples: None for batches that start with a bad one."""

    def collate(samples: list[Any]) -> Any:
        return None if int(samples[0][2]) in bad else default_collate([sample[:2] for sample in samples])

    return collate


def numbered(samples: int) -> Any:
    data = reference.dataset(samples)
    return [(*data[i], i) for i in range(samples)]


@pytest.mark.parametrize("bad", [{0}, {8}, {16}, {0, 8}], ids=str)
def test_batches_that_are_none_are_skipped(bad: set[int]) -> None:
    """With one client that keeps its optimizer, as with the plain Trainer."""
    loader = DataLoader(numbered(24), batch_size=8, collate_fn=none_for(bad))
    plain, federated = make(), make()
    reference.quiet_trainer(max_epochs=1).fit(plain, loader)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = fit(federated, epochs=1, loader=loader, strategy={"num_clients": 1, "client_optimizer": "keep"})
    assert [str(each.message)[:30] for each in said if "None" in str(each.message)] == [
        "train_dataloader yielded None."
    ]
    assert reference.difference(federated.state_dict(), plain.state_dict()) == 0.0
    record = trainer.strategy.last_round  # type: ignore[attr-defined]
    assert (record.local_steps.tolist(), record.samples.tolist()) == ([3 - len(bad)], [24 - 8 * len(bad)])


# ---- what a module reads off the Trainer


class AtLastBatch(reference.Classifier):
    """Lightning's recipe for manual optimization: something happens at the last batch."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.automatic_optimization = False
        self.seen: list[tuple[int, bool]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, self.trainer.is_last_batch))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        if self.trainer.is_last_batch:
            optimizer.step()
            optimizer.zero_grad()


def test_is_last_batch_is_that_of_the_client() -> None:
    loader = reference.loader(reference.dataset(20), shuffle=False)
    plain, federated = make(AtLastBatch), make(AtLastBatch)
    reference.quiet_trainer(max_epochs=2).fit(plain, loader)
    ends: list[bool] = []

    class Rounds(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            ends.append(trainer.is_last_batch)

    one = {"num_clients": 1, "client_optimizer": "keep", "rounds_per_epoch": 2}
    fit(federated, epochs=1, loader=loader, strategy=one, callbacks=[Rounds()])
    assert federated.seen == plain.seen == [(0, False), (1, False), (2, True)] * 2
    assert reference.difference(federated.state_dict(), plain.state_dict()) == 0.0
    assert ends == [False, True], "outside of clients it is that of the epoch's rounds"


def test_hooks_that_were_given_to_the_instance_stay_there() -> None:
    module, calls = make(), []

    def hook(*_: Any) -> None:
        calls.append(module.trainer.global_step)

    module.on_train_batch_end = hook

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            assert copy.deepcopy(module).on_train_batch_end is hook
            assert trainer.train_dataloader is not None
            assert trainer.train_dataloader.batch_size == 2

    loader = reference.loader(reference.dataset(24), batch_size=2)
    fit(module, epochs=1, loader=loader, strategy={"num_clients": 3}, callbacks=[Copies()])
    assert calls == [0] * 12
    assert module.on_train_batch_end is hook


def test_a_module_may_be_copied_and_pickled_in_a_callback() -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            buffer = io.BytesIO()
            torch.save(module, buffer)
            pickled = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
            for copied in (pickled, copy.deepcopy(module)):
                copied.on_train_batch_end(None, None, None)
                assert (copied.calls, module.calls) == (module.calls + 1, 3 * trainer.global_step)

    module = make(Hooked)
    fit(
        module,
        epochs=2,
        strategy={"num_clients": 3},
        loader=reference.loader(reference.dataset(24)),
        callbacks=[Copies()],
    )
    assert module.calls == 2 * 3


class Hooked(reference.Classifier):
    calls = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls += 1


# ---- checkpoints saved while a client trains


class Manual(reference.Classifier):
    """Steps its own schedule in every batch."""

    save: Path | None = None

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda batch: 0.9**batch)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save is not None and self.trainer.global_step == 2 and batch_idx == 1:
            self.trainer.save_checkpoint(self.save)


class Fading(reference.Classifier):
    """Lowers the rate with every batch of a client."""

    save: Path | None = None
    on_train_batch_end = Manual.on_train_batch_end

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step(closure)


class SaveInClient(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: ClientUpdate) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-{update.client}.ckpt")


class Validated(Scheduled):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("rounds_per_epoch", [1, 2])
def test_saved_at_the_end_of_any_client_repeats_the_round(rounds_per_epoch: int, tmp_path: Path) -> None:
    """Where `trainer.is_last_batch` is the client's."""
    data = reference.dataset(32)
    options = {"num_clients": 2, "rounds_per_epoch": rounds_per_epoch}

    def run(ckpt_path: Path | None, *callbacks: pl.Callback) -> tuple[Any, pl.Trainer]:
        module = make(Validated)
        trainer = reference.quiet_trainer(
            strategy=sequential(**options),
            max_epochs=2,
            callbacks=list(callbacks),
            val_check_interval=1,
        )
        trainer.fit(module, reference.loader(data), reference.loader(data, shuffle=False), ckpt_path=ckpt_path)
        return module, trainer

    whole, _ = run(None, SaveInClient(tmp_path))
    saved = sorted(tmp_path.iterdir())
    assert len(saved) == 2 * 2 * rounds_per_epoch
    for path in saved:
        resumed, trainer = run(path)
        assert (trainer.global_step, trainer.current_epoch) == (2 * rounds_per_epoch, 2)
        assert reference.difference(resumed.state_dict(), whole.state_dict()) == 0.0


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.parametrize(("kind", "rate"), [(Manual, 0.2), (Fading, 0.1)])
def test_rates_that_a_client_changed_are_not_saved(
    kind: type[Any], rate: float, client_optimizer: str, tmp_path: Path
) -> None:
    options = {**CLIENTS, "client_optimizer": client_optimizer}
    whole, resumed = make(kind), make(kind)
    whole.save = tmp_path / "inside.ckpt"
    fit(whole, strategy=options)
    fit(resumed, strategy=options, ckpt_path=whole.save)
    saved = torch.load(whole.save, weights_only=True)["optimizer_states"][0]
    assert (saved["state"], saved["param_groups"][0]["lr"]) == ({}, rate)
    assert reference.difference(resumed.state_dict(), whole.state_dict()) == 0.0


# ---- a round that fails


class Averages(reference.Classifier):
    """Assigns its buffer anew in every batch, and moves a frozen weight by ``.data``."""

    average: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.register_buffer("average", torch.zeros(12))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * batch[0].mean(0)
        self.frozen.data = self.frozen.data + 1
        if self.trainer.global_step == 1 and batch_idx == 1:
            raise LookupError("on purpose")
        return super().training_step(batch, batch_idx)


def test_tensors_that_a_failing_client_replaced_are_the_global_ones_again() -> None:
    before: dict[str, Tensor] = {}

    class Notes(pl.Callback):
        def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: RoundRecord) -> None:
            before.update({name: value.clone() for name, value in module.state_dict().items()})

    module = make(Averages)
    with pytest.raises(LookupError):
        fit(module, callbacks=[Notes()])
    assert before["average"].any()
    assert reference.difference(module.state_dict(), before) == 0.0


class FreezesByBatch(reference.Classifier):
    """Leaves its first layer frozen or not by the parity of its number of batches; once frozen for good in round 2."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.net[0].requires_grad_(batch_idx % 2 == 0)
        return loss


@pytest.mark.parametrize("cohort", [[0], [1], [0, 1]])
def test_a_client_that_freezes_layers_does_so_for_itself(cohort: list[int]) -> None:
    """Every client starts from the round's flags; a parameter stays trainable if any client left it so."""
    data = reference.dataset(24)
    partition = Partition.from_lists([list(range(8)), list(range(8, 24))])  # one batch leaves True, two leave False
    seen: list[bool] = []

    class Spy(pl.Callback):
        def on_client_start(self, trainer: pl.Trainer, module: reference.Classifier, client: int) -> None:
            seen.append(all(p.requires_grad for p in module.net[0].parameters()))

    def chosen(**_: Any) -> Any:
        return np.array(cohort)

    module = FreezesByBatch(dropout=0.0)
    strategy = sequential(partitioner=partition, clients_per_round=len(cohort), sampler=chosen)
    reference.quiet_trainer(max_epochs=2, strategy=strategy, callbacks=[Spy()]).fit(module, reference.loader(data))
    first_round, second_round = seen[: len(cohort)], seen[len(cohort) :]
    assert all(first_round)
    assert set(second_round) == {0 in cohort}
    assert module.net[0].weight.requires_grad == (0 in cohort)


class FailsAsTheRoundBegins(pl.Callback):
    def on_round_start(self, trainer: pl.Trainer, module: pl.LightningModule, round: int, clients: Any) -> None:
        raise ArithmeticError("not today")


def test_an_error_before_the_first_client_is_the_one_that_is_shown() -> None:
    """Tidying up after a first round that never reached its optimizers used to fail by itself and hide the cause."""
    module = reference.make_module()
    before = copy.deepcopy(module.state_dict())
    trainer = reference.quiet_trainer(max_epochs=1, strategy=sequential(), callbacks=[FailsAsTheRoundBegins()])
    with pytest.raises(ArithmeticError, match="not today"):
        trainer.fit(module, reference.loader(reference.dataset()))
    assert reference.difference(module.state_dict(), before) == 0.0
