"""What every compressor must do, whatever it sends."""

from __future__ import annotations

import io
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedscale.compressors import (
    FACTORIES,
    Compressor,
    Encoded,
    adaptive,
    by_name,
    error_feedback,
    phase_driven,
    power_sgd,
    qsgd,
    random_k,
    sign,
    top_k,
    uniform_quantization,
)
from lightning_fedscale.compressors.bits import pack, unpack, width_of
from lightning_fedscale.compressors.vectors import LARGEST, at_least, at_most
from lightning_fedscale.types import Params

PLAIN = [make() for make in FACTORIES.values()]
VARIANTS = [
    top_k(ratio=0.5),
    top_k(ratio=0.9),
    top_k(k=1),
    random_k(k=3),
    random_k(ratio=0.3, unbiased=False),
    qsgd(levels=1),
    qsgd(levels=5, per_tensor=True),
    qsgd(levels=300),
    sign(per_tensor=True),
    power_sgd(rank=1, min_compression=1),
    uniform_quantization(levels=2),
    uniform_quantization(levels=5),
    uniform_quantization(levels=1000),
    error_feedback(top_k(ratio=0.2)),
    error_feedback(power_sgd(rank=1)),
    adaptive(lambda factor: random_k(ratio=1 / factor, unbiased=False), lowest=1.5, highest=9, window=2),
    phase_driven(SimpleNamespace(critical=True), critical=qsgd(3), otherwise=sign()),
    phase_driven(SimpleNamespace(critical=False), critical=top_k(0.9), otherwise=power_sgd(1)),
    error_feedback(phase_driven(SimpleNamespace(critical=False), critical=top_k(0.9), otherwise=top_k(0.1))),
]
RULES = PLAIN + VARIANTS
BY_NAME = {f"{number} {rule.name}": rule for number, rule in enumerate(RULES)}
every_rule = pytest.mark.parametrize("rule", BY_NAME.values(), ids=BY_NAME.keys())

SHAPES = st.lists(st.sampled_from([(), (1,), (7,), (0,), (2, 3), (12, 9), (5, 4, 3), (1, 20)]), max_size=4)
SCALES = st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e10, 1e38])


def update(shapes: list[tuple[int, ...]], scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"parameter {i}": scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        for i, shape in enumerate(shapes)
    }


def encode(rule: Compressor, delta: Params, state: Any = None, seed: int = 0) -> tuple[Encoded, Any]:
    return rule.encode(delta, rule.init(delta) if state is None else state, np.random.default_rng(seed))


def same(first: Params, second: Params) -> bool:
    """Equal to the bit, in names, order, shapes and signs of zero."""
    return list(first) == list(second) and all(
        torch.equal(first[name].view(torch.int64), second[name].view(torch.int64)) for name in first
    )


def square(params: Params) -> float:
    return math.fsum(float(tensor.square().sum()) for tensor in params.values())


def difference(first: Params, second: Params) -> Params:
    return {name: first[name] - second[name] for name in first}


@every_rule
@settings(max_examples=50)
@given(shapes=SHAPES, scale=SCALES, seed=st.integers(0, 9))
def test_message_is_what_is_seen_as_long_as_told_and_not_longer_than_a_dense_one(
    rule: Compressor, shapes: list[tuple[int, ...]], scale: float, seed: int
) -> None:
    delta = update(shapes, scale, seed)
    dense = 32 * sum(value.numel() for value in delta.values())
    header = 64 * max(1, len(shapes)) + 32  # scales or a seed, and which rule it was
    before, state = {name: value.clone() for name, value in delta.items()}, None
    for message in range(3):
        encoded, state = encode(rule, delta, state, seed=message)
        payload = encoded.payload()
        assert type(encoded.bits) is int
        assert encoded.bits <= dense + header
        assert len(payload) == math.ceil(encoded.bits / 8)
        assert same(rule.decode(payload, delta), encoded.seen)
        assert {name: value.shape for name, value in encoded.seen.items()} == {n: v.shape for n, v in delta.items()}
        assert all(value.isfinite().all() for value in encoded.seen.values())
        assert same(delta, before)


@pytest.mark.parametrize("rule", PLAIN, ids=FACTORIES)
def test_large_updates(rule: Compressor) -> None:
    delta = update([(700, 900), (3,)])  # places take more than two bytes
    encoded, _ = encode(rule, delta)
    payload = encoded.payload()
    assert len(payload) == math.ceil(encoded.bits / 8)
    assert same(rule.decode(payload, delta), encoded.seen)


