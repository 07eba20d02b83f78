"""Interruption does not matter: a resumed run is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedscale import server
from lightning_fedscale.core.lightning.checkpoint import AtomicCheckpointIO
from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential


class Every(ModelCheckpoint):
    """Keeps every round's checkpoint as ``<round>.ckpt``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(
            folder,
            filename="{step}",
            auto_insert_metric_name=False,
            save_top_k=-1,
            **{"every_n_train_steps": 1, **options},
        )


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


class Seldom(pl.Callback):
    """It logs a value in the first round only."""

    log: Callable[..., None]  # of the module: the Trainer gives it to callbacks

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            self.log("seldom", 3.0, on_step=True, on_epoch=False)


def test_a_value_that_is_logged_seldom_can_be_monitored_after_a_resume(tmp_path: Path) -> None:
    """As without an interruption: the Trainer keeps the last value of every name."""

    def run(rounds: int, path: Path | None) -> Any:
        trainer = reference.quiet_trainer(
            max_epochs=rounds, strategy=sequential(num_clients=3), enable_checkpointing=True,
            callbacks=[Seldom(), Every(tmp_path / str(rounds))],
        )  # fmt: skip
        trainer.fit(reference.make_module(), reference.loader(reference.dataset(60)), ckpt_path=path)
        return trainer

    whole = run(4, None)
    run(2, None)
    resumed = run(4, tmp_path / "2" / "2.ckpt")
    assert float(whole.callback_metrics["seldom"]) == 3.0
    assert resumed.callback_metrics.keys() == whole.callback_metrics.keys()
    assert float(resumed.callback_metrics["seldom"]) == 3.0


# ---- modules and data for the runs below


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.samples[index]
        return inputs + torch.randn(12), labels

    def __len__(self) -> int:
        return len(self.samples)


class Adam(reference.Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01, amsgrad=True)


class Cycle(reference.Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Halving(reference.Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 3, 0.5)}


class Norm(Adam):
    def __init__(self) -> None:
        super().__init__(batch_norm=True)


