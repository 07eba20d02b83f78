"""PowerSGD: matrices are sent as products of two thin ones."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.compressors.base import Compressor, Encoded, check_length
from lightning_fedscale.compressors.vectors import LARGEST
from lightning_fedscale.types import Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call

_State: TypeAlias = dict[str, Tensor]


@record_call
def power_sgd(rank: int = 2, min_compression: float = 2.0) -> Compressor:
    r"""PowerSGD (arXiv 1905.13727): run one power iteration per matrix, starting from the last message's factor.

    A tensor is an n x m matrix M, first dimension by all others. With Q of the sender's last message, or normal random
    numbers before the first one: :math:`P = \mathrm{orth}(M Q)`, :math:`Q = M^T P`, and the receiver decodes
    :math:`P Q^T`. So :math:`|P Q^T - M| \le |M|`, and for similar matrices the messages converge to the best
    approximation of that rank. It is biased: wrap it in `error_feedback` if senders take part repeatedly.

    Every sender has its own factors: unlike the paper's workers, clients of a round do not agree on P while they
    compute. A message has ``32 r (n + m)`` bits for a matrix, and 32 for each element of other tensors: vectors,
    and matrices that would not become ``min_compression`` times smaller.

    Args:
        rank: r, at least 1; min(n, m) for smaller matrices.
        min_compression: n m / (r (n + m)) must exceed it, else a tensor is sent uncompressed. The authors' code has 2.

    Raises:
        TypeError, ValueError: if an argument is invalid.

    Example:
        >>> delta = {"w": torch.outer(torch.arange(8.0), torch.ones(8)).double()}
        >>> rule = power_sgd(rank=1)
        >>> encoded, state = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        >>> encoded.bits, torch.allclose(encoded.seen["w"], delta["w"], atol=1e-5)  # of rank 1 as it is
        (512, True)
    """
    rank = checks.integer("rank", rank)
    remedy = "pass a number of at least 1, such as 2."
    plan = _Plan(rank, checks.number("min_compression", min_compression, remedy, lambda factor: factor >= 1))
    name = f"power_sgd({rank})" if plan.least == 2 else f"power_sgd({rank}, min_compression={plan.least:g})"
    return Compressor(
        name,
        partial(_init, plan=plan),
        partial(_encode, plan=plan),
        partial(_decode, plan=plan, name=name),
        stateful=True,
        contractive=True,
        operations=6.0 * rank,  # three products with a thin matrix, a multiplication and an addition each
    )


class _Plan(NamedTuple):
    rank: int
    least: float

    def shape(self, tensor: Tensor) -> tuple[int, int, int] | None:
        """Return rows, columns and rank of the factors; None for a tensor that is sent uncompressed."""
        if tensor.dim() < 2 or not tensor.numel():
            return None
        rows, columns = len(tensor), tensor.numel() // len(tensor)
        rank = min(self.rank, rows, columns)
        return (rows, columns, rank) if rows * columns > self.least * rank * (rows + columns) else None

    def numbers(self, tensor: Tensor) -> int:
        """Return the number of float32 numbers that a tensor is sent as."""
        shape = self.shape(tensor)
        return tensor.numel() if shape is None else shape[2] * (shape[0] + shape[1])


def _init(params: Params, *, plan: _Plan) -> _State:
    shapes = {name: plan.shape(tensor) for name, tensor in params.items()}
    return {name: torch.zeros(shape[1], shape[2]) for name, shape in shapes.items() if shape}


def _encode(delta: Params, state: _State, generator: np.random.Generator, *, plan: _Plan) -> tuple[Encoded, _State]:
    sent: list[Tensor] = []
    seen, after = {}, {}
    for name, tensor in delta.items():
        if (shape := plan.shape(tensor)) is None:
            sent.append(_single(tensor))
            seen[name] = sent[-1].double()
        else:
            left, right = _factors(tensor.reshape(shape[:2]), _started(state[name], generator))
            sent += left, right
            seen[name], after[name] = _product(left, right).view(tensor.shape), right.cpu()
    bits = 32 * sum(part.numel() for part in sent)
    return Encoded(seen, bits, partial(_message, sent)), after


def _decode(payload: bytes, like: Params, *, plan: _Plan, name: str) -> Params:
    check_length(payload, 4 * sum(map(plan.numbers, like.values())), name)
    numbers = torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32))
    parts = torch.split(numbers, [plan.numbers(tensor) for tensor in like.values()]) if like else ()
    seen = {}
    for part, (key, tensor) in zip(parts, like.items(), strict=True):
        part = part.to(tensor.device)
        if (shape := plan.shape(tensor)) is None:
            seen[key] = part.double().view(tensor.shape)
        else:
            rows, columns, rank = shape
            left, right = torch.split(part, [rows * rank, columns * rank])
            seen[key] = _product(left.view(rows, rank), right.view(columns, rank)).view(tensor.shape)
    return seen


def _started(last: Tensor, generator: np.random.Generator) -> Tensor:
    """Return the start of the iteration; zero columns (at first all) would stay zero and are drawn at random."""
    start = last.to("cpu", torch.float64, copy=True)  # a resumed run has read it onto the clients' device
    gone = ~start.any(0)
    if gone.any():
        start[:, gone] = torch.from_numpy(generator.standard_normal((len(start), int(gone.sum()))))
    return start


def _factors(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    left = _single(torch.linalg.qr(matrix @ start.to(matrix.device)).Q)
    return left, _single(matrix.T @ left.double())


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Do not use one matrix product: its order of sums, and so the last bit, depends on library and machine. Products of
    # float32 numbers are exact in float64.
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for column, row in zip(left.double().unbind(1), right.double().unbind(1), strict=True):
        total += torch.outer(column, row)
    return total


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().clamp(-LARGEST, LARGEST).float()


def _message(sent: list[Tensor]) -> bytes:
    return b"".join(part.cpu().contiguous().numpy().tobytes() for part in sent)
