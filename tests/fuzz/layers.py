"""What a random network is made of: encoders of a sample, and blocks from (batch, 8) to (batch, 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

WIDTH, INPUTS, TOKENS, VOCABULARY, CLASSES = 8, 6, 5, 10, 4


class Of(nn.Module):
    """A module of one function of the layer inside and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], inside: Any = None) -> None:
        super().__init__()
        self.function = function
        self.inside = inside

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.inside, inputs)


def _mean(embedding: nn.Module) -> nn.Module:
    return Of(lambda e, tokens: e(tokens).mean(1), embedding)


def _packed(bag: nn.Module) -> nn.Module:
    """Bags given as one long vector with the places where they begin."""
    return Of(lambda e, tokens: e(tokens.flatten(), torch.arange(len(tokens)) * tokens.shape[1]), bag)


ON_INPUTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(INPUTS, WIDTH),
    "bilinear": lambda: Of(lambda b, x: b(x, x), nn.Bilinear(INPUTS, INPUTS, WIDTH)),
    "conv1d": lambda: Of(lambda c, x: F.adaptive_avg_pool1d(c(x[:, None]), 4).flatten(1), nn.Conv1d(1, 2, 3)),
    "conv2d": lambda: Of(lambda c, x: c(x.view(-1, 1, 2, 3)).amax((2, 3)), nn.Conv2d(1, WIDTH, 2)),
    "conv3d": lambda: Of(lambda c, x: c(x.view(-1, 1, 1, 2, 3)).mean((2, 3, 4)), nn.Conv3d(1, WIDTH, (1, 2, 2))),
    "grouped_conv": lambda: Of(lambda c, x: c(x.view(-1, 2, 3)).mean(2), nn.Conv1d(2, WIDTH, 2, groups=2)),
    "conv_transpose": lambda: Of(lambda c, x: c(x.view(-1, 2, 3))[:, :, 1], nn.ConvTranspose1d(2, WIDTH, 2)),
    "circular_conv": lambda: Of(
        lambda c, x: c(x.view(-1, 2, 3)).mean(2), nn.Conv1d(2, WIDTH, 3, padding=1, padding_mode="circular")
    ),
    "max_pool": lambda: Of(
        lambda c, x: F.max_pool2d(c(x.view(-1, 1, 2, 3)), 2, 1).mean((2, 3)), nn.Conv2d(1, WIDTH, 2, padding=1)
    ),
    "rnn": lambda: Of(lambda r, x: r(x.view(-1, 3, 2))[0][:, -1], nn.RNN(2, WIDTH, batch_first=True)),
    "gru": lambda: Of(lambda r, x: r(x.view(-1, 3, 2))[0][:, -1], nn.GRU(2, WIDTH, batch_first=True)),
    "lstm": lambda: Of(
        lambda r, x: r(x.view(-1, 3, 2))[0].mean(1), nn.LSTM(2, WIDTH // 2, bidirectional=True, batch_first=True)
    ),
    "lstm_with_dropout": lambda: Of(
        lambda r, x: r(x.view(-1, 3, 2))[1][0][-1], nn.LSTM(2, WIDTH, 2, dropout=0.3, batch_first=True)
    ),
    "unfold": lambda: Of(lambda w, x: w(x.unfold(1, 2, 2).flatten(1)), nn.Linear(INPUTS, WIDTH)),
}
"""From the numbers of a sample."""

ON_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: _mean(nn.Embedding(VOCABULARY, WIDTH)),
    "padding_idx": lambda: _mean(nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)),
    "max_norm": lambda: _mean(nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0)),
    "scale_grad_by_freq": lambda: _mean(nn.Embedding(VOCABULARY, WIDTH, scale_grad_by_freq=True)),
    "sparse_embedding": lambda: _mean(nn.Embedding(VOCABULARY, WIDTH, sparse=True)),
    "bag": lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean"),
    "bag_of_sums": lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum", padding_idx=1),
    "bag_of_maxima": lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="max"),
    "packed_bag": lambda: _packed(nn.EmbeddingBag(VOCABULARY, WIDTH)),
    "sparse_bag": lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum", sparse=True),
    "one_hot": lambda: Of(
        lambda w, tokens: w(F.one_hot(tokens, VOCABULARY).to(w.weight.dtype).mean(1)), nn.Linear(VOCABULARY, WIDTH)
    ),
    "frozen_embedding": lambda: _mean(nn.Embedding.from_pretrained(torch.randn(VOCABULARY, WIDTH), freeze=True)),
    "bincount": lambda: Of(
        lambda w, tokens: w(
            torch.stack([torch.bincount(row, minlength=VOCABULARY) for row in tokens]).to(w.weight.dtype)
        ),
        nn.Linear(VOCABULARY, WIDTH),
    ),
}
"""From the tokens of a sample."""


