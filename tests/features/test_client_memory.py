"""``client_state_memory`` bounds what clients keep between rounds, and changes nothing else."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fedscale import Partition, local_rules
from lightning_fedscale.core.client_state import Files
from lightning_fedscale.core.round.checkpoint import FederationCheckpoint
from lightning_fedscale.utils.flat_view import FlatView
from tests.features import reference_loop
from tests.features.test_resume import Adam, Every, Fragile, Manual, Norm, equal, read

KEEP: dict[str, Any] = {"clients_per_round": 2, "client_optimizer": "keep", "executor": "sequential"}
# Adam with amsgrad keeps 3 numbers for each of 276 parameters and 4 counters: 3328 bytes a client.
CROWD = 12  # clients, which are more than the vectors of a round
BOUNDS: list[int | str] = [0, 3328, "7KB", "1GiB", "auto"]


@pytest.fixture(autouse=True)
def spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Every file that states were written to; all are gone in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    written: list[Path] = []
    keep = Files.keep

    def noted(self: Files, state: Any) -> Path:
        written.append(keep(self, state))
        return written[-1]

    monkeypatch.setattr(Files, "keep", noted)
    gc.freeze()  # what was there before is not looked through each time
    yield written
    gc.collect()
    assert os.listdir(folder) == []


def fit(kind: type[pl.LightningModule], folder: Path, bound: int | str, **options: Any) -> reference_loop.State:
    torch.manual_seed(0)
    module = kind()
    reference_loop.fit(
        module,
        strategy={**KEEP, "client_state_memory": bound},
        enable_checkpointing=True,
        callbacks=[Every(folder)],
        max_epochs=6,
        **options,
    )
    return reference_loop.state_of(module)


@pytest.mark.parametrize("kind", [Adam, Norm, Manual])
def test_any_bound_gives_the_same_bits_and_the_same_checkpoints(
    kind: type[pl.LightningModule], tmp_path: Path, spilled: list[Path]
) -> None:
    counts, results = [], []
    for number, bound in enumerate(BOUNDS):
        before = len(spilled)
        results.append(fit(kind, tmp_path / str(number), bound))
        counts.append(len(spilled) - before)
    assert counts[0] == 2 * 6  # every client of every round
    assert counts[3:] == [0, 0]
    assert counts == sorted(counts, reverse=True)
    if kind is Adam:
        assert 0 < counts[2] < counts[1] < counts[0]
    for number in range(1, len(BOUNDS)):
        assert reference_loop.same(results[0], results[number])
        for round in range(1, 7):
            first, other = (read(tmp_path / str(i) / f"{round}.ckpt") for i in (0, number))
            assert first["federated"]["clients"]["optimizers"]
            assert equal(first["federated"]["clients"], other["federated"]["clients"])


@pytest.mark.parametrize(("first", "then"), itertools.product([0, "auto"], repeat=2))
def test_a_checkpoint_of_any_bound_goes_on_with_any_other_and_needs_no_file(
    first: int | str, then: int | str, tmp_path: Path, spilled: list[Path]
) -> None:
    whole = fit(Adam, tmp_path / "whole", first)
    gc.collect()
    assert not any(path.exists() for path in spilled)
    resumed = fit(Adam, tmp_path / "resumed", then, ckpt_path=str(tmp_path / "whole" / "3.ckpt"))
    assert reference_loop.same(resumed, whole)
    for round in range(4, 7):
        left, right = (read(tmp_path / kind / f"{round}.ckpt") for kind in ("whole", "resumed"))
        assert equal(left["federated"], right["federated"])


def test_a_checkpoint_saved_after_fit_still_has_all_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, whole = reference_loop.fit(Adam(), strategy={**KEEP, "client_state_memory": 0}, max_epochs=6)
    torch.manual_seed(0)
    trainer, _ = reference_loop.fit(Adam(), strategy={**KEEP, "client_state_memory": 0}, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    _, resumed = reference_loop.fit(
        Adam(), strategy={**KEEP, "client_state_memory": 0}, max_epochs=6, ckpt_path=str(tmp_path / "mine.ckpt")
    )
    assert reference_loop.same(resumed.state_dict(), whole.state_dict())


class Once(Fragile):
    """Fails in the second client of the third round, and goes on when asked again."""

    def __init__(self) -> None:
        super().__init__(raise_in=16)


@pytest.mark.parametrize("bound", [0, 3328])
def test_an_interrupted_round_leaves_the_committed_states(bound: int, tmp_path: Path, spilled: list[Path]) -> None:
    options = {**KEEP, "local_steps": 3, "client_state_memory": bound}
    torch.manual_seed(0)
    whole = Fragile()
    reference_loop.fit(whole, strategy=options, max_epochs=5)
    torch.manual_seed(0)
    save = Every(tmp_path, save_on_exception=True)
    with pytest.raises(OSError, match="on purpose"):
        reference_loop.fit(Once(), strategy=options, enable_checkpointing=True, callbacks=[save], max_epochs=5)
    before = len(spilled)
    assert before > 0
    resumed = Fragile()
    reference_loop.fit(resumed, strategy=options, max_epochs=5, ckpt_path=str(tmp_path / "2.ckpt"))
    assert reference_loop.same(resumed.state_dict(), whole.state_dict())


def test_a_checkpoint_saved_inside_a_client_holds_what_was_committed(tmp_path: Path) -> None:
    saved = []
    for bound in (0, "auto"):
        torch.manual_seed(0)
        path = tmp_path / f"{bound}.ckpt"
        reference_loop.fit(
            Fragile(save_in=18, path=path),
            strategy={**KEEP, "local_steps": 3, "client_state_memory": bound},
            max_epochs=4,
        )
        saved.append(read(path))
    assert saved[0]["global_step"] == 2
    assert equal(saved[0]["federated"], saved[1]["federated"])
    assert equal(saved[0]["state_dict"], saved[1]["state_dict"])


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_models_of_clients_do_not_stay_in_memory_until_the_round_ends(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, split = [0], FlatView.views

    def watched(view: FlatView, vector: Tensor) -> list[Tensor]:
        parts = split(view, vector)
        held.append(len(view._cut))
        return parts

    monkeypatch.setattr(FlatView, "views", watched)
    everybody = Partition.from_lists([[sample, CROWD + sample] for sample in range(CROWD)])
    strategy = {
        "partitioner": everybody, "executor": executor, "personal": local_rules.Ditto(0.1), "client_state_memory": 0,
    }  # fmt: skip
    reference_loop.fit(Adam(), strategy=strategy, max_epochs=4)
    assert max(held) <= 5  # the vectors of the round itself, and the model of the client that begins


def test_a_client_s_own_model_is_read_from_its_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = Files.read, list[Path]()

    def watched(self: Files, kept: Path, *, mapped: bool = True) -> Any:
        reads.append(kept)
        return read(self, kept, mapped=mapped)

    monkeypatch.setattr(Files, "read", watched)
    strategy = {"personal": local_rules.Ditto(0.1), "client_state_memory": 0, "executor": "sequential"}
    reference_loop.fit(Adam(), strategy=strategy, max_epochs=3)
    assert len(reads) == len(set(reads)) == 2 * len(reference_loop.SIZES)  # in each round but the first


def test_a_resumed_run_keeps_nothing_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, left = FederationCheckpoint.load_state_dict, list[weakref.ref[Tensor]]()

    def noted(self: FederationCheckpoint, state: dict[str, Any]) -> None:
        left.extend(map(weakref.ref, tree_leaves([state["clients"]["optimizers"], state["losses"]])))
        read(self, state)

    monkeypatch.setattr(FederationCheckpoint, "load_state_dict", noted)
    fit(Adam, tmp_path, 0)
    trainer, _ = reference_loop.fit(
        Adam(), strategy={**KEEP, "client_state_memory": 0}, max_epochs=7, ckpt_path=str(tmp_path / "6.ckpt")
    )
    gc.collect()
    assert trainer.global_step == 7
    assert left
    assert not [each for each in left if each() is not None]