@every_rule
def test_claims_about_state_are_true(rule: Compressor) -> None:
    delta = update([(12, 9), (7,)])
    state = rule.init(delta)
    _, after = encode(rule, delta, state)
    if not rule.stateful:
        assert state is None
        assert after is None
        return
    file = io.BytesIO()
    torch.save(after, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = update([(12, 9), (7,)], seed=1)
    (first, _), (second, _) = encode(rule, other, after, seed=1), encode(rule, other, loaded, seed=1)
    assert same(first.seen, second.seen)
    assert first.payload() == second.payload()


@every_rule
def test_randomness_comes_from_the_argument(rule: Compressor) -> None:
    delta = update([(12, 9), (7,)])
    numpy_before, torch_before = np.random.get_state(), torch.get_rng_state()
    first, second = encode(rule, delta)[0].payload(), encode(rule, delta)[0].payload()
    assert first == second
    assert np.array_equal(np.random.get_state()[1], numpy_before[1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_before)


@every_rule
def test_layout_in_memory_does_not_matter(rule: Compressor) -> None:
    wide = update([(9, 24), (14,)])
    views = {"parameter 0": wide["parameter 0"].T[::2], "parameter 1": wide["parameter 1"][::2]}
    assert not any(view.is_contiguous() for view in views.values())
    copies = {name: view.contiguous() for name, view in views.items()}
    assert same(encode(rule, views)[0].seen, encode(rule, copies)[0].seen)


@every_rule
def test_nothing_to_send(rule: Compressor) -> None:
    for delta in ({}, {"empty": torch.zeros(0, 3, dtype=torch.float64)}):
        encoded, _ = encode(rule, delta)
        assert encoded.bits <= 96
        assert same(rule.decode(encoded.payload(), delta), encoded.seen)


@every_rule
def test_zero_update_is_seen_as_zero(rule: Compressor) -> None:
    delta, state = update([(12, 9), (7,)], scale=0.0), None
    for _ in range(3):
        encoded, state = encode(rule, delta, state)
        assert square(encoded.seen) == 0


@every_rule
def test_numbers_beyond_float32_stay_finite(rule: Compressor) -> None:
    encoded, _ = encode(rule, update([(12, 9), (7,)], scale=1e60))
    assert all(value.isfinite().all() for value in encoded.seen.values())


@pytest.mark.parametrize("rule", PLAIN, ids=FACTORIES)
def test_rules_can_be_sent_to_other_processes(rule: Compressor) -> None:
    delta, twin = (
        update([(12, 9), (7,)]),
        pickle.loads(pickle.dumps(error_feedback(rule) if rule.contractive else rule)),
    )
    assert encode(twin, delta)[0].payload() == encode(rule, delta)[0].payload()


@every_rule
def test_message_of_another_length_is_refused(rule: Compressor) -> None:
    delta = update([(12, 9), (7,)])
    with pytest.raises(ValueError, match=r"payload has \d+ bytes: .* these parameters has \d+"):
        rule.decode(encode(rule, delta)[0].payload() + b"\0", delta)


# ---- contractive, or unbiased

DETERMINISTIC = [rule for rule in RULES if rule.contractive and "random_k" not in rule.name and "adap" not in rule.name]


@pytest.mark.parametrize("rule", DETERMINISTIC, ids=lambda rule: rule.name)
@given(shapes=SHAPES, scale=st.sampled_from([0.0, 1e-15, 1.0, 1e15]), seed=st.integers(0, 9))
def test_error_is_no_longer_than_the_update(
    rule: Compressor, shapes: list[tuple[int, ...]], scale: float, seed: int
) -> None:
    state = None
    for number in range(3):
        delta = update(shapes, scale, seed + number)
        encoded, state = encode(rule, delta, state)
        assert square(difference(encoded.seen, delta)) <= square(delta) * (1 + 1e-6)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.unbiased], ids=lambda rule: rule.name)
def test_expectation_is_the_update(rule: Compressor) -> None:
    delta, repeats = update([(5, 4), (6,)], seed=3), 2000
    generator = np.random.default_rng(0)
    samples = [flat(rule.encode(delta, rule.init(delta), generator)[0].seen) for _ in range(repeats)]
    error = np.mean(samples, axis=0) - flat(delta)
    deviation = np.std(samples, axis=0) / math.sqrt(repeats)
    # 26 elements at 4.5 standard errors: wrong once in 6,000 draws of the generator, whose seed is fixed.
    assert (np.abs(error) <= 4.5 * deviation + 1e-6).all()