class Manual(reference.Classifier):
    """Two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        first, second = optimizers
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in (first, second):
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, second = self.net[0].parameters(), self.net[3].parameters()
        return [torch.optim.Adam(first, lr=0.01), torch.optim.SGD(second, lr=0.1, momentum=0.9)]


MOMENTUM = server.from_torch(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
SOME: dict[str, Any] = {"clients_per_round": 2}

RUNS: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], dict[str, Any]]] = {
    "reset": (Adam, SOME, {}),
    "keep": (Adam, {**SOME, "client_optimizer": "keep"}, {}),
    "cursors": (Adam, {**SOME, "local_steps": 2}, {}),
    "within an epoch": (Adam, {**SOME, "rounds_per_epoch": 3}, {}),
    "server momentum": (Adam, {**SOME, "server_optimizer": MOMENTUM}, {}),
    "server adam": (Adam, {**SOME, "server_optimizer": server.from_torch(torch.optim.AdamW, lr=0.1)}, {}),
    "step scheduler": (Cycle, {**SOME, "rounds_per_epoch": 3}, {}),
    "epoch scheduler": (Halving, SOME, {}),
    "batch norm": (Norm, {**SOME, "client_optimizer": "keep"}, {}),
    "manual": (Manual, {**SOME, "client_optimizer": "keep"}, {}),
    "average": (Adam, SOME, {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)]}),
    "workers": (Adam, SOME, {"workers": 2}),
    "double precision": (Adam, {**SOME, "client_optimizer": "keep"}, {"flags": {"precision": "64-true"}}),
    "everything": (
        Cycle,
        {
            **SOME,
            "client_optimizer": "keep",
            "local_steps": 2,
            "rounds_per_epoch": 3,
            "server_optimizer": MOMENTUM,
            "aggregator": "uniform",
        },
        {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)], "workers": 2, "flags": {"accumulate_grad_batches": 2}},
    ),
}


def run(name: str, folder: Path, *, start: int, ckpt_path: Path | None = None) -> pl.LightningModule:
    """Nine rounds of a run; ``start`` seeds the model and everything that must not matter."""
    make, strategy, more = RUNS[name]
    torch.manual_seed(start)
    module = make()
    workers = more.get("workers", 0)
    reference_loop.fit(
        module,
        DataLoader(Noisy(reference_loop.data()), batch_size=8, shuffle=True, num_workers=workers),
        strategy=strategy,
        enable_checkpointing=True,
        callbacks=[Every(folder), *more.get("callbacks", list)()],
        max_epochs=9 // strategy.get("rounds_per_epoch", 1),
        ckpt_path=None if ckpt_path is None else str(ckpt_path),
        **more.get("flags", {}),
    )
    return module


@pytest.mark.parametrize("name", RUNS)
def test_resumed_in_the_middle_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = run(name, tmp_path / "whole", start=0)
    resumed = run(name, tmp_path / "resumed", start=1, ckpt_path=tmp_path / "whole" / "4.ckpt")
    assert reference_loop.same(whole.state_dict(), resumed.state_dict())
    assert not (tmp_path / "resumed" / "4.ckpt").exists(), "the resumed run repeated a round"
    for round in range(5, 10):
        left, right = (read(tmp_path / kind / f"{round}.ckpt") for kind in ("whole", "resumed"))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "federated"):
            assert equal(left[part], right[part]), (round, part)
    assert not reference_loop.same(run(name, tmp_path / "other", start=1).state_dict(), whole.state_dict())


def test_resuming_within_an_epoch_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run("within an epoch", tmp_path / "whole", start=0)
    recwarn.clear()
    run("within an epoch", tmp_path / "resumed", start=1, ckpt_path=tmp_path / "whole" / "4.ckpt")
    assert [str(warning.message) for warning in recwarn if "not resumable" in str(warning.message)] == []


@pytest.mark.parametrize("first", [1, 2, 3, 7])
def test_resumed_from_any_round(first: int, tmp_path: Path) -> None:
    def go(folder: str, max_epochs: int, ckpt_path: str | None = None) -> pl.LightningModule:
        torch.manual_seed(len(folder))
        module = Adam()
        reference_loop.fit(
            module,
            strategy={**SOME, "client_optimizer": "keep", "local_steps": 3},
            enable_checkpointing=True,
            callbacks=[Every(tmp_path / folder, save_last=True)],
            max_epochs=max_epochs,
            ckpt_path=ckpt_path,
        )
        return module

    whole = go("a", 8)
    go("b", first)
    resumed = go("bb", 8, str(tmp_path / "b" / "last.ckpt"))
    assert reference_loop.same(resumed.state_dict(), whole.state_dict())


def test_a_checkpoint_saved_by_hand_after_fit_goes_on_as_well(tmp_path: Path) -> None:
    options = {**SOME, "client_optimizer": "keep", "local_steps": 3, "server_optimizer": MOMENTUM}
    torch.manual_seed(0)
    _, whole = reference_loop.fit(Adam(), strategy=options, max_epochs=6)
    torch.manual_seed(0)
    trainer, _ = reference_loop.fit(Adam(), strategy=options, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert read(tmp_path / "mine.ckpt")["federated"]["round"] == 2
    _, resumed = reference_loop.fit(Adam(), strategy=options, max_epochs=6, ckpt_path=str(tmp_path / "mine.ckpt"))
    assert reference_loop.same(resumed.state_dict(), whole.state_dict())


# ---- inside a round


class Fragile(Adam):
    """Raises in the given local batch, saves a checkpoint in another."""

    def __init__(self, raise_in: int | None = None, save_in: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.raise_in, self.save_in, self.path, self.count = raise_in, save_in, path, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.count += 1
        if self.count == self.raise_in:
            raise OSError("on purpose")
        loss = super().training_step(batch, batch_idx)
        if self.count == self.save_in:
            self.trainer.save_checkpoint(self.path)  # type: ignore[arg-type]
        return loss


INSIDE: dict[str, Any] = {
    **SOME,
    "client_optimizer": "keep",
    "local_steps": 3,
    "server_optimizer": MOMENTUM,
}


@pytest.mark.parametrize("batch", [13, 15, 16, 18])
def test_an_exception_inside_a_client_leaves_the_round_to_be_repeated(batch: int, tmp_path: Path) -> None:
    # Six local batches a round: these are the first and the last of the first and of the second client of round 2.
    torch.manual_seed(0)
    whole, snapshots = Fragile(), reference_loop.Snapshots()
    reference_loop.fit(whole, strategy=INSIDE, callbacks=[snapshots], max_epochs=5)
    assert whole.count == 6 * 5
    torch.manual_seed(0)
    fragile = Fragile(raise_in=batch)
    save = Every(tmp_path, save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(OSError, match="on purpose"):
        reference_loop.fit(fragile, strategy=INSIDE, enable_checkpointing=True, callbacks=[save], max_epochs=5)
    assert reference_loop.same(fragile.state_dict(), snapshots.after_round[1])
    assert reference_loop.same(read(tmp_path / "2.ckpt")["state_dict"], snapshots.after_round[1])
    resumed = Fragile()
    reference_loop.fit(resumed, strategy=INSIDE, max_epochs=5, ckpt_path=str(tmp_path / "2.ckpt"))
    assert resumed.count == 6 * 3
    assert reference_loop.same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("rounds_per_epoch", [1, 3])
def test_interrupted_again_and_again_equals_never_stopped(rounds_per_epoch: int, tmp_path: Path) -> None:
    options, epochs = {**INSIDE, "rounds_per_epoch": rounds_per_epoch}, 6 // rounds_per_epoch
    torch.manual_seed(0)
    whole = Fragile()
    reference_loop.fit(whole, strategy=options, max_epochs=epochs)
    assert whole.count == 6 * 6
    torch.manual_seed(0)
    module, interruptions, last = Fragile(raise_in=9), 0, None
    while True:
        # Every attempt gets one round further and fails inside the one after.
        save = Every(tmp_path, save_last=True, enable_version_counter=False)
        flags: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [save], "max_epochs": epochs}
        try:
            trainer, _ = reference_loop.fit(module, strategy=options, ckpt_path=last, **flags)
            break
        except OSError:
            interruptions += 1
            module, last = Fragile(raise_in=9), str(tmp_path / "last.ckpt")
        assert interruptions < 10
    assert interruptions == 5
    assert trainer.global_step == 6
    assert reference_loop.same(module.state_dict(), whole.state_dict())


@pytest.mark.parametrize("batch", [1, 10, 12])
def test_a_checkpoint_saved_inside_a_client_holds_the_global_model(batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, snapshots = Fragile(save_in=batch, path=tmp_path / "inside.ckpt"), reference_loop.Snapshots()
    start = reference_loop.state_of(module)
    reference_loop.fit(module, strategy=INSIDE, callbacks=[snapshots], max_epochs=4)
    round = (batch - 1) // 6
    saved = read(tmp_path / "inside.ckpt")
    assert saved["global_step"] == saved["federated"]["round"] == round
    assert reference_loop.same(saved["state_dict"], [start, *snapshots.after_round][round])
    resumed = Fragile()
    reference_loop.fit(resumed, strategy=INSIDE, max_epochs=4, ckpt_path=str(tmp_path / "inside.ckpt"))
    assert reference_loop.same(resumed.state_dict(), module.state_dict())


# ---- without this package


READS = """
import sys
sys.modules["lightning_fedscale"] = None
import json, torch
import lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 4))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

