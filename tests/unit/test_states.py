"""What clients keep, in bounded memory: any bounds give the same states, the oldest move on first, no file stays."""

from __future__ import annotations

import gc
import io
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedscale.core.client_state import (
    ClientStore,
    Files,
    Memory,
    PinnedMemory,
    StateStore,
    size_of,
    states,
    tiers_of,
)
from lightning_fedscale.core.executors import device_cache
from lightning_fedscale.core.executors.vectorized import executor
from lightning_fedscale.utils import memory

STATE_BYTES = 8 * 3 + 4


def state(number: float) -> dict[str, Any]:
    """28 bytes of tensors in dicts, lists and tuples, and things that are none."""
    moments = [torch.full((3,), number, dtype=torch.float64)]
    return {
        "state": {0: {"step": torch.tensor(float(number)), "moments": moments}},
        "options": ({"on": True}, None, "x", 0.5),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("lightning_fedscale-")}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Spilled states go here, so that no test sees another's."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    gc.freeze()  # what is collected below and in the tests is only what they have left
    yield folder
    gc.collect()
    assert list(folder.iterdir()) == [], "a store is gone, its files are not"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"), key=lambda path: int(path.stem))


# ---- bounds do not matter

events = st.one_of(
    st.tuples(st.just("stage"), st.integers(0, 4), st.sampled_from("ab"), st.floats(-9, 9)),
    st.tuples(st.just("put"), st.integers(0, 4), st.sampled_from("ab"), st.floats(-9, 9)),
    st.tuples(st.just("forget"), st.integers(0, 4), st.sampled_from("ab")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("rollback")),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(events, max_size=25), st.sampled_from([(0,), (30,), (100,), (30, 60), (0, 0), (math.inf,)]))
def test_a_store_is_a_dict_that_is_committed_and_rolled_back(
    history: list[tuple[Any, ...]], limits: tuple[float, ...]
) -> None:
    store = StateStore([*map(Memory, limits), Files()])
    committed: dict[tuple[int, str], dict[str, Any]] = {}
    staged: dict[tuple[int, str], dict[str, Any] | None] = {}
    for what, *of in history:
        if what == "commit":
            store.commit()
            committed = {key: value for key, value in {**committed, **staged}.items() if value is not None}
            staged = {}
        elif what == "rollback":
            store.rollback()
            staged = {}
        elif what == "put" and tuple(of[:2]) not in staged:  # states come from other ranks before a round begins
            store.put(of[0], of[1], state(of[2]))
            committed[of[0], of[1]] = state(of[2])
        elif what in ("stage", "forget"):
            store.stage(of[0], of[1], state(of[2]) if what == "stage" else None)
            staged[of[0], of[1]] = state(of[2]) if what == "stage" else None
        for client in range(5):
            names = {name: committed[client, name] for name in "ab" if (client, name) in committed}
            assert same(dict(sorted(store.of(client).items())), names)
            assert all(same(store.get(client, name), names.get(name)) for name in "ab")
        for name in "ab":
            assert sorted(store.clients(name)) == sorted(client for client, of_name in committed if of_name == name)
            kept = {client: value for (client, of_name), value in sorted(committed.items()) if of_name == name}
            assert same(store.snapshot().get(name, {}), kept)


def test_the_states_staged_longest_ago_move_on_first_and_never_before_they_must(temporary: Path) -> None:
    near, far = Memory(2 * STATE_BYTES), Memory(STATE_BYTES)
    store = StateStore([near, far, Files()])
    for client in range(3):
        store.stage(client, "a", state(client))
        store.commit()
    assert files(temporary) == []
    store.stage(3, "a", state(3))  # 0 is in the file, 1 in the middle, 2 and 3 in front
    store.commit()
    (spilled,) = files(temporary)
    assert same(torch.load(spilled), state(0))
    store.stage(1, "a", state(1.5))  # 1 takes part again: now 2 is next to go
    store.commit()
    store.stage(4, "a", state(4))
    store.commit()
    assert [float(torch.load(path)["state"][0]["step"]) for path in files(temporary)] == [0, 2]
    kept = [store.get(client, "a") for client in range(5)]
    assert [float(each["state"][0]["step"]) for each in kept if each is not None] == [0, 1.5, 2, 3, 4]


