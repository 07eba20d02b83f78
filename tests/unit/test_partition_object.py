"""The Partition itself: its views, its file, its split into training and validation."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.partitioners import Partition, check_partition, split
from lightning_fedscale.partitioners.grouping import even_sizes, group

property_test = settings(max_examples=40, deadline=None)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    owner = np.array(draw(st.lists(st.integers(-1, 6), min_size=1, max_size=60)))
    order = np.random.default_rng(draw(st.integers(0, 9))).permutation(len(owner))
    return Partition(*group(owner, 7, order))


def test_clients_are_read_only_views() -> None:
    partition = Partition.from_lists([[3, 1], [], [0, 2]])
    assert (len(partition), partition.num_clients, partition.num_samples) == (3, 3, 4)
    assert partition.sizes.tolist() == [2, 0, 2]
    assert [partition.client(i).tolist() for i in range(3)] == [[3, 1], [], [0, 2]]
    assert np.shares_memory(partition.client(0), partition.indices)
    with pytest.raises(ValueError, match="read-only"):
        partition.client(0)[0] = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.indices = np.arange(4)  # type: ignore[misc]


@pytest.mark.parametrize("i", [-1, 3, 10**9])
def test_client_out_of_range(i: int) -> None:
    with pytest.raises(IndexError, match=rf"client {i} does not exist: .* 0 to 2"):
        Partition.from_lists([[3, 1], [], [0, 2]]).client(i)


def test_client_wants_an_integer() -> None:
    with pytest.raises(TypeError):
        Partition.from_lists([[0]]).client(0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("offsets", [[0], [0, 1], [1, 2], [0, 2, 1, 2], [0, 3]])
def test_offsets_must_describe_the_indices(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets="):
        Partition(np.arange(2), np.array(offsets))


def test_from_mapping_and_its_errors() -> None:
    assert Partition.from_lists({1: np.array([2]), 0: [0, 1]}) == Partition.from_lists([[0, 1], [2]])
    with pytest.raises(ValueError, match=r"keys \[1, 2\]"):
        Partition.from_lists({1: [0], 2: [1]})
    with pytest.raises(ValueError, match="sample 1 appears more than once"):
        Partition.from_lists([[0, 1], [1]])
    with pytest.raises(ValueError, match=r"clients\[1\] has dtype float64"):
        Partition.from_lists([[0], [1.5]])


def test_check_names_the_sample() -> None:
    check_partition(Partition.from_lists([[0, 4], [2]]), num_samples=5)
    with pytest.raises(ValueError, match=r"sample 4 is not in the dataset: .* 0 to 3"):
        check_partition(Partition.from_lists([[0, 4], [2]]), num_samples=4)
    with pytest.raises(ValueError, match="sample -1 is not in the dataset"):
        check_partition(Partition(np.array([-1]), np.array([0, 1])))


def test_covers() -> None:
    assert Partition.from_lists([[2], [0, 1]]).covers(3)
    assert not Partition.from_lists([[2], [0, 1]]).covers(4)
    assert not Partition.from_lists([[3], [0, 1]]).covers(3)
    assert not Partition(np.array([0, 0, 2]), np.array([0, 3])).covers(3)


def test_fingerprint_is_fixed_for_ever() -> None:
    """A run resumed on another machine compares it, so neither platform nor version may change it."""
    partition = Partition.from_lists([[0, 1], [2]])
    assert partition.fingerprint == "cae2c198d907014ea0966fee0deb367c4e033f1000f94bf6f989753215172dfc"
    big_endian = Partition(partition.indices.astype(">i8"), partition.offsets.astype(">i8"))
    assert big_endian.fingerprint == partition.fingerprint
    others = [Partition.from_lists(lists) for lists in ([[1, 0], [2]], [[0], [1, 2]], [[0, 1, 2]], [[0, 1], [2], []])]
    assert len({p.fingerprint for p in [*others, partition]}) == 5


def test_pickle_keeps_it() -> None:
    partition = Partition.from_lists([[0, 1], [2]])
    assert pickle.loads(pickle.dumps(partition)) == partition


@property_test
@given(partition=partitions())
def test_save_and_load(partition: Partition, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("partition") / "new folder" / "p.json"
    partition.save(path)
    loaded = Partition.load(path)
    assert loaded == partition
    assert loaded.indices.dtype == loaded.offsets.dtype == np.int64
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]  # No temporary file is left.
    content = json.loads(path.read_text())
    assert {k: content[k] for k in ("version", "num_clients", "num_samples", "fingerprint")} == {
        "version": 1,
        "num_clients": partition.num_clients,
        "num_samples": partition.num_samples,
        "fingerprint": partition.fingerprint,
    }


def test_save_writes_long_arrays_in_pieces(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fedscale.partitioners.partition._CHUNK", 3)
    partition = Partition(np.arange(10), np.array([0, 3, 6, 10]))
    partition.save(tmp_path / "p.json")
    assert Partition.load(tmp_path / "p.json") == partition


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"indices": [0, 1, 2]', '"indices": [1, 0, 2]', "was changed after it was saved"),
        ('"offsets": [0, 2, 3]', '"offsets": [0, 1, 3]', "was changed after it was saved"),
        ('"version": 1', '"version": 2', "reads version 1"),
        ('"offsets"', '"starts"', "not a saved partition"),
        ("]}", "", "not a saved partition"),
        ("[0, 2, 3]", "[0, 2, 4]", "not a saved partition"),
    ],
)
def test_load_refuses_other_content(tmp_path, old: str, new: str, message: str) -> None:
    path = tmp_path / "p.json"
    Partition.from_lists([[0, 1], [2]]).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"p\.json.*{message}.*partition the dataset again"):
        Partition.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    old = Partition.from_lists([[0, 1], [2]])
    old.save(path)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_fedscale.partitioners.partition._write_integers", fail)
    with pytest.raises(OSError, match="disk full"):
        Partition.from_lists([[0]]).save(path)
    assert Partition.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


@property_test
@given(partition=partitions(), fraction=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_split_by_sample(partition: Partition, fraction: float, seed: int) -> None:
    train, validation = split(partition, fraction, seed=seed)
    assert train.num_clients == validation.num_clients == partition.num_clients
    for i in range(len(partition)):
        whole, kept, held_out = partition.client(i), train.client(i), validation.client(i)
        n = len(whole)
        assert len(held_out) == max(min(n - 1, int(n * fraction + 0.5)), 0)
        assert sorted([*kept, *held_out]) == sorted(whole)
        for part in (kept, held_out):  # Both keep the order.
            assert part.tolist() == [x for x in whole if x in set(part)]
    assert split(partition, fraction, seed=seed) == (train, validation)


@property_test
@given(partition=partitions(), seed=st.integers(0, 99))
def test_split_of_a_client_does_not_depend_on_the_others(partition: Partition, seed: int) -> None:
    _, together = split(partition, 0.3, seed=seed)
    for i in range(len(partition)):
        _, alone = split(Partition.from_lists([partition.client(i)]), 0.3, seed=seed)
        assert alone.client(0).tolist() == together.client(i).tolist()


def test_split_by_sample_is_fair_and_depends_on_the_seed() -> None:
    partition = Partition(np.arange(1000), np.arange(0, 1001, 10))
    held_out = np.stack([split(partition, 0.3, seed=seed)[1].indices for seed in range(200)])
    assert len({row.tobytes() for row in held_out}) == 200
    # Each sample is held out in 60 of 200 splits; 5 standard deviations are 32.
    assert np.abs(np.bincount(held_out.ravel(), minlength=1000) - 60).max() < 33


@property_test
@given(partition=partitions(), fraction=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_split_by_client(partition: Partition, fraction: float, seed: int) -> None:
    filled = np.count_nonzero(partition.sizes)
    if filled < 2:
        with pytest.raises(ValueError, match=f"there are {filled}"):
            split(partition, fraction, by="client", seed=seed)
        return
    train, validation = split(partition, fraction, by="client", seed=seed)
    sides = np.stack([train.sizes, validation.sizes])
    assert (sides.max(axis=0) == partition.sizes).all()
    assert (sides.min(axis=0) == 0).all()
    expected = min(filled - 1, max(int(filled * fraction + 0.5), 1 if fraction else 0))
    assert np.count_nonzero(validation.sizes) == expected
    for i in range(len(partition)):
        assert [*train.client(i), *validation.client(i)] == partition.client(i).tolist()
    assert split(partition, fraction, by="client", seed=seed) == (train, validation)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fraction": 1.0}, r"fraction=1.0: pass a number in \[0, 1\)"),
        ({"fraction": -0.1}, r"fraction=-0.1"),
        ({"fraction": float("nan")}, r"fraction=nan"),
        ({"fraction": 0.1, "by": "user"}, r"by='user': pass one of 'sample', 'client'"),
        ({"fraction": 0.1, "seed": -1}, r"seed=-1"),
    ],
)
def test_split_errors(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(Partition.from_lists([[0], [1]]), **kwargs)  # type: ignore[arg-type]


@property_test
@given(num_samples=st.integers(0, 100), num_groups=st.integers(1, 20))
def test_even_sizes_are_those_of_array_split(num_samples: int, num_groups: int) -> None:
    expected = [len(part) for part in np.array_split(np.arange(num_samples), num_groups)]
    assert even_sizes(num_samples, num_groups).tolist() == expected


@pytest.mark.parametrize("num_groups", [3, 2**16, 2**16 + 1])
def test_group_is_the_same_for_every_width_of_integers(num_groups: int) -> None:
    owner = np.array([2, 0, -1, 2, 1, 0])
    indices, offsets = group(owner, num_groups, order=np.array([5, 4, 3, 2, 1, 0]))
    assert indices.tolist() == [5, 1, 4, 3, 0]
    assert offsets[:4].tolist() == [0, 2, 3, 5]
    assert len(offsets) == num_groups + 1
