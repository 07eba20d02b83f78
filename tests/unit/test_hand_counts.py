"""FLOPs counted while steps run, against counts by hand, in which a multiplication and an addition are two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fedscale.callbacks import ComputeAccounting
from tests.networks import GPT


class Summed(pl.LightningModule):
    """The sum of what a network returns; its inputs require a gradient, as they do behind other layers."""

    def __init__(self, network: nn.Module, gradient: bool) -> None:
        super().__init__()
        self.network = network
        self._gradient = gradient

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs = batch.detach().requires_grad_() if self._gradient else batch
        output = self.network(inputs)
        loss: Tensor = (output[0] if isinstance(output, tuple) else output).sum()
        return loss + 0.0 * inputs.sum() if self._gradient else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(1))], lr=0.0)


class One(torch.utils.data.Dataset[Tensor]):
    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: int) -> Tensor:
        return self.batch[index]


def counted(network: nn.Module, batch: Tensor, gradient: bool = True) -> tuple[float, float]:
    """Forward and backward FLOPs of one real step."""
    accounting = ComputeAccounting(law=None)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False, callbacks=[accounting],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Summed(network, gradient), DataLoader(One(batch), len(batch)))
    return accounting.ledger.flops["forward"], accounting.ledger.flops["backward"]


# ---- convolutions


class Convolution(NamedTuple):
    dimensions: int
    inputs: int = 8
    outputs: int = 16
    kernel: int = 3
    size: int = 9
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def layer(self) -> nn.Module:
        kind = getattr(nn, f"Conv{'Transpose' if self.transposed else ''}{self.dimensions}d")
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return kind(self.inputs, self.outputs, self.kernel, **options)

    @property
    def places(self) -> int:
        """Of the kernel: in the output, or in the input where the convolution is transposed."""
        if self.transposed:
            return int(self.size**self.dimensions)
        reach = self.dilation * (self.kernel - 1) + 1
        return int(((self.size + 2 * self.padding - reach) // self.stride + 1) ** self.dimensions)

    def by_hand(self, samples: int) -> int:
        products = 0
        for _ in range(self.groups):  # each has its own share of the channels, on both sides
            products += (self.inputs // self.groups) * (self.outputs // self.groups)
        return int(2 * samples * self.places * products * self.kernel**self.dimensions)


CONVOLUTIONS = [
    *(Convolution(dimensions, transposed=transposed) for dimensions in (1, 2, 3) for transposed in (False, True)),
    *(Convolution(2, groups=groups, transposed=transposed) for groups in (2, 4, 8) for transposed in (False, True)),
    Convolution(1, groups=8, outputs=8, dilation=2, padding=2),  # as in WaveNet, depthwise
    Convolution(2, groups=8, outputs=8, padding=1),  # depthwise
    Convolution(2, groups=8, outputs=16, padding=1, stride=2),  # depthwise with a multiplier
    Convolution(3, groups=4, dilation=2, size=7),
    Convolution(2, dilation=3, padding=1),
    Convolution(2, stride=3, padding=2, kernel=5),
    Convolution(2, stride=2, padding=1, transposed=True, groups=2, dilation=2),
    Convolution(2, kernel=1),
]


@pytest.mark.parametrize(
    "convolution", CONVOLUTIONS, ids=lambda c: "-".join(f"{n[:3]}{v:d}" for n, v in c._asdict().items())
)
@pytest.mark.parametrize("gradient", [True, False], ids=["inside", "first"])
def test_convolutions(convolution: Convolution, gradient: bool) -> None:
    """Each gradient of a convolution costs what the convolution does; of the first layer's inputs none is taken."""
    samples = 2
    batch = torch.randn(samples, convolution.inputs, *[convolution.size] * convolution.dimensions)
    once = convolution.by_hand(samples)
    assert counted(convolution.layer, batch, gradient) == (once, once * (2 if gradient else 1))