def test_what_a_round_replaces_does_not_push_others_out(temporary: Path) -> None:
    store = StateStore([Memory(3 * STATE_BYTES), Files()])
    for complete in (True, True, False, True):
        for client in range(3):  # all that fits
            store.stage(client, "a", state(client))
        if complete:
            store.commit()
        else:
            store.rollback()
    assert files(temporary) == []
    assert same(store.snapshot(), {"a": {client: state(client) for client in range(3)}})


def test_a_bound_of_nothing_keeps_all_in_files_also_while_a_round_runs(temporary: Path) -> None:
    store = StateStore([Memory(0), Files()])
    for client in range(3):
        store.stage(client, "a", state(client))
        assert len(files(temporary)) == client + 1
    store.rollback()
    assert files(temporary) == []
    store.stage(0, "a", state(0))
    store.commit()
    store.stage(0, "a", state(1))
    assert same(store.get(0, "a"), state(0))  # still the committed one
    store.commit()
    assert same(store.get(0, "a"), state(1))
    assert len(files(temporary)) == 1


def test_states_without_tensors_take_no_room(temporary: Path) -> None:
    store = StateStore([Memory(0), Files()])
    store.stage(0, "optimizers", [{"state": {}, "options": [{}]}])
    store.commit()
    assert files(temporary) == []
    assert store.get(0, "optimizers") == [{"state": {}, "options": [{}]}]


# ---- files


def test_tensors_read_from_a_file_outlive_it(temporary: Path) -> None:
    store = StateStore([Memory(0), Files()])
    store.put(0, "a", state(1))
    read, saved = store.get(0, "a"), store.snapshot()
    for number in range(2, 5):
        store.put(0, "a", state(number))
    assert len(files(temporary)) == 1
    store.clear()
    assert files(temporary) == []
    assert same(read, state(1))
    assert same(saved, {"a": {0: state(1)}})


def test_parts_of_a_larger_tensor_are_written_alone(temporary: Path) -> None:
    wave = torch.arange(100_000.0).reshape(10, -1)
    store = StateStore([Memory(0), Files()])
    for client in range(10):
        store.put(client, "a", {"row": wave[client], "column": wave[:, client]})
    assert all(path.stat().st_size < 60_000 for path in files(temporary))
    for client in range(10):
        assert same(store.get(client, "a"), {"row": wave[client], "column": wave[:, client]})


