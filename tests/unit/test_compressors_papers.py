"""Compressors against their papers: formulae in plain loops, sizes, messages byte by byte, other people's code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_fedscale.compressors import (
    Compressor,
    error_feedback,
    identity,
    phase_driven,
    power_sgd,
    qsgd,
    random_k,
    sign,
    top_k,
    uniform_quantization,
)
from lightning_fedscale.types import Params

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def vector(values: Any) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def draws(rule: Compressor, delta: Params, repeats: int) -> Any:
    """What is seen of the only tensor, again and again."""
    generator = np.random.default_rng(0)
    return np.array([rule.encode(delta, rule.init(delta), generator)[0].seen["w"].numpy() for _ in range(repeats)])


def seen(rule: Compressor, delta: Params) -> Any:
    return draws(rule, delta, 1)[0]


MODEL = {"matrix": torch.zeros(20, 30), "kernel": torch.zeros(8, 4, 3, 3), "bias": torch.zeros(20)}  # 600 + 288 + 20
D = 908


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        (identity(), 32 * D),
        (top_k(0.1), 91 * (32 + 10)),  # 10 bits tell 908 places apart
        (top_k(k=5), 5 * (32 + 10)),
        (random_k(0.1), 32 * 91 + 64),
        (qsgd(1), 32 + D * (1 + 1)),
        (qsgd(4), 32 + D * (1 + 3)),
        (qsgd(127), 32 + D * (1 + 7)),
        (qsgd(127, per_tensor=True), 3 * 32 + D * (1 + 7)),
        (sign(), D + 32),
        (uniform_quantization(16), D * 4 + 3 * 64),
        (uniform_quantization(256), D * 8 + 3 * 64),
        (power_sgd(2), 32 * (2 * (20 + 30) + 2 * (8 + 36) + 20)),
        (power_sgd(4), 32 * (4 * (20 + 30) + 288 + 20)),  # 288 / (4 (8 + 36)) < 2
        (error_feedback(sign()), D + 32),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_bits(rule: Compressor, bits: int) -> None:
    delta = {name: torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in MODEL.items()}
    assert rule.encode(delta, rule.init(delta), np.random.default_rng(0))[0].bits == bits


@pytest.mark.parametrize(
    ("rule", "values", "message"),
    [
        (identity(), [1.0, -2.0], "0000803f 000000c0"),
        (top_k(k=1), [0.5, -2.0, 1.0], "000000c0 01"),
        (top_k(k=2), [0.0, 3.0, 0.0, 0.0, -2.0], "00004040 000000c0 21"),  # places 001 and 100, lowest bit first
        (sign(), [0.5, -2.0, 0.5], "0000803f 02"),
        (qsgd(5), [3.0, -4.0], "0000a040 c3"),  # norm 5; 0011 and 1100, the highest bit is the sign
        (uniform_quantization(4), [0.0, 1.0, 3.0], "00000000 00004040 34"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_messages_byte_by_byte(rule: Compressor, values: list[float], message: str) -> None:
    delta = vector(values)
    encoded, _ = rule.encode(delta, None, np.random.default_rng(0))
    assert encoded.payload() == bytes.fromhex(message)


# ---- top-k, random-k


@given(VALUES, st.integers(1, 45))
def test_top_k_sends_the_largest(values: list[float], k: int) -> None:
    places = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]
    expected = [value if i in places else 0.0 for i, value in enumerate(values)]
    found = seen(top_k(k=k), vector(values))
    assert found.tolist() == expected
    lost = np.square(found - values).sum()
    assert lost <= max(0, 1 - k / len(values)) * np.square(values).sum() * (1 + 1e-9)


def test_first_ones_of_equal_magnitude_are_sent() -> None:
    assert seen(top_k(k=3), vector([1.0, -1.0, 2.0, 1.0, -1.0])).tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]


def test_top_k_chooses_among_all_parameters() -> None:
    delta = {"large": torch.tensor([5.0, 4.0]).double(), "small": torch.tensor([1.0, 2.0]).double()}
    encoded, _ = top_k(ratio=0.5).encode(delta, None, np.random.default_rng(0))
    assert encoded.seen["large"].tolist() == [5.0, 4.0]
    assert encoded.seen["small"].tolist() == [0.0, 0.0]


def test_top_k_reads_messages_of_any_k() -> None:
    delta = vector(np.random.default_rng(0).standard_normal(77))
    for k in range(1, 78):
        encoded, _ = top_k(k=k).encode(delta, None, np.random.default_rng(0))
        assert torch.equal(top_k(k=1).decode(encoded.payload(), delta)["w"], encoded.seen["w"])


def test_random_k_keeps_every_element_equally_often_and_scales_it() -> None:
    found = draws(random_k(k=5), vector(np.ones(20)), 4000)
    assert set(np.unique(found)) == {0.0, 4.0}
    assert ((found != 0).sum(axis=1) == 5).all()
    kept = (found != 0).mean(axis=0)
    assert np.abs(kept - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / 4000)
    together = np.mean(found[:, 0] * found[:, 1] != 0)  # two given places in the same draw: 5/20 * 4/19
    assert together == pytest.approx(1 / 19, abs=4.5 * math.sqrt(1 / 19 / 4000))


def test_variance_of_random_k() -> None:
    values = np.random.default_rng(1).standard_normal(20)
    errors = np.square(draws(random_k(k=5), vector(values), 4000) - values).sum(axis=1)
    expected = (20 / 5 - 1) * np.square(values).sum()
    assert errors.mean() == pytest.approx(expected, abs=4.5 * errors.std() / math.sqrt(4000))


# ---- quantizers


@given(VALUES, st.sampled_from([1, 2, 7, 100]))
def test_qsgd_rounds_to_one_of_the_two_levels_around(values: list[float], levels: int) -> None:
    found, norm = seen(qsgd(levels), vector(values)), math.sqrt(math.fsum(value * value for value in values))
    for value, quantized in zip(values, found.tolist(), strict=True):
        share = levels * abs(value) / norm if norm else 0.0
        level = abs(quantized) * levels / norm if norm else 0.0
        assert abs(level - round(level)) < 1e-4
        assert math.floor(share - 1e-6) <= round(level) <= math.ceil(share + 1e-6)
        assert quantized * value >= 0


@pytest.mark.parametrize("levels", [1, 4, 16])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_variance_of_qsgd(levels: int, per_tensor: bool) -> None:
    values = np.random.default_rng(2).standard_normal(50)
    errors = np.square(draws(qsgd(levels, per_tensor), vector(values), 3000) - values).sum(axis=1)
    norm = np.sqrt(np.square(values).sum())
    up = np.modf(levels * np.abs(values) / norm)[0]  # the probability of the upper level
    expected = float((up * (1 - up)).sum()) * (norm / levels) ** 2
    assert errors.mean() == pytest.approx(expected, abs=4.5 * errors.std() / math.sqrt(3000))
    assert expected <= min(50 / levels**2, math.sqrt(50) / levels) * norm**2


@given(VALUES)
def test_sign_is_the_mean_magnitude(values: list[float]) -> None:
    d, total = len(values), math.fsum(map(abs, values))
    found = seen(sign(), vector(values))
    expected = [math.copysign(total / d, value) if value else total / d for value in values]
    assert found == pytest.approx(expected, rel=1e-6)
    lost, squares = np.square(found - values).sum(), math.fsum(value * value for value in values)
    assert lost == pytest.approx(squares - total**2 / d, rel=1e-5, abs=1e-5 * squares)
    assert lost <= (1 - 1 / d) * squares * (1 + 1e-5)


def test_scales_of_tensors_apart() -> None:
    delta = {"large": torch.tensor([100.0, -300.0]).double(), "small": torch.tensor([0.25, 0.75]).double()}
    encoded, _ = sign(per_tensor=True).encode(delta, None, np.random.default_rng(0))
    assert encoded.bits == 4 + 2 * 32
    assert encoded.seen["large"].tolist() == [200.0, -200.0]
    assert encoded.seen["small"].tolist() == [0.5, 0.5]


GRID_OF = [-1.5, -0.25, 0.0, 0.3, 0.9, 2.5]


def test_uniform_quantization_on_the_grid_of_fedjax() -> None:
    # Printed by fedjax 0.0.17: uniform_stochastic_quantize(jnp.array(GRID_OF), 4, rng), all values that occur.
    grid = [-1.5, -0.16666662693023682, 1.1666667461395264, 2.5]
    found = draws(uniform_quantization(4), vector(GRID_OF), 500)
    assert np.unique(found) == pytest.approx(grid, abs=1e-6)
    for value, column in zip(GRID_OF, found.T, strict=True):
        assert (np.abs(column - value) <= (4 / 3) * (1 + 1e-6)).all()  # one of the two around it


def test_uniform_quantization_equals_fedjax() -> None:
    jax, fedjax = pytest.importorskip("jax"), pytest.importorskip("fedjax.aggregators.compression")
    repeats, grid = 2000, jax.numpy.array(GRID_OF, jax.numpy.float32)
    theirs = np.array(
        [fedjax.uniform_stochastic_quantize(grid, 4, jax.random.PRNGKey(seed)) for seed in range(repeats)]
    )
    ours = draws(uniform_quantization(4), vector(GRID_OF), repeats)
    assert np.unique(ours) == pytest.approx(np.unique(theirs), abs=1e-6)
    error = 4.5 * np.hypot(ours.std(axis=0), theirs.std(axis=0)) / math.sqrt(repeats)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= error + 1e-6).all()


def test_variance_of_uniform_quantization() -> None:
    values = np.random.default_rng(3).standard_normal(50)
    errors = np.square(draws(uniform_quantization(8), vector(values), 3000) - values).mean(axis=0)
    step = (values.max() - values.min()) / 7
    up = np.modf((values - values.min()) / step)[0]
    assert np.abs(errors - up * (1 - up) * step**2).max() < 0.05 * step**2
    assert errors.max() <= 0.26 * step**2


def test_constant_tensors_are_quantized_exactly() -> None:
    assert seen(uniform_quantization(2), vector(np.full(9, 0.5))).tolist() == [0.5] * 9


# ---- PowerSGD


def by_hand(matrix: Any, start: Any) -> tuple[Any, Any]:
    """Algorithm 1 of the paper with one worker, columns made orthogonal one after the other."""
    left = matrix @ start
    for i in range(left.shape[1]):
        for j in range(i):
            left[:, i] -= (left[:, i] @ left[:, j]) * left[:, j]
        left[:, i] /= math.sqrt(left[:, i] @ left[:, i])
    right = matrix.T @ left
    return left @ right.T, right


def test_matrices_that_become_just_half_as_large_are_sent_as_they_are() -> None:
    delta, rule = {"w": torch.ones(4, 4, dtype=torch.float64)}, power_sgd(1)  # 16 numbers or 8
    assert rule.encode(delta, rule.init(delta), np.random.default_rng(0))[0].bits == 32 * 16


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_power_sgd_by_hand(rank: int) -> None:
    rule, numbers = power_sgd(rank), np.random.default_rng(0)
    state: Any = rule.init({"w": torch.zeros(30, 40)})
    right = np.random.default_rng(7).standard_normal((40, rank))  # the very numbers that the first message draws
    for step in range(4):
        matrix = numbers.standard_normal((30, 40))
        expected, right = by_hand(matrix, right)
        encoded, state = rule.encode({"w": torch.from_numpy(matrix)}, state, np.random.default_rng(7 + step))
        assert encoded.seen["w"].numpy() == pytest.approx(expected, abs=1e-4)


def test_power_sgd_comes_to_the_best_approximation() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 40)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    rule, state = power_sgd(2), power_sgd(2).init({"w": matrix})
    for _ in range(200):
        encoded, state = rule.encode({"w": matrix}, state, np.random.default_rng(0))
    assert (encoded.seen["w"] - best).norm() < 0.01 * best.norm()


def test_power_sgd_goes_on_after_zeros() -> None:
    rule, delta = power_sgd(1), {"w": torch.zeros(20, 20, dtype=torch.float64)}
    state = rule.init(delta)
    _, state = rule.encode(delta, state, np.random.default_rng(0))
    delta["w"][5, 7] = 1.0  # no row that an orthonormal completion would have looked at
    encoded, _ = rule.encode(delta, state, np.random.default_rng(1))
    assert encoded.seen["w"].numpy() == pytest.approx(delta["w"].numpy(), abs=1e-6)


class Parameters(nn.Module):
    """A loss whose gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.kernel = nn.Parameter(torch.zeros(20, 30)), nn.Parameter(torch.zeros(16, 4, 3, 3))
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(gradients[name] * value).sum() for name, value in self.named_parameters()]).sum()


