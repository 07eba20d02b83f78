"""`FlatView`: tensors to a float64 vector and back without losing a bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedscale.utils import flat_view
from lightning_fedscale.utils.flat_view import FlatView

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
COMPLEX = (torch.complex64, torch.complex128)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (*FLOATS, *INTEGERS, *COMPLEX)) -> Tensor:
    """A random tensor of any of the dtypes, contiguous or not."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "strided":
        shape = (*shape, 2)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-3, 3))
    if dtype in INTEGERS:
        values = values.abs() * 10 % 100
    made = (torch.complex(values, -2 * values) if dtype in COMPLEX else values).to(dtype)
    if layout == "transposed" and made.dim() > 1:
        return made.transpose(0, 1)
    return made[..., 0] if layout == "strided" else made


def bits(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors(FLOATS + COMPLEX), min_size=1, max_size=4), st.lists(tensors(), max_size=4))
def test_read_and_write_change_no_bit(trainable: list[Tensor], carried: list[Tensor]) -> None:
    everything = [*trainable, *carried]
    before = bits(everything)
    layout = [(tensor.data_ptr(), tensor.stride()) for tensor in everything]
    view = FlatView(trainable, carried)
    vector = view.read()
    assert vector.dtype == torch.float64
    width = [tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in everything]
    assert (view.trainable, view.size) == (sum(width[: len(trainable)]), sum(width))
    expected = [(torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().flatten() for tensor in before]
    assert torch.equal(vector, torch.cat(expected))

    for tensor in everything:
        tensor.zero_()
    view.write(vector)
    assert all(torch.equal(now, then) for now, then in zip(everything, before, strict=True))
    assert [(tensor.data_ptr(), tensor.stride()) for tensor in everything] == layout


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors(FLOATS + COMPLEX), min_size=1, max_size=4), st.lists(tensors(), max_size=4))
def test_parts_are_the_whole_and_copies_keep_every_bit(trainable: list[Tensor], carried: list[Tensor]) -> None:
    everything = [*trainable, *carried]
    for most in (1, 5, 1000):
        with mock.patch.multiple(flat_view, ONE_PART=0, elements_at_once=lambda device, most=most: most):
            view = FlatView(trainable, carried)
            copy, before = view.copy(), bits(everything)
            vector, ends = view.read(), [0]
            for part in view.parts:
                assert part.elements.start == ends[-1]
                assert torch.equal(view.read_part(part, view.empty()), vector[part.elements])
                ends.append(part.elements.stop)
            assert ends[-1] == view.size
            assert torch.equal(copy.vector, vector)
            for tensor in everything:
                tensor.zero_()
            assert torch.equal(copy.vector, vector)
            view.write_copy(copy)
            assert all(torch.equal(now, then) for now, then in zip(bits(everything), before, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors(FLOATS + COMPLEX), min_size=1, max_size=4), st.lists(tensors(), max_size=4))
def test_substituted_shows_the_vector_and_leaves_the_tensors(trainable: list[Tensor], carried: list[Tensor]) -> None:
    everything = [*trainable, *carried]
    view = FlatView(trainable, carried)
    vector = view.read()
    then = bits(everything)
    for tensor in everything:
        tensor.copy_(torch.ones_like(tensor))
    now = bits(everything)
    state: dict[str, Any] = {str(i): tensor for i, tensor in enumerate(everything)}
    other = torch.full((3,), 7.0)
    shown = view.substituted({**state, "other": other, "extra": {"n": 1}}, vector)
    assert shown["other"] is other
    assert shown["extra"] == {"n": 1}
    for i, tensor in enumerate(everything):
        assert shown[str(i)].dtype == tensor.dtype
        assert torch.equal(shown[str(i)], then[i])
        assert torch.equal(tensor, now[i])


def test_integers_are_rounded_to_the_nearest_and_floats_are_not() -> None:
    weight, counter = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    view = FlatView([weight], [counter])
    view.write(torch.tensor([0.4, 0.6, -1.6, 0.4, 0.6, -1.6], dtype=torch.float64))
    assert weight.tolist() == pytest.approx([0.4, 0.6, -1.6])
    assert counter.tolist() == [0, 1, -2]


def test_channels_last_parameters_keep_their_layout() -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expected = weight.clone()
    view = FlatView([weight], [])
    vector = view.read()
    assert torch.equal(vector, expected.double().reshape(-1))
    weight.zero_()
    view.write(vector)
    assert torch.equal(weight, expected)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_are_written_in_place_and_without_autograd() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    view = FlatView([parameter], [])
    view.write(view.read() * 3)
    assert parameter.tolist() == [3.0, 3.0]
    assert parameter.is_leaf
    assert not view.read().requires_grad


def test_views_share_memory_with_their_vector_and_no_other() -> None:
    view = FlatView([torch.zeros(2, 3)], [torch.zeros(4)])
    vectors = [view.empty().fill_(i) for i in range(20)]
    for i, vector in enumerate(vectors):
        parts = view.views(vector)
        assert [part.shape for part in parts] == [(2, 3), (4,)]
        parts[1][0] = -1.0
        assert vector.tolist() == [i] * 6 + [-1.0] + [i] * 3
    # The address of a vector that is gone may be that of the next one.
    for i in range(20):
        vector = view.empty().fill_(i)
        assert all(bool((part == i).all()) for part in view.views(vector))
        del vector


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=5))
def test_large_integers_survive(values: list[int]) -> None:
    counter = torch.tensor(values)
    view = FlatView([torch.zeros(1)], [counter])
    vector = view.read()
    counter.zero_()
    view.write(vector)
    assert counter.tolist() == values


def test_every_bfloat16_and_float16_survives() -> None:
    every = torch.from_numpy(np.arange(-(2**15), 2**15, dtype=np.int16))
    for dtype in (torch.float16, torch.bfloat16):
        numbers = every.view(dtype)
        numbers = numbers[~numbers.isnan()].clone()
        view = FlatView([numbers], [])
        expected, vector = numbers.clone(), view.read()
        numbers.zero_()
        view.write(vector)
        assert torch.equal(numbers.view(torch.int16), expected.view(torch.int16))


def test_counters_are_written_together_and_keep_their_bits() -> None:
    values = [2**60 + 1, 7, 3]
    counters = [torch.tensor(value) for value in values]
    view = FlatView([torch.zeros(1)], [*counters, torch.tensor(True), torch.tensor([2**60 + 1, 4])])
    vector = view.read()
    vector[2] = 8.6
    for counter in counters:
        counter.zero_()
    view.write(vector)
    assert [int(counter) for counter in counters] == [2**60 + 1, 9, 3]


def test_many_tensors_are_copied_with_one_type_on_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.11, torch wrote garbage on CUDA where the targets of one such copy had several types."""
    copy, calls = torch._foreach_copy_, []

    def watched(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(len(targets))
        for side in (targets, sources):
            assert len({tensor.dtype for tensor in side}) == 1
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    floats = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64), torch.ones(4)]
    counters = [torch.tensor(number) for number in range(5)]
    view = FlatView(floats, counters)
    (part,) = view.parts
    view.write(view.read() * 2 - view.read_part(part, view.empty()))
    view.write_copy(view.copy())
    assert all(bool((tensor == 1).all()) for tensor in floats)
    assert [int(counter) for counter in counters] == list(range(5))
    assert sum(calls) == 5 * 9  # all tensors, read twice, copied once and written twice