class _Square(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.tanh() * inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return gradient * (inputs.tanh() + inputs * (1 - inputs.tanh() ** 2))


class _Straight(torch.autograd.Function):
    """Rounds, and lets the gradient through; vmap makes its own rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return (4 * inputs).round() / 4 + inputs * 0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def _linear(**options: Any) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, **options)


def _frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def _half_frozen(layer: nn.Linear) -> nn.Linear:
    layer.bias.requires_grad_(False)
    return layer


def _symmetric() -> nn.Module:
    layer = _linear()
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return layer


class Tied(nn.Module):
    """Two layers of one weight, one of them turned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _linear(), _linear(bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.second(self.first(inputs).tanh()), self.first.weight.T)


class TwoNames(nn.Module):
    """A layer that is registered twice, and once more in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _linear()
        self.again = self.first
        self.listed = [self.first]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(self.listed[0](inputs).tanh())


class SecondReference(nn.Module):
    """Its weight is used past the module that it is registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = _linear()
        self.kept = {"weight": self.layer.weight}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + inputs @ self.kept["weight"]


class Parameters(nn.Module):
    """Parameters in a list, in a dict, and one of a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(WIDTH) / 4 for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(WIDTH) / 4, "b": nn.Parameter(torch.tensor(0.5))})

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.listed[0] + self.listed[1] * self.named["b"] + self.named["a"]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = _linear(), _linear()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64) / 2)

    def forward(self, inputs: Tensor) -> Tensor:
        kind = torch.complex128 if inputs.dtype == torch.float64 else torch.complex64
        return torch.fft.irfft(torch.fft.rfft(inputs.to(kind).real) * self.turn.to(kind), n=WIDTH)


class Moving(nn.Module):
    """An exponential mean of the hidden values, written as ``how`` says, taken off them."""

    average: Tensor

    def __init__(self, how: str, persistent: bool = True) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("average", torch.zeros(WIDTH), persistent=persistent)

    def forward(self, inputs: Tensor) -> Tensor:
        now = inputs.detach().mean(0).to(self.average.dtype)
        if self.how == "in place":
            self.average.mul_(0.9).add_(0.1 * now)
        elif self.how == "assigned":
            self.average = 0.9 * self.average + 0.1 * now
        elif self.how == "copied":
            self.average.copy_(0.9 * self.average + 0.1 * now)
        elif self.how == "sliced":
            self.average[: WIDTH // 2] += 0.1 * now[: WIDTH // 2]
        elif self.how == "data":
            self.average.data = 0.9 * self.average.data + 0.1 * now
        else:
            self.average.lerp_(now, 0.1)
        return inputs - 0.5 * self.average.to(inputs.dtype)


class Counter(nn.Module):
    """Counts its calls in a buffer of integers and calms down with them."""

    calls: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls += 1
        elif self.how == "assigned":
            self.calls = self.calls + 1
        else:
            self.calls.fill_(int(self.calls) + 1)
        return inputs / (1.0 + 0.1 * self.calls)


class Queue(nn.Module):
    """The last hidden values in a ring, as contrastive methods keep them."""

    queue: Tensor
    pointer: Tensor

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(size, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        at, size = int(self.pointer), len(self.queue)
        places = (at + torch.arange(len(inputs))) % size
        similar = inputs @ self.queue.clone().to(inputs.dtype).T
        self.queue[places] = inputs.detach().to(self.queue.dtype)
        self.pointer[0] = (at + len(inputs)) % size
        return inputs + similar.mean(1, keepdim=True) * 0.1


class FirstBatch(nn.Module):
    """Learns its scale from the first batch that it sees and then says so in a flag."""

    ready: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.ready:
            self.scale = inputs.detach().abs().mean(0).to(self.scale.dtype) + 0.1
            self.ready.fill_(True)
        return inputs / self.scale.to(inputs.dtype)


class Teacher(nn.Module):
    """A frozen copy that follows its layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.student = _linear()
        self.teacher = _linear().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                if self.how == "in place":
                    own.mul_(0.9).add_(other, alpha=0.1)
                else:
                    own.data = 0.9 * own.data + 0.1 * other.data
        return self.student(inputs) - 0.3 * self.teacher(inputs.detach())


class Codebook(nn.Module):
    """Vector quantization whose codes are moving means in buffers."""

    codes: Tensor
    counts: Tensor

    def __init__(self, codes: int = 4) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, WIDTH))
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, inputs: Tensor) -> Tensor:
        codes = self.codes.to(inputs.dtype)
        nearest = torch.cdist(inputs.detach(), codes).argmin(1)
        chosen = F.one_hot(nearest, len(codes)).to(inputs.dtype)
        self.counts.mul_(0.9).add_(0.1 * chosen.sum(0).to(self.counts.dtype))
        sums = (chosen.T @ inputs.detach()).to(self.codes.dtype)
        self.codes.add_(0.1 * (sums - chosen.sum(0)[:, None].to(self.codes.dtype) * self.codes))
        return inputs + (codes[nearest] - inputs).detach() * 0.5