def flat(params: Params) -> Any:
    return torch.cat([value.reshape(-1) for value in params.values()]).numpy()


def test_biased_random_k_is_contractive_in_expectation() -> None:
    delta, generator, repeats = update([(40,)]), np.random.default_rng(0), 4000
    rule = random_k(k=10, unbiased=False)
    errors = [square(difference(rule.encode(delta, None, generator)[0].seen, delta)) for _ in range(repeats)]
    assert np.mean(errors) == pytest.approx(0.75 * square(delta), abs=5 * float(np.std(errors)) / math.sqrt(repeats))


# ---- names, arguments


def test_all_names() -> None:
    for name in FACTORIES:
        assert by_name(name).name.startswith(name)
    with pytest.raises(ValueError, match=r"compressor='sing' is not known\. Did you mean 'sign'\? Known: 'identity'"):
        by_name("sing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: top_k(0.0), r"ratio=0\.0: pass a share of the elements in \(0, 1\]"),
        (lambda: top_k(20), r"ratio=20: pass a share .* their number as k="),
        (lambda: top_k("0.1"), "ratio='0.1': pass a share"),  # type: ignore[arg-type]
        (lambda: top_k(0.1, k=3), "ratio=0.1 and k=3: pass only one"),
        (lambda: random_k(k=0), "k=0: pass an integer of at least 1"),
        (lambda: random_k(0.1, unbiased=1), "unbiased=1: pass True or False"),  # type: ignore[arg-type]
        (lambda: qsgd(0), "levels=0: pass an integer from 1 to 65536"),
        (lambda: qsgd(4, per_tensor=2), "per_tensor=2: pass True or False"),  # type: ignore[arg-type]
        (lambda: uniform_quantization(1), "levels=1: pass an integer from 2 to 65536"),
        (lambda: power_sgd(1.5), r"rank=1\.5: pass an integer"),  # type: ignore[arg-type]
        (lambda: power_sgd(1, 0.5), r"min_compression=0\.5: pass a number of at least 1"),
        (lambda: error_feedback("top_k"), "compressor='top_k': pass a compressor"),  # type: ignore[arg-type]
        (lambda: error_feedback(qsgd(4)), r"error_feedback\(qsgd\(4\)\): .* remove error_feedback\."),
        (lambda: error_feedback(random_k(0.1)), "remove error_feedback, or pass unbiased=False"),
        (lambda: error_feedback(error_feedback(sign())), "already keeps its errors"),
        (lambda: phase_driven(True, sign(), sign()), "phase=True: pass an object with the attribute critical"),  # type: ignore[arg-type]
        (lambda: phase_driven(SimpleNamespace(critical=True), sign, sign()), "critical=<function sign"),  # type: ignore[arg-type]
        (
            lambda: phase_driven(SimpleNamespace(critical=True), error_feedback(sign()), sign()),
            "apply error_feedback last",
        ),
        (lambda: adaptive(0.1), r"compress=0\.1: pass a function"),  # type: ignore[arg-type]
        (lambda: adaptive(lambda factor: power_sgd(1)), "compress: .*has a state"),
        (lambda: adaptive(threshold=1.5), r"threshold=1\.5: pass the least share"),
        (lambda: adaptive(lowest=20, highest=10), "lowest=20: pass a compression factor above 1, at most highest"),
        (lambda: adaptive(growth=1), "growth=1: pass a number above 1"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ---- numbers as they travel


@given(st.floats(-3e38, 3e38))
def test_bounds_are_the_nearest_on_their_side(value: float) -> None:
    low, high = at_most(value), at_least(value)
    assert float(low) <= value <= float(high)
    assert high == low if float(np.float32(value)) == value else high == np.nextafter(low, np.float32(np.inf))


def test_bounds_stay_finite() -> None:
    assert [float(at_most(-1e300)), float(at_least(1e300))] == [-LARGEST, LARGEST]


# ---- packing


@given(width=st.integers(0, 40), numbers=st.lists(st.integers(0, (1 << 40) - 1), max_size=50))
def test_packed_numbers_come_back(width: int, numbers: list[int]) -> None:
    values = np.array(numbers, np.uint64) & np.uint64((1 << width) - 1)
    data = pack(values, width)
    assert len(data) == math.ceil(len(values) * width / 8)
    assert unpack(data, len(values), width).tolist() == values.tolist()


@given(st.integers(1, 1 << 40))
def test_width_is_the_logarithm_rounded_up(count: int) -> None:
    assert 2 ** width_of(count) >= count > (2 ** width_of(count)) // 2
