"""One run that is killed again and again, and one that is not: ``python interrupted.py FOLDER``.

The process that runs this script imports everything once and trains nothing. Whatever trains is a child of it, a
process of its own that ends by SIGKILL. Deaths come at a named moment: the child says that it is there and waits for
the end. "any call" is a call of a function or a return from one, in Python or C, counted since the end of the first
round; there are some 200,000 in a round.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase
from lightning_fedscale.phases import relative_change
from lightning_fedscale.server import from_torch
from lightning_fedscale.types import ClientUpdate
from tests.dist import processes, scenarios
from tests.dist.processes import about
from tests.laws import reference
from tests.pythons import end, fork
from tests.strategies import sequential

EPOCHS = 20
ROUNDS_PER_EPOCH = 3


class Death(NamedTuple):
    """When a stretch of the run ends.

    Attributes:
        moment: name of an event, or "any time".
        count: the event's how manieth since the stretch began.
        ranks: number of processes.
        only: the one rank that is killed; None kills all.
    """

    moment: str
    count: int  # type: ignore[assignment]
    ranks: int = 1
    only: int | None = None


# Every round writes two files, its own one and last.ckpt: an even count is a moment of last.ckpt. Each is flushed to
# the disk before it is renamed, and its folder after that.
DEATHS = (
    Death("half written", 1),
    Death("half written", 2),
    Death("client end", 6),
    Death("half written", 4),
    Death("flush", 7),
    Death("rename", 4),
    Death("renamed", 4),
    Death("batch", 25),
    Death("any call", 31_337),
    Death("any call", 250_001),
    Death("half written", 4, ranks=2),
    Death("client end", 5, ranks=2, only=1),
    Death("any call", 120_345, ranks=2),
    Death("rename", 4, ranks=2),
    Death("flush", 5, ranks=2),
    Death("any call", 77_777, ranks=2, only=0),
    Death("round end", 2),
    Death("epoch end", 2),
    Death("renamed", 3),
    Death("any call", 183_002),
    Death("any call", 9_999, ranks=2),
)


class Module(scenarios.Module):
    def __init__(self) -> None:
        super().__init__("adam")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "epoch"},
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"},
        ]


class Moments(pl.Callback):
    """Tells the parent of the moment of death, and stops there for ever."""

    def __init__(self, pipe: int, death: Death | None, rank: int) -> None:
        self._pipe = pipe
        self._death = death if death is not None and rank == (death.only or 0) else None
        self._seen: Counter[str] = Counter()

    def reach(self, moment: str) -> bool:
        """Note the moment; whether it is the last one."""
        self._seen[moment] += 1
        if self._death is None:
            return False
        return self._death[:2] == (moment, self._seen[moment])

    def at(self, moment: str) -> None:
        if self.reach(moment):
            self.wait_for_death()

    def wait_for_death(self) -> NoReturn:
        sys.setprofile(None)
        os.write(self._pipe, b".")
        while True:
            signal.pause()

    def on_client_end(self, trainer: pl.Trainer, module: pl.LightningModule, update: ClientUpdate) -> None:
        self.at("client end")

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.at("batch")

    def on_round_end(self, trainer: pl.Trainer, module: pl.LightningModule, record: Any) -> None:
        self.at("round end")
        if self._death is not None and self._death.moment == "any call" and self._seen["round end"] == 1:
            calls, last = itertools.count(1), self._death.count
            sys.setprofile(lambda *_: self.wait_for_death() if next(calls) == last else None)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.at("epoch end")

    def watch_files(self) -> None:
        """Checkpoints are written by these three; the tests are about what stands on the disk between them."""
        save, fsync, replace = torch.save, os.fsync, os.replace

        def slow_save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            # Not what ranks say to each other, which is packed in memory.
            if not isinstance(file, io.BytesIO) and self.reach("half written"):
                buffer = io.BytesIO()
                save(value, buffer)
                content = buffer.getvalue()
                file.write(content[: len(content) // 2])
                file.flush()
                self.wait_for_death()
            save(value, file, *args, **kwargs)

        def slow_fsync(handle: int) -> None:
            self.at("flush")
            fsync(handle)

        def slow_replace(source: Any, target: Any) -> None:
            self.at("rename")
            replace(source, target)
            self.at("renamed")

        torch.save, os.fsync, os.replace = slow_save, slow_fsync, slow_replace  # type: ignore[assignment]


def train(folder: Path, ranks: int, moments: Moments) -> None:
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=1)
    phase = CriticalPhase(relative_change(0.1, window=4), scale=1.5, noise_every=None)
    trainer = reference.quiet_trainer(
        devices=ranks,
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        enable_checkpointing=True,
        callbacks=[checkpoint, phase, moments, ComputeAccounting(law="Chinchilla")],
        strategy=sequential(
            partitioner=scenarios.partitioner(),
            clients_per_round=4,
            local_steps=3,
            rounds_per_epoch=ROUNDS_PER_EPOCH,
            client_optimizer="keep",
            server_optimizer=from_torch(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
        ),
    )
    moments.watch_files()
    last = folder / "last.ckpt"
    trainer.fit(
        Module(),
        DataLoader(scenarios.training_data(), scenarios.BATCH, shuffle=True),
        ckpt_path=str(last) if last.exists() else None,
    )


def start(folder: Path, death: Death | None, ranks: int) -> list[tuple[int, int]]:
    """Fork one process for each rank; returns their ids and the pipes they talk through."""
    port = processes.free_port()
    started = []
    for rank in range(ranks):
        here, there = os.pipe()
        child = fork(lambda there=there, rank=rank: rank_main(folder, death, ranks, rank, port, there))  # type: ignore[misc]
        os.close(there)
        started.append((child, here))
    return started


def rank_main(folder: Path, death: Death | None, ranks: int, rank: int, port: int, pipe: int) -> None:
    os.environ.update(about(rank, ranks), MASTER_PORT=str(port))
    train(folder, ranks, Moments(pipe, death, rank))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def kill(folder: Path, death: Death) -> dict[str, Any]:
    """Run until death and say what it left."""
    started = start(folder, death, death.ranks)
    victims = started if death.only is None else [started[death.only]]
    try:
        if not os.read(victims[0][1], 1):
            raise EOFError(f"the child ended before {death}")
        for child, _ in victims:
            os.kill(child, signal.SIGKILL)
        codes = [end(child) for child, _ in started]
    except BaseException:
        for child, _ in started:
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        for _, pipe in started:
            os.close(pipe)
    return {**death._asdict(), "codes": codes, **describe(folder)}


def describe(folder: Path) -> dict[str, Any]:
    last, part = folder / "last.ckpt", folder / "last.ckpt.part"
    return {
        "round": torch.load(last, weights_only=True)["global_step"] if last.exists() else None,
        "part": None if not part.exists() else "whole" if loads(part) else "torn",
    }


def loads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError):
        return False
    return True


def finish(folder: Path, ranks: int) -> list[int]:
    """Run to the end; returns the exit codes."""
    started = start(folder, None, ranks)
    codes = [end(child) for child, _ in started]
    for _, pipe in started:
        os.close(pipe)
    return codes


def main(folder: Path) -> None:
    folders = {name: folder / name for name in ("never", "often")}
    for made in folders.values():
        made.mkdir()
    report: dict[str, Any] = {"never": finish(folders["never"], 1)}
    report["deaths"] = [kill(folders["often"], death) for death in DEATHS]
    report["often"] = finish(folders["often"], 2)
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