class Mixed(nn.Module):
    """Every sample goes to one of two experts, whichever the router prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList([_linear(), _linear()])

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.router(inputs).softmax(1)
        chosen = weights.argmax(1)
        outputs = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            outputs[mine] = (expert(inputs[mine]) * weights[mine, number, None]).to(outputs.dtype)
        return outputs


def _if_positive(layer: Any, inputs: Tensor) -> Tensor:
    return layer(inputs) if inputs.sum() > 0 else inputs - layer(inputs)


def _as_often_as_needed(layer: Any, inputs: Tensor) -> Tensor:
    for _ in range(int(inputs.detach().abs().sum()) % 3):
        inputs = layer(inputs).tanh()
    return inputs


def _through_numpy(layer: Any, inputs: Tensor) -> Tensor:
    return layer(inputs) + torch.from_numpy(inputs.detach().float().numpy()).to(inputs.dtype) * 0.1


def _scattered(layer: Any, inputs: Tensor) -> Tensor:
    places = torch.arange(WIDTH).flip(0).expand_as(inputs)
    return layer(torch.zeros_like(inputs).scatter_add_(1, places, inputs))


def _index_added(layer: Any, inputs: Tensor) -> Tensor:
    hidden = layer(inputs)
    return hidden.index_add(1, torch.tensor([0, 0, 3]), inputs[:, :3].to(hidden.dtype))


def _index_added_rows(layer: Any, inputs: Tensor) -> Tensor:
    hidden = layer(inputs)
    return torch.zeros_like(hidden).index_add_(0, torch.arange(len(inputs)) // 2, hidden) + hidden


def _put(layer: Any, inputs: Tensor) -> Tensor:
    hidden = layer(inputs) * 1
    hidden[:, [1, 4]] = inputs[:, [0, 2]].to(hidden.dtype)
    return hidden


def _added_in_place(layer: Any, inputs: Tensor) -> Tensor:
    hidden = torch.zeros(WIDTH, dtype=inputs.dtype)
    hidden = hidden.expand_as(inputs).clone()
    hidden += layer(inputs)
    hidden[:, : WIDTH // 2].mul_(0.5)
    return hidden.relu_()


def _written_into_new(layer: Any, inputs: Tensor) -> Tensor:
    """A tensor that does not depend on the batch is written to in place."""
    outputs = torch.zeros(len(inputs), WIDTH, dtype=inputs.dtype)
    outputs[:, :] = layer(inputs).to(outputs.dtype)
    return outputs


def _attention(layer: Any, inputs: Tensor) -> Tensor:
    parts = inputs.view(-1, 2, WIDTH // 2)
    return (parts + layer(parts, parts, parts, need_weights=False)[0]).flatten(1)


def _sdpa(layer: Any, inputs: Tensor) -> Tensor:
    parts = layer(inputs).view(-1, 2, 2, WIDTH // 4)
    return F.scaled_dot_product_attention(parts, parts, parts, is_causal=True).flatten(1)


def _kept(layer: Any, inputs: Tensor) -> Tensor:
    """Only rows that pass a test, as many as there are."""
    kept = inputs[inputs[:, 0] > 0]
    return layer(inputs) + (kept.mean() if len(kept) else inputs.new_zeros(()))


def _transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH // 2, 2, 6, dropout=0.1, batch_first=True)


def _with_hook(layer: nn.Module, kind: str) -> nn.Module:
    def halve(_module: nn.Module, gradients: Any, _outputs: Any) -> tuple[Tensor]:
        return (gradients[0] * 0.5,)

    if kind == "forward":
        layer.register_forward_hook(lambda _module, _given, output: output * 0.5)
    elif kind == "before":
        layer.register_forward_pre_hook(lambda _module, given: (given[0] + 0.1,))
    else:
        layer.register_full_backward_hook(halve)
    return layer


def _with_parameter_hook(layer: nn.Linear) -> nn.Linear:
    layer.weight.register_hook(lambda gradient: gradient * 0.5)
    return layer


def _with_hidden_hook(layer: Any, inputs: Tensor) -> Tensor:
    hidden = layer(inputs)
    hidden.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return hidden


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "relu_in_place": lambda: nn.Sequential(_linear(), nn.ReLU(inplace=True)),
    "leaky": lambda: nn.Sequential(_linear(), nn.LeakyReLU(0.1, inplace=True), nn.PReLU()),
    "gelu": lambda: nn.Sequential(_linear(), nn.GELU(), nn.SiLU(), nn.Softplus()),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch_norm_plain": lambda: nn.BatchNorm1d(WIDTH, affine=False, track_running_stats=False),
    "batch_norm_cumulative": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "batch_norm_frozen": lambda: _frozen(nn.BatchNorm1d(WIDTH)),
    "instance_norm": lambda: Of(lambda n, x: n(x.view(-1, 2, 4)).flatten(1), nn.InstanceNorm1d(2, affine=True)),
    "instance_norm_tracked": lambda: Of(
        lambda n, x: n(x.view(-1, 2, 4)).flatten(1), nn.InstanceNorm1d(2, track_running_stats=True)
    ),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "alpha_dropout": lambda: nn.AlphaDropout(0.2),
    "dropout1d": lambda: Of(lambda d, x: d(x.view(-1, 2, 4)).flatten(1), nn.Dropout1d(0.3)),
    "rrelu": lambda: nn.RReLU(),
    "noise": lambda: Of(lambda _, x: x + 0.1 * torch.randn_like(x)),
    "uniform_noise": lambda: Of(lambda _, x: x * torch.rand(x.shape, dtype=x.dtype)),
    "bernoulli": lambda: Of(lambda _, x: x * torch.bernoulli(torch.full_like(x, 0.7))),
    "permutation": lambda: Of(lambda _, x: x + 0.1 * x[torch.randperm(len(x))]),
    "gumbel": lambda: Of(lambda w, x: w(F.gumbel_softmax(x, dim=1)), _linear()),
    "attention": lambda: Of(_attention, nn.MultiheadAttention(WIDTH // 2, 2, dropout=0.1, batch_first=True)),
    "sdpa": lambda: Of(_sdpa, _linear()),
    "transformer": lambda: Of(lambda t, x: t(x.view(-1, 2, WIDTH // 2)).flatten(1), _transformer()),
    "gru_block": lambda: Of(lambda r, x: r(x.view(-1, 4, 2))[0][:, -1], nn.GRU(2, WIDTH, batch_first=True)),
    "lstm_cell": lambda: Of(lambda c, x: c(x)[0], nn.LSTMCell(WIDTH, WIDTH)),
    "spectral_norm": lambda: parametrizations.spectral_norm(_linear()),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(_linear()),
    "weight_norm": lambda: parametrizations.weight_norm(_linear()),
    "old_weight_norm": lambda: nn.utils.weight_norm(_linear()),
    "orthogonal": lambda: parametrizations.orthogonal(_linear(), orthogonal_map="cayley"),
    "symmetric": _symmetric,
    "scatter_add": lambda: Of(_scattered, _linear()),
    "index_add": lambda: Of(_index_added, _linear()),
    "index_add_rows": lambda: Of(_index_added_rows, _linear()),
    "index_put": lambda: Of(_put, _linear()),
    "added_in_place": lambda: Of(_added_in_place, _linear()),
    "written_into_new": lambda: Of(_written_into_new, _linear()),
    "cumsum": lambda: Of(lambda w, x: w(x).cumsum(1) / WIDTH, _linear()),
    "sort": lambda: Of(lambda w, x: w(x.sort(1).values), _linear()),
    "topk": lambda: Of(lambda w, x: w(F.pad(x.topk(4, 1).values, (0, 4))), _linear()),
    "masked": lambda: Of(lambda w, x: w(x.masked_fill(x < 0, 0.0)).clamp(-2, 2), _linear()),
    "where": lambda: Of(lambda w, x: torch.where(x > 0, w(x), x), _linear()),
    "einsum": lambda: Of(lambda w, x: torch.einsum("bi,oi->bo", x, w.weight.to(x.dtype)), _linear()),
    "variance": lambda: Of(lambda w, x: w(x) / (x.var(0, unbiased=False) + 1.0), _linear()),
    "distance": lambda: Of(lambda w, x: w(F.pad(torch.cdist(x, x), (0, WIDTH))[:, :WIDTH]), _linear()),
    "checkpointed": lambda: Of(lambda w, x: checkpoint(w, x, use_reentrant=False), nn.Sequential(_linear(), nn.Tanh())),
    "checkpointed_reentrant": lambda: Of(
        lambda w, x: checkpoint(w, x, use_reentrant=True), nn.Sequential(_linear(), nn.Tanh())
    ),
    "own_function": lambda: Of(lambda w, x: _Square.apply(w(x)), _linear()),
    "own_function_for_vmap": lambda: Of(lambda w, x: _Straight.apply(w(x)), _linear()),
    "detached": lambda: Of(lambda w, x: w(x) + x.detach(), _linear()),
    "fft": Complex,
    "tied": Tied,
    "two_names": TwoNames,
    "second_reference": SecondReference,
    "parameters": Parameters,
    "unused": Unused,
    "frozen": lambda: _frozen(_linear()),
    "half_frozen": lambda: _half_frozen(_linear()),
    "teacher": lambda: Teacher("in place"),
    "teacher_data": lambda: Teacher("data"),
    "mixed": Mixed,
    "if_positive": lambda: Of(_if_positive, _linear()),
    "as_often_as_needed": lambda: Of(_as_often_as_needed, _linear()),
    "through_numpy": lambda: Of(_through_numpy, _linear()),
    "kept_rows": lambda: Of(_kept, _linear()),
    "mean_in_place": lambda: Moving("in place"),
    "mean_assigned": lambda: Moving("assigned"),
    "mean_copied": lambda: Moving("copied"),
    "mean_sliced": lambda: Moving("sliced"),
    "mean_lerp": lambda: Moving("lerp"),
    "mean_data": lambda: Moving("data"),
    "mean_not_saved": lambda: Moving("in place", persistent=False),
    "counter": lambda: Counter("in place"),
    "counter_assigned": lambda: Counter("assigned"),
    "counter_read": lambda: Counter("read"),
    "queue": Queue,
    "first_batch": FirstBatch,
    "codebook": Codebook,
    "forward_hook": lambda: _with_hook(_linear(), "forward"),
    "forward_pre_hook": lambda: _with_hook(_linear(), "before"),
    "backward_hook": lambda: _with_hook(_linear(), "backward"),
    "parameter_hook": lambda: _with_parameter_hook(_linear()),
    "hidden_hook": lambda: Of(_with_hidden_hook, _linear()),
}