ckpt, data = sys.argv[1:]
samples = TensorDataset(*torch.load(data))
quiet = dict(strategy="auto", accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, num_sanity_val_steps=0)
loaded = Model.load_from_checkpoint(ckpt)
trainer = pl.Trainer(**quiet)
(validated,) = trainer.validate(Model(16), DataLoader(samples, batch_size=45), ckpt_path=ckpt, verbose=False)
further = pl.Trainer(**quiet, max_epochs=4)
further.fit(Model(16), DataLoader(samples, batch_size=45), ckpt_path=ckpt)
print("RESULT", json.dumps({"width": loaded.hparams.width, "sum": float(loaded.net[0].weight.double().sum()),
                            "val_loss": validated["val_loss"], "step": further.global_step}))
"""


class Saved(reference.Classifier):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_plain_lightning_reads_the_checkpoint_without_this_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference_loop.fit(
        Saved(16),
        strategy={"client_optimizer": "keep", "server_optimizer": server.fed_avg()},
        enable_checkpointing=True,
        callbacks=[Every(tmp_path)],
        max_epochs=3,
    )
    checkpoint = read(tmp_path / "3.ckpt")
    torch.save(list(reference_loop.validation_data().tensors), tmp_path / "data.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READS, str(tmp_path / "3.ckpt"), str(tmp_path / "data.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(re.search(r"RESULT (.*)", done.stdout)[1])  # type: ignore[index]
    assert result["width"] == 16
    assert result["sum"] == float(checkpoint["state_dict"]["net.0.weight"].double().sum())
    assert result["val_loss"] == pytest.approx(reference_loop.validation_loss(checkpoint["state_dict"]), rel=1e-5)
    assert result["step"] == 4


def test_a_plain_checkpoint_is_taken_as_the_start_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = reference.Classifier()
    plain = reference.quiet_trainer(max_epochs=2)
    plain.fit(module, reference.loader(reference_loop.data()))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    step = plain.global_step
    assert step == 2 * 6

    resumed = reference.Classifier()
    with pytest.warns(UserWarning, match="was not written by FederatedStrategy"):
        trainer, _ = reference_loop.fit(resumed, max_epochs=4, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert trainer.global_step == step + 2
    start = reference.Classifier()
    start.load_state_dict(module.state_dict())
    clients = reference_loop.partition()
    rounds = reference_loop.fed_avg(start, reference_loop.data(), clients, reference_loop.passes(clients), first=step)
    next(rounds)
    assert reference_loop.same(resumed.state_dict(), next(rounds))


# ---- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, r"seed=3 .*seed=0.*ckpt_path"),
        ({"num_clients": 5}, r"num_clients=5 .*num_clients=4"),
        ({"partitioner": "dirichlet"}, r"partitioner: .*differently.*same partitioner"),
    ],
)
def test_another_federation_is_refused_before_it_trains(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved: dict[str, Any] = {"num_clients": 4, "partitioner": "iid"}
    reference_loop.fit(strategy=saved, enable_checkpointing=True, callbacks=[Every(tmp_path)], max_epochs=2)
    torch.manual_seed(0)
    module = Fragile(raise_in=1)
    with pytest.raises(ValueError, match=message):
        reference_loop.fit(module, strategy={**saved, **options}, max_epochs=4, ckpt_path=str(tmp_path / "2.ckpt"))
    assert module.count == 0


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"num_clients": 4, "partitioner": "iid"}
    reference_loop.fit(strategy=saved, enable_checkpointing=True, callbacks=[Every(tmp_path)], max_epochs=1)
    with pytest.raises(ValueError, match=r"partitioner: .*same dataset"):
        reference_loop.fit(
            None,
            reference.loader(reference.dataset(46)),
            strategy=saved,
            max_epochs=4,
            ckpt_path=str(tmp_path / "1.ckpt"),
        )


# ---- the file itself


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_checkpoint(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"value": torch.zeros(1000)}, path)
    whole = torch.save

    def half(value: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        file.flush()
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(error):
        io.save_checkpoint({"value": torch.ones(1000)}, path)
    assert torch.equal(read(path)["value"], torch.zeros(1000))
    monkeypatch.setattr(torch, "save", whole)
    # What the interrupted write may have left is overwritten, not collected.
    (path.parent / "last.ckpt.part").write_bytes(b"x" * 10**6)
    io.save_checkpoint({"value": torch.ones(1000)}, path)
    assert torch.equal(read(path)["value"], torch.ones(1000))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def save_and_die(path: Path) -> None:
    def die(value: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = die  # type: ignore[assignment]  # in this process only
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(3)}, path)


def test_a_process_killed_while_it_writes_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": torch.zeros(3)}, path)
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "last.ckpt.part").read_bytes() == b"half a checkpoint"
    assert torch.equal(read(path)["value"], torch.zeros(3))
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(3)}, path)
    assert torch.equal(read(path)["value"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_failing_write_in_a_run_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, whole, writes = torch.save, reference_loop.models(3), iter([True, True, False])

    def sometimes(value: Any, file: Any) -> None:
        if not next(writes):
            file.write(b"half")
            raise OSError("disk full")
        save(value, file)

    monkeypatch.setattr(torch, "save", sometimes)
    # One file for all rounds.
    last = ModelCheckpoint(tmp_path, filename="model", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(OSError, match="disk full"):
        reference_loop.fit(enable_checkpointing=True, callbacks=[last], max_epochs=5)
    assert reference_loop.same(read(tmp_path / "model.ckpt")["state_dict"], whole[2])
    monkeypatch.undo()
    _, resumed = reference_loop.fit(max_epochs=3, ckpt_path=str(tmp_path / "model.ckpt"))
    assert reference_loop.same(resumed.state_dict(), whole[3])


def test_remote_paths_are_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: calls.append(args))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, "s3://bucket/last.ckpt", {"key": 1})
    assert calls == [({"a": 1}, "s3://bucket/last.ckpt", {"key": 1})]


def test_a_remote_file_system_really_gets_the_file() -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(2)}, "memory://folder/last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint("memory://folder/last.ckpt", weights_only=True)
    assert torch.equal(loaded["a"], torch.ones(2))


def test_local_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", {"key": 1})


def test_the_users_own_writer_is_kept(tmp_path: Path) -> None:
    class Counting(TorchCheckpointIO):
        written = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.written += 1
            super().save_checkpoint(*args, **kwargs)

    writer = Counting()
    strategy = sequential(partitioner=reference_loop.partition(), checkpoint_io=writer)
    trainer = reference.quiet_trainer(
        strategy=strategy, enable_checkpointing=True, callbacks=[Every(tmp_path)], max_epochs=2
    )
    trainer.fit(reference.make_module(), reference.loader(reference_loop.data()))
    assert writer.written == 2
    assert reference_loop.same(read(tmp_path / "2.ckpt")["state_dict"], reference_loop.models(2)[-1])


class Wrapping(_WrappingCheckpointIO):
    """A project's wrapper: it counts what passes through it."""

    passed = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.passed += 1
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("given", ["plugins", "strategy"])
@pytest.mark.parametrize("base", [None, TorchCheckpointIO])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_wrapped_writers_end_in_a_base(tmp_path: Path, given: str, base: type[Any] | None, depth: int) -> None:
    wrappers: list[Any] = [Wrapping(base() if base else None)]
    for _ in range(depth - 1):
        wrappers.append((AsyncCheckpointIO if len(wrappers) == 1 else Wrapping)(wrappers[-1]))
    own = {"checkpoint_io": wrappers[-1]} if given == "strategy" else {}
    trainer = reference.quiet_trainer(
        strategy=sequential(partitioner=reference_loop.partition(), **own),
        enable_checkpointing=True,
        callbacks=[Every(tmp_path)],
        max_epochs=2,
        plugins=[wrappers[-1]] if given == "plugins" else [],
    )
    trainer.fit(reference.make_module(), reference.loader(reference_loop.data()))
    assert wrappers[0].passed == 2
    assert type(wrappers[0].checkpoint_io) is (base or AtomicCheckpointIO)
    assert reference_loop.same(read(tmp_path / "2.ckpt")["state_dict"], reference_loop.models(2)[-1])
