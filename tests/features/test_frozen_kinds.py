"""Frozen parameters that are views, sparse, or tensor subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.features.test_frozen import NAMED, Run, Student, in_place


class Wrapping(Tensor):
    """A tensor of another one, as quantized weights are, that knows few operators."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        made: Any = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.held = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapping:
        return Wrapping(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            raise NotImplementedError(f"{func}")
        return cls(func(args[0].held))


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_quantized_and_sparse_parameters_may_be_frozen(executor: str) -> None:
    class Quantized(Student):
        def __init__(self) -> None:
            super().__init__(in_place)
            self.scale: Any = nn.Parameter(Wrapping(torch.tensor([1, 2], dtype=torch.int8)), requires_grad=False)
            self.mask = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale.held[1] + self.mask.to_dense()[0, 1]

    run, named = Run(Quantized, executor=executor), Run(Quantized, executor=executor, **NAMED)
    assert set(run.carried) == {"teacher.weight", "teacher.bias"}
    for name in ("student.weight", "teacher.weight"):
        assert torch.equal(run.state[name], named.state[name])


class Rows(Student):
    """Parameters that are rows of one tensor, so that a write to any of them counts in the version of all."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        rows = torch.ones(3, 4)
        self.bias = nn.Parameter(rows[0])
        self.one, self.two = (nn.Parameter(row, requires_grad=False) for row in rows[1:])
        self.writes = writes

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.writes:
            with torch.no_grad():
                self.two.add_(1)
        return super().training_step(batch, batch_idx) + (self.bias * self.one).square().mean()


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
@pytest.mark.parametrize("writes", [False, True])
def test_rows_of_one_tensor_are_separate_parameters(executor: str, writes: bool) -> None:
    run = Run(lambda: Rows(writes=writes), executor=executor)
    assert run.carried == ["two"] * writes
    assert run.is_same_as(Run(lambda: Rows(writes=writes), executor=executor, buffers={"one": "mean", "two": "mean"}))
    assert bool((run.state["two"] > 1).all()) is writes


class SparseGradients(Student):
    def __init__(self) -> None:
        super().__init__(in_place)
        self.table = nn.Embedding(4, 4, sparse=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.table(batch[1]).square().mean()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


def test_operators_may_write_to_sparse_tensors() -> None:
    run = Run(SparseGradients)
    assert set(run.carried) == {"teacher.weight", "teacher.bias"}
    assert run.is_same_as(Run(SparseGradients, **NAMED))
