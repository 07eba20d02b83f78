"""What libraries keep for themselves, as the memory model has it measured in processes of their own."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fedscale.devices import estimate_memory
from lightning_fedscale.devices.probe import probe
from lightning_fedscale.devices.profiling import libraries
from lightning_fedscale.devices.profiling.dry_run import DryRun
from tests import keepers, pythons
from tests.keepers import KEEPERS
from tests.memory_models import keeper, kept
from tests.networks import Classifier, mlp, vectors


class Told(NamedTuple):
    """What a process says that has run nothing before; see `tests.keepers`."""

    promised: int
    kept: dict[str, list[tuple[int, int]]]
    fits: list[bool]
    peaks: list[int]


@pytest.fixture(name="copies")
def new_processes_are_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What measures libraries does so in a copy of a process that has imported torch, and has run nothing."""

    def run(command: list[str], *, input: bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
        request = tmp_path / "request"
        request.write_bytes(input)
        code, *arguments = command[2:]
        done = pythons.run("-c", f"import sys; sys.stdin = open({str(request)!r}); {code}", *arguments)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.encode(), done.stderr.encode())

    monkeypatch.setattr(libraries, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="module")
def told() -> Told:
    torch.set_num_threads(1)
    promised = keepers.PROMISED.model().max_batch(keepers.BUDGET)
    done = pythons.run("-m", "tests.keepers", promised, round(promised / 0.85), folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    return Told(promised, **json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("kind", KEEPERS)
def test_what_libraries_keep(kind: str, told: Told) -> None:
    model = keeper(kind)
    assert model.assumed == ""
    for batch, (code, buffers) in zip(keepers.BATCHES, told.kept[kind], strict=True):
        described = libraries.WITH_DESCRIPTION * code
        # The buffers of products are left to the headroom: they are as large for ten numbers as for millions.
        assert 0.9 * described - 2**19 <= kept(model, batch) <= 1.15 * described + buffers + 2**19
    assert (kept(model, 40) == 0) == (kind == "no libraries")


def test_the_prediction_alone_keeps_its_promise(told: Told) -> None:
    assert told.fits == [True, False]  # with what is predicted, and with 1 / 0.85 times as many samples


def nothing() -> None:
    """The process has run whatever other tests have run."""


def the_steps_themselves() -> None:
    module, batch = keepers.PROMISED.project()
    for samples in (*keepers.BATCHES, 16, 24):
        DryRun(module, batch).real_step(samples)()


def steps_under_a_profiler() -> None:
    with torch.profiler.profile():
        the_steps_themselves()


def a_probe_of_the_same() -> None:
    keepers.PROMISED.model()


def more_code_than_is_kept() -> None:
    for samples in range(1, 1100):  # oneDNN keeps 1024
        torch.conv2d(torch.zeros(samples, 1, 3, 3), torch.zeros(1, 1, 3, 3))


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    "before", [nothing, the_steps_themselves, steps_under_a_profiler, a_probe_of_the_same, more_code_than_is_kept]
)
def test_what_ran_before_makes_no_difference(before: Callable[[], None], told: Told) -> None:
    before()
    libraries._ask.cache_clear()
    model = keepers.PROMISED.model()
    assert [model.peak(batch) for batch in keepers.BATCHES] == told.peaks
    assert kept(model, 40) > 2**22


def test_a_process_of_its_own_leaves_nothing_open() -> None:
    libraries._ask.cache_clear()
    before = os.listdir("/proc/self/fd")
    KEEPERS["lstm"].model()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("interpreter", ["", "/nowhere/python", shutil.which("false"), shutil.which("true")])
def test_where_no_process_can_be_started_the_usual_is_assumed(
    interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = keeper("depthwise")
    libraries._ask.cache_clear()
    monkeypatch.setattr(sys, "executable", interpreter)
    model = KEEPERS["depthwise"].model()
    assert model.assumed
    assert 0.5 * kept(seen, 24) <= kept(model, 24) <= 2 * kept(seen, 24)


def test_what_is_assumed_is_told_and_only_where_something_is(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries._ask.cache_clear()
    monkeypatch.setattr(sys, "executable", "")
    model = KEEPERS["depthwise"].model()
    found = probe(model, 2**30)
    assert found.assumed == model.assumed != ""
    assert type(found)(**found.state_dict()) == found
    assert 2**22 < kept(KEEPERS["lstm"].model(), 24) < 2**24
    assert KEEPERS["no libraries"].model().assumed == ""  # nothing had to be measured


def test_what_measures_libraries_starts_with_torch_alone() -> None:
    tree = ast.parse(Path(libraries.__file__).read_text(encoding="utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"torch"}


class Twice(Classifier):
    """Sees every sample twice, as contrastive learning does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return super().training_step((torch.cat([inputs, inputs]), torch.cat([targets, targets])), batch_idx)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("kind", KEEPERS)
def test_peak_grows_but_where_torch_goes_another_way(kind: str) -> None:
    model = keeper(kind)
    borders = [15] if kind in ("one by one", "inverted residuals") else []
    assert model._dry_run.borders == borders
    sizes = [2, 15, 16, 24, 25, 300]
    peaks = [model.peak(size) for size in sizes]
    for (size, less), (_, more) in itertools.pairwise(zip(sizes, peaks, strict=True)):
        assert less < more or size in borders
    if borders:  # the code is there at once: this is what is not convex
        assert peaks[2] > np.interp(16, [15, 300], [peaks[1], peaks[-1]])
        for budget, expected in ((peaks[1], 15), (peaks[2] - 1, 15), (peaks[2], 16)):
            assert model.max_batch(budget, headroom=0.0) == expected


@pytest.mark.usefixtures("copies")
def test_the_border_is_where_operators_meet_so_many_rows() -> None:
    module, batch = KEEPERS["one by one"].project()
    assert estimate_memory(Twice(module.network), batch)._dry_run.borders == [7]
    assert estimate_memory(Twice(mlp()), vectors(2))._dry_run.borders == []


def test_what_real_tensors_do_not_tell_is_assumed() -> None:
    module, batch = KEEPERS["depthwise"].project()

    class Chosen(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            chosen = targets < 10 * (1 + int(targets.sum()))
            return super().training_step((inputs[chosen], targets[chosen]), batch_idx)

    model = estimate_memory(Chosen(module.network), batch)
    assert not model.exact
    assert "few samples" in model.assumed
    assert kept(model, 4) > 0