# ---- everything else: a network, a batch, what forward costs, and what backward does

N, T, D, H = 3, 5, 8, 12  # samples, positions, width, another width


def linear(*sizes: int) -> int:
    return 2 * math.prod(sizes)


class Returns(nn.Module):
    """A network that is a function of its layers and the batch."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._function = function

    def forward(self, inputs: Tensor) -> Any:
        return self._function(inputs, *self.layers)


class Doubling(torch.autograd.Function):
    """A product with a constant whose backward the user has written."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        return gradient @ weight.t(), inputs.t() @ gradient


class Tied(nn.Module):
    """A head that is no layer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(words, D), nn.Linear(D, D, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.body(self.words(inputs)), self.words.weight)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def inverted_residual(channels: int, wide: int) -> nn.Module:
    """Of MobileNetV2 (1801.04381)."""
    return chain(
        nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
    )  # fmt: skip


def convnext(channels: int) -> nn.Module:
    """A block of ConvNeXt (2201.03545): depthwise 7 x 7, then two linear layers on channels last."""

    def block(x: Tensor, mix: nn.Module, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        return x + down(F.gelu(up(norm(mix(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)

    mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    layers = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
    return Returns(block, mix, *layers)


def resnext(channels: int, inner: int, groups: int) -> nn.Module:
    """A bottleneck of ResNeXt (1611.05431)."""
    return chain(
        nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, inner, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels),
    )  # fmt: skip


def self_attention(x: Tensor, layer: Any) -> Any:
    return layer(x, x, x, need_weights=False)


def with_weights(x: Tensor, layer: Any) -> Any:
    return layer(x, x, x)


def grouped_queries(x: Tensor) -> Tensor:
    key = x[:, :2]  # two heads of keys and values for four of queries
    return F.scaled_dot_product_attention(x, key, key, enable_gqa=True)


def across(x: Tensor) -> Tensor:
    """Three queries look at all positions."""
    return F.scaled_dot_product_attention(x[:, :, :3], x, x)


def masked(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(T, T, dtype=torch.bool).tril())


def additive(x: Tensor, query: nn.Module, score: nn.Module) -> Tensor:
    """Attention by a small network instead of products (1409.0473)."""
    q = query(x)
    return torch.softmax(score(torch.tanh(q[:, :, None] + q[:, None])).squeeze(-1), -1) @ x


def doubled(x: Tensor) -> Tensor:
    return Doubling.apply(x, torch.ones(D, D, requires_grad=True))


def saved(x: Tensor, layer: nn.Module) -> Any:
    return checkpoint(layer, x, use_reentrant=False)


def sparse(x: Tensor) -> Tensor:
    places = torch.tensor([[0, 1, 1, 2], [2, 0, 1, 2]])
    return torch.sparse.mm(torch.sparse_coo_tensor(places, torch.ones(4), (4, N)), x)


def teacher(x: Tensor, student: nn.Module, old: nn.Module) -> Tensor:
    with torch.no_grad():
        wanted = old(x)
    return student(x) - wanted


def penalty(x: Tensor, layer: nn.Module) -> Tensor:
    """The norm of a gradient is in the loss."""
    out = layer(x).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    return gradient.square().sum()


P = N * T  # places in a sequence
PROJECTIONS = linear(P, D, 4 * D)
PAIRS = linear(N, T, T, D)  # one of the two products of attention
ENCODER = PROJECTIONS + 2 * PAIRS + 2 * linear(P, D, H)
LSTM = linear(P, 4 * H, D) + linear(P, 4 * H, H)
TWO_LSTM, ACROSS = LSTM + 2 * linear(P, 4 * H, H), linear(N, 4, 3, T, D)
PIXELS, C = N * 6 * 6, 4
MOBILE = linear(PIXELS, C, 24) * 2 + linear(PIXELS, 24, 9)
NEXT = linear(PIXELS, C, 49) + 2 * linear(PIXELS, C, 4 * C)
XT = 2 * linear(PIXELS, 8, 16) + linear(PIXELS, 16, 16 // 4, 9)
frozen = nn.Linear(D, H).requires_grad_(False)
vectors, sequences, pictures = torch.randn(N, D), torch.randn(N, T, D), torch.randn(N, C, 6, 6)
heads, words = torch.randn(N, 4, T, D), torch.randint(7, (N, T))
LINEAR, BILINEAR, SQUARE = linear(N, D, H), linear(N, D, D, H), linear(N, N, D)

TABLE: dict[str, tuple[Callable[[], nn.Module], Tensor, float, float]] = {
    "linear": (lambda: nn.Linear(D, H), vectors, LINEAR, 2 * LINEAR),
    "bilinear": (
        lambda: Returns(lambda x, layer: layer(x, x), nn.Bilinear(D, D, H)), vectors, BILINEAR, 3 * BILINEAR,
    ),
    "LSTM": (lambda: nn.LSTM(D, H, batch_first=True), sequences, LSTM, 2 * LSTM),
    "LSTM both ways": (
        lambda: nn.LSTM(D, H, batch_first=True, bidirectional=True), sequences, 2 * LSTM, 4 * LSTM
    ),
    "two LSTM": (
        lambda: nn.LSTM(D, H, 2, batch_first=True), sequences, TWO_LSTM, 2 * TWO_LSTM
    ),
    # Nobody asks for the gradient of the state that is zero at first.
    "GRU": (
        lambda: nn.GRU(D, H, batch_first=True), sequences,
        linear(P, 3 * H, D + H), 2 * linear(P, 3 * H, D + H) - linear(N, 3 * H, H),
    ),
    "RNN": (
        lambda: nn.RNN(D, H, batch_first=True), sequences,
        linear(P, H, D + H), 2 * linear(P, H, D + H) - linear(N, H, H),
    ),
    "LSTM cell": (lambda: Returns(lambda x, cell: cell(x), nn.LSTMCell(D, H)), vectors,
                  linear(N, 4 * H, D + H), 2 * linear(N, 4 * H, D) + linear(N, 4 * H, H)),
    # Fused attention computes the scores again in backward: five products.
    "attention, fused": (
        lambda: Returns(self_attention, nn.MultiheadAttention(D, 2, batch_first=True)), sequences,
        PROJECTIONS + 2 * PAIRS, 2 * PROJECTIONS + 5 * PAIRS,
    ),
    "attention with its weights": (
        lambda: Returns(with_weights, nn.MultiheadAttention(D, 2, batch_first=True)), sequences,
        PROJECTIONS + 2 * PAIRS, 2 * PROJECTIONS + 4 * PAIRS,
    ),
    "attention of grouped queries": (lambda: Returns(grouped_queries), heads, 8 * PAIRS, 20 * PAIRS),
    "attention across": (lambda: Returns(across), heads, 2 * ACROSS, 5 * ACROSS),
    "attention with a mask": (lambda: Returns(masked), heads, 8 * PAIRS, 20 * PAIRS),
    "attention, additive": (
        lambda: Returns(additive, nn.Linear(D, H), nn.Linear(H, 1)), sequences,
        linear(P, D, H) + linear(N, T, T, H) + PAIRS, 2 * (linear(P, D, H) + linear(N, T, T, H) + PAIRS),
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True), sequences,
        ENCODER, 2 * (PROJECTIONS + 2 * linear(P, D, H)) + 5 * PAIRS,
    ),
    "norms": (lambda: chain(nn.LayerNorm(D), nn.RMSNorm(D)), vectors, 0, 0),
    "norms of pictures": (lambda: chain(nn.BatchNorm2d(C), nn.GroupNorm(2, C), nn.InstanceNorm2d(C)), pictures, 0, 0),
    # What is computed again ends where nothing more is needed: before the last product.
    "checkpointing": (
        lambda: Returns(saved, chain(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))), vectors, 2 * LINEAR, 5 * LINEAR
    ),
    "a Function": (lambda: Returns(doubled), vectors, linear(N, D, D), 2 * linear(N, D, D)),
    "frozen": (lambda: frozen, vectors, LINEAR, LINEAR),
    "a teacher without gradients": (
        lambda: Returns(teacher, nn.Linear(D, H), nn.Linear(D, H)), vectors, 2 * LINEAR, 2 * LINEAR
    ),
    # The gradient once inside the step, and backward through both.
    "a penalty on gradients": (lambda: Returns(penalty, nn.Linear(D, H)), vectors, LINEAR, 5 * LINEAR),
    "a sparse matrix": (lambda: Returns(sparse), vectors, linear(4, D), linear(4, D)),
    "einsum": (lambda: Returns(lambda x: torch.einsum("nd,md->nm", x, x)), vectors, SQUARE, 2 * SQUARE),
    # The gradient of the matrix is an outer product, element by element.
    "a vector": (lambda: Returns(lambda x: x @ x[0]), vectors, linear(N, D), linear(N, D)),
    "MobileNetV2": (lambda: inverted_residual(C, 24), pictures, MOBILE, 2 * MOBILE),
    "ConvNeXt": (lambda: convnext(C), pictures, NEXT, 2 * NEXT),
    "ResNeXt": (lambda: resnext(8, 16, 4), torch.randn(N, 8, 6, 6), XT, 2 * XT),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_layers(name: str) -> None:
    make, batch, forward, backward = TABLE[name]
    assert counted(make(), batch) == (forward, backward)


HEAD = linear(P, D, 7)
BODY = linear(P, D, D)
WIDE = linear(P, D, H)


def gpt(length: int, words: int, width: int, layers: int) -> tuple[int, int]:
    """Forward without attention's products, and these."""
    return linear(N, length, width, 12 * width) * layers + linear(N, length, width, words), 2 * layers * linear(
        N, length, length, width
    )