def test_tensors_of_any_kind_are_written_and_read() -> None:
    kinds = {
        "sparse": torch.eye(3).to_sparse(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.tensor([0.1, -0.0, torch.nan, torch.inf], dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j]),
        "bool": torch.tensor([True, False]),
        "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    store = StateStore([Memory(0), Files()])
    store.put(0, "a", kinds)
    found = store.get(0, "a")
    assert found is not None
    for name, tensor in kinds.items():
        dense, expected = (t.detach().to_dense() if t.is_sparse else t.detach() for t in (found[name], tensor))
        assert dense.dtype == expected.dtype
        assert dense.stride() == expected.stride()
        torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_snapshot_of_what_lies_in_files_takes_no_memory(temporary: Path) -> None:
    def held() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    size = 1 << 23
    store = StateStore([Memory(0), Files()])
    for client in range(8):
        store.put(client, "a", torch.full((size // 8,), client, dtype=torch.float64))
    before = held()
    saved = store.snapshot()
    assert [float(tensor[-1]) for tensor in saved["a"].values()] == list(range(8))
    target = temporary.parent / "checkpoint"
    torch.save(saved, target)
    assert held() - before < size
    assert same(torch.load(target, weights_only=True), saved)


def test_more_states_than_a_process_may_map_are_read_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fedscale.core.client_state import states

    monkeypatch.setattr(states, "_MAPPED_AT_ONCE", 2)
    asked: list[bool | None] = []
    load = torch.load

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["mmap"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noted)
    store = StateStore([Memory(0), Files()])
    for client in range(4):
        store.put(client, "a", state(client))
    assert same(store.snapshot(), {"a": {client: state(client) for client in range(4)}})
    assert asked == [True, True, False, False]


class Full(Files):
    """A disk on which only so many states find room."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def keep(self, state: Any) -> Path:
        if self.room == 0:
            raise OSError("client_state_memory: no room")
        self.room -= 1
        return super().keep(state)


def test_a_full_disk_is_told_when_states_are_staged_and_nothing_is_lost() -> None:
    disk = Full(1)
    store = StateStore([Memory(0), disk])
    store.put(0, "a", state(0))
    store.put(1, "a", state(1))  # came from another rank, which waits for this one
    with pytest.raises(OSError, match="no room"):
        store.stage(2, "a", state(2))
    store.rollback()
    assert same(store.snapshot(), {"a": {0: state(0), 1: state(1)}})
    disk.room = 9
    store.stage(2, "a", state(2))
    store.commit()
    assert same(store.snapshot(), {"a": {client: state(client) for client in range(3)}})


def test_a_disk_without_room_names_the_remedy(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    def save(value: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    store = StateStore([Memory(0), Files()])
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        OSError, match=r"client_state_memory: .* failed writing file\): set TMPDIR to a folder with more"
    ):
        store.stage(0, "a", state(0))
    assert files(temporary) == []


def test_the_folder_goes_with_the_store(temporary: Path) -> None:
    store = StateStore([Memory(0), Files()])
    assert folders() == set()
    store.put(0, "a", state(0))
    assert len(folders()) == 1
    assert (temporary / folders().pop()).stat().st_mode & 0o077 == 0  # nobody else's business
    del store
    gc.collect()
    assert folders() == set()


ENDS = """
import sys, torch
from lightning_fedscale.core.client_state import Files, Memory, StateStore
store = StateStore([Memory(0), Files()])
store.put(0, "a", torch.ones(3))
print(*store._tiers[1]._folder.iterdir())
sys.exit(3)
"""


def test_the_folder_goes_with_the_process(temporary: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert str(temporary) in done.stdout
    assert folders() == set()


SPILLS = """
import gc, torch
from lightning_fedscale.core.client_state import Files, Memory, StateStore
store = StateStore([Memory(0), Files()])
store.put(0, "a", torch.ones(3))
assert store._tiers[1]._folder.is_dir()
del store
gc.collect()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_folder_goes_with_a_process_that_multiprocessing_started(method: str, temporary: Path) -> None:
    # What unpickles a function of this file would import all that this file does.
    process = multiprocessing.get_context(method).Process(target=exec, args=(SPILLS, {}))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert process.exitcode == 0
    assert folders() == set()


def _let_go(store: StateStore) -> None:
    del store
    gc.collect()


def test_the_folder_stays_when_a_forked_worker_lets_go_of_its_copy(temporary: Path) -> None:
    store = StateStore([Memory(0), Files()])
    store.put(0, "a", state(0))
    worker = multiprocessing.get_context("fork").Process(target=_let_go, args=(store,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert same(store.get(0, "a"), state(0))


# ---- where states may lie


def test_tiers_by_device_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 800, "cuda": 400}
    monkeypatch.setattr("lightning_fedscale.core.client_state.states.free_memory", lambda device: free[device.type])

    def limits(*arguments: Any) -> list[tuple[type, float]]:
        return [(type(tier), tier.limit) for tier in tiers_of(*arguments)]

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert limits(cpu) == [(Memory, 200), (Files, math.inf)]
    assert limits(cpu, None, 2) == [(Memory, 100), (Files, math.inf)]
    assert limits(cpu, 0, 2) == [(Memory, 0), (Files, math.inf)]
    assert limits(cpu, 5000) == [(Memory, 5000), (Files, math.inf)]
    # On the device an eighth of what is free there, however much is allowed altogether.
    assert limits(cuda) == [(Memory, 50), (PinnedMemory, 200), (Files, math.inf)]
    assert limits(cuda, 150) == [(Memory, 50), (PinnedMemory, 100), (Files, math.inf)]
    assert limits(cuda, 30) == [(Memory, 30), (PinnedMemory, 0), (Files, math.inf)]


def test_shares_of_a_device_s_memory_leave_some_free() -> None:
    """Of what is free at first: states, which are there twice within a round, then data, then waves."""
    kept = 2 * states._SHARE_OF_DEVICE
    data = device_cache._SHARE_OF_FREE_MEMORY
    assert kept + data + executor._SHARE_OF_MEMORY * (1 - data) < 0.95


class _Lacking:
    """Fails as often as memory is lacking, and notes what is on the device then."""

    def __init__(self, error: Exception, store: StateStore, *, times: int) -> None:
        self.error, self.store, self.times = error, store, times
        self.near = list[int]()

    def __call__(self) -> str:
        self.near.append(len(self.store._queues[0]))
        if len(self.near) <= self.times:
            raise self.error
        return "done"


def test_states_make_way_if_memory_runs_out() -> None:
    store = StateStore([Memory(), Memory()])
    for client in range(3):
        store.put(client, "a", state(client))
    lacking = _Lacking(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), store, times=1)
    assert store.with_room(lacking) == "done"
    assert lacking.near == [3, 0]
    assert same(store.get(1, "a"), state(1))
    for error, times in ((ValueError("other"), 1), (MemoryError(), 2)):
        with pytest.raises(type(error)):
            store.with_room(_Lacking(error, store, times=times))


def test_a_state_that_does_not_fit_on_its_device_again_makes_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    store, place, places = StateStore([Memory(1000), Memory()]), states._on, list[int]()
    for client in range(3):  # 400 bytes each
        store.put(client, "a", {"x": torch.empty(100, device="meta")})

    def lacking(devices: list[torch.device], kept: Any) -> Any:
        places.append(len(store._queues[0]))
        if len(places) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return place(devices, kept)

    monkeypatch.setattr(states, "_on", lacking)
    found = store.get(0, "a")
    assert found is not None
    assert found["x"].device.type == "meta"
    assert places == [2, 0]


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory.free_memory(torch.device("cuda", 0)) == 140


def test_size_is_that_of_all_tensors() -> None:
    assert size_of(state(1)) == STATE_BYTES
    assert size_of([]) == size_of({"a": 1}) == 0


def test_a_client_store_of_any_bound_has_the_same_state_dict() -> None:
    saved = []
    for limit in (math.inf, 40, 0):
        store = ClientStore(StateStore([Memory(limit), Files()]))
        for client in range(4):
            store.stage(client, (1, client))
            store.stage_optimizers(client, [state(client)])
        store.states.stage(2, "control_variate", torch.ones(2))
        store.commit()
        file = io.BytesIO()
        torch.save(store.state_dict(), file)
        file.seek(0)
        saved.append(torch.load(file, weights_only=True))
        again = ClientStore(StateStore([Memory(40), Files()]))
        again.load_state_dict(saved[-1], torch.device("cpu"))
        assert same(again.state_dict(), saved[-1])
    assert list(saved[0]) == ["cursors", "optimizers", "control_variate"]
    assert same(saved[0], saved[1])
    assert same(saved[0], saved[2])
    assert list(saved[0]["optimizers"]) == list(range(4))


# ---- how much is free


def test_free_memory_is_what_the_host_has_within_what_control_groups_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free() -> int:
        return memory.free_memory(torch.device("cpu"))

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path / "groups")
    assert 0 < free() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n")
    assert free() == 5000 * 1024
    # Version 2: a job within a slice; the slice's limit is the tighter one.
    write("proc/self/cgroup", "0::/slice/job\n")
    for group, limit, used in (("slice/job", "max", 0), ("slice", "3000000", 1_000_000)):
        write(f"groups/{group}/memory.max", f"{limit}\n")
        write(f"groups/{group}/memory.current", f"{used}\n")
        write(f"groups/{group}/memory.stat", "anon 3\ninactive_file 500000\nfile 7\n")
    assert free() == 2_500_000  # caches would be given up
    # Version 1, in a container that has its own view of the groups and the host's path.
    write("proc/self/cgroup", "5:cpu:/host/path\n4:memory:/host/path\n0::/\n")
    write("groups/memory/memory.limit_in_bytes", "400000\n")
    write("groups/memory/memory.usage_in_bytes", "300000\n")
    write("groups/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\n")
    assert free() == 150_000
    write("groups/memory/memory.usage_in_bytes", "900000\n")
    assert free() == 0
    shutil.rmtree(tmp_path / "groups")
    assert free() == 5000 * 1024