def test_power_sgd_equals_the_hook_of_torch(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    state = PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=3, min_compression_rate=2, orthogonalization_epsilon=0
    )
    model = Parameters()
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(state, powerSGD_hook)
    names = [name for name, _ in model.named_parameters()]

    def step(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(number)
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in model.named_parameters()}
        model.zero_grad()
        parallel(gradients).backward()
        return gradients, {name: value.grad.clone() for name, value in model.named_parameters()}  # type: ignore[union-attr]

    for number in range(3):  # not compressed yet
        step(number)
    gradients, compressed = step(3)
    rule = error_feedback(power_sgd(2))
    ours: Any = rule.init({name: value.detach() for name, value in model.named_parameters()})
    ours["error"] = {name: (gradients[name] - compressed[name]).double() for name in names}
    factors = next(iter(state.q_memory_dict.values()))
    widths = {"matrix": 30, "kernel": 36}
    order = sorted(widths, key=lambda name: -widths[name])  # as they lie in the bucket: last ones first
    for name, part in zip(order, factors.split([2 * widths[name] for name in order]), strict=True):
        ours["inner"][name] = part.view(widths[name], 2).clone()
    for number in range(4, 8):
        gradients, compressed = step(number)
        delta = {name: value.double() for name, value in gradients.items()}
        encoded, ours = rule.encode(delta, ours, np.random.default_rng(0))
        for name in names:
            assert encoded.seen[name].numpy() == pytest.approx(compressed[name].numpy(), abs=1e-4), (number, name)


def test_phase_says_in_eight_bits_who_sent() -> None:
    class Training:
        critical = True

    delta, training = vector([3.0, -4.0]), Training()
    rule = phase_driven(training, critical=qsgd(5), otherwise=sign())
    assert rule.encode(delta, None, np.random.default_rng(0))[0].payload() == bytes.fromhex("00 0000a040 c3")
    training.critical = False
    encoded, _ = rule.encode(delta, None, np.random.default_rng(0))
    assert encoded.payload() == bytes.fromhex("01 00006040 02")
    assert encoded.bits == 8 + 32 + 2