LAYERS, PRODUCTS = gpt(6, 20, 16, 2)
TEXTS: dict[str, tuple[Callable[[], nn.Module], Tensor, float, float, int]] = {
    # A table of rows that are looked up costs nothing; the last number is that of active parameters.
    "embedding": (lambda: chain(nn.Embedding(7, D), nn.Linear(D, H)), words, WIDE, 2 * WIDE, D * H + H),
    "bag": (lambda: chain(nn.EmbeddingBag(7, D), nn.Linear(D, H)), words, LINEAR, 2 * LINEAR, D * H + H),
    "a tied head in code": (lambda: Tied(7), words, BODY + HEAD, 2 * (BODY + HEAD), D * D + 7 * D),
    "a tied head by @": (
        lambda: Returns(lambda x, table: table(x) @ table.weight.T, nn.Embedding(7, D)), words, HEAD, 2 * HEAD, 7 * D
    ),
    "GPT": (
        lambda: GPT(20, 6, 16, 2), torch.randint(20, (N, 6)), LAYERS + PRODUCTS, 2 * LAYERS + 5 * PRODUCTS // 2,
        20 * 16 + 6 * 16 + 2 * (12 * 16 * 16 + 13 * 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_tables_of_rows_count_where_they_are_multiplied(name: str, precision: Any) -> None:
    make, batch, forward, backward, active = TEXTS[name]
    accounting = ComputeAccounting(law=None)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False, callbacks=[accounting],
        enable_progress_bar=False, enable_model_summary=False, precision=precision,
    )  # fmt: skip
    trainer.fit(Summed(make(), gradient=False), DataLoader(One(torch.cat([batch, batch])), N))
    assert (accounting.ledger.flops["forward"], accounting.ledger.flops["backward"]) == (2 * forward, 2 * backward)
    assert accounting.ledger.average_params == active
