"""What becomes of buffers that are no quantity: pointers, flags, queues, unit vectors."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import Partition
from lightning_fedscale.aggregators import krum
from lightning_fedscale.core.executors import shared_tensors_of
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.privacy import dp_fed_avg, secure_mean
from lightning_fedscale.server.asynchrony import FedBuff
from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential

SIZES = (8, 40, 24, 16)
LARGEST = 1
EXECUTORS = pytest.mark.parametrize("executor", ["sequential", "vectorized"])


class Counting(pl.LightningModule):
    """A layer, and buffers that tell how many samples, and which, a client has seen since the module was built."""

    layer: nn.Module
    whole: Tensor
    real: Tensor
    flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("whole", torch.zeros((), dtype=torch.int64))
        self.register_buffer("real", torch.zeros(2))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("constant", torch.linspace(0, 1, 5))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.whole += len(batch[0])
        self.real += float(len(batch[0]))
        self.flag |= batch[2].max() >= 0
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def parts(sizes: tuple[int, ...] = SIZES) -> Partition:
    starts = [sum(sizes[:client]) for client in range(len(sizes) + 1)]
    return Partition.from_lists([list(range(start, end)) for start, end in pairwise(starts)])


def fit(
    module: pl.LightningModule,
    rounds: int = 3,
    sizes: tuple[int, ...] = SIZES,
    ckpt_path: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> pl.Trainer:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), 4, generator=generator)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    data = TensorDataset(inputs, inputs.argmax(1).clamp(max=2), owner)
    made = reference.quiet_trainer(
        strategy=sequential(**{"partitioner": parts(sizes), **options}), max_epochs=rounds, **(trainer or {})
    )
    made.fit(module, DataLoader(data, batch_size=8, shuffle=True), ckpt_path=ckpt_path)
    return made


def warned(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "buffers" in str(each.message)]


MEAN = sum(size * size for size in SIZES) / sum(SIZES)


@EXECUTORS
@pytest.mark.parametrize(
    ("policy", "after_a_round"), [("mean", MEAN), ("server", 0), ("largest", SIZES[LARGEST]), ("client", 0)]
)
def test_each_policy_by_name(policy: str, after_a_round: float, executor: str) -> None:
    module = Counting()
    trainer = fit(module, 3, executor=executor, buffers={"whole": policy, "re*": policy, "flag": policy})
    expected = 3 * after_a_round
    assert module.real.tolist() == pytest.approx([expected, expected])
    rounded = round(round(round(MEAN) + MEAN) + MEAN) if policy == "mean" else expected
    assert module.whole.item() == rounded
    assert module.whole.dtype == torch.int64
    assert module.flag.item() == (policy in ("mean", "largest"))
    record = trainer.strategy.last_round  # type: ignore[attr-defined]
    layer, constant, three = 4 * 15, 4 * 5, 8 + 8 + 1
    assert record.upload_bytes == 4 * (layer + constant + (three if policy in ("mean", "largest") else 0))
    assert record.download_bytes == 4 * (layer + constant + (0 if policy == "client" else three))
    if policy == "client":
        for client, size in enumerate(SIZES):
            own = trainer.strategy.personal_model(client)  # type: ignore[attr-defined]
            assert own["whole"].item() == 3 * size
            assert own["real"].tolist() == [3.0 * size] * 2


@EXECUTORS
def test_by_default_floats_are_averaged_and_integers_and_flags_are_of_the_largest_client(executor: str) -> None:
    module = Counting()
    [message] = warned(lambda: fit(module, 3, executor=executor))
    assert module.whole.item() == 3 * SIZES[LARGEST]
    assert module.flag.item() is True
    assert module.real.tolist() == pytest.approx([3 * MEAN] * 2)
    assert message.startswith("buffers: 'real' changed")
    assert "constant" not in message
    assert all(f"'{policy}'" in message for policy in ("mean", "largest", "server", "client"))
    assert warned(lambda: fit(Counting(), 1, executor=executor, buffers={"real": "mean"})) == []


def test_the_first_pattern_that_matches_decides() -> None:
    module = Counting()
    fit(module, 2, buffers={"whole": "server", "*": "largest"})
    assert (module.whole.item(), module.real[0].item()) == (0, 2 * SIZES[LARGEST])


class Owner(Counting):
    """Notes whose samples it sees, and spoils the training of some clients."""

    spoilt: tuple[int, ...] = ()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss, owner = super().training_step(batch, batch_idx), int(batch[2][0])
        self.whole.fill_(owner)
        return loss * math.nan if owner in self.spoilt else loss


def test_the_largest_client_is_the_first_of_equal_ones_and_none_that_is_left_out() -> None:
    module = Owner()
    fit(module, 1, sizes=(8, 16, 16, 8))
    assert module.whole.item() == 1
    module = Owner()
    module.spoilt = (1, 2)
    fit(module, 1, sizes=(8, 16, 16, 8, 9))
    assert module.whole.item() == 4


class Words(Counting):
    """A set of bits in words of 64, which float64 does not hold."""

    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.tensor([2**62 + 1, -(2**61) - 7]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.bits[1] == -(2**61) - 7
        if batch_idx == 0:
            assert self.bits[0] % 2 == 1, "another client's"
        self.bits[0] |= 2**58 + (2 << int(batch[2][0]))
        self.bits[0] &= ~1
        return super().training_step(batch, batch_idx)


def test_integers_that_float64_does_not_hold_keep_their_bits() -> None:
    module = Words()
    fit(module, 1)
    assert module.bits.tolist() == [2**62 + 2**58 + (2 << LARGEST), -(2**61) - 7]
    module = Words()
    fit(module, 2, buffers={"bits": "server"})
    assert module.bits.tolist() == [2**62 + 1, -(2**61) - 7]


class Queue(pl.LightningModule):
    """Momentum contrast: keys of earlier batches in a queue, and a pointer to where the next go."""

    queue: Tensor
    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.teacher = nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(6, 48), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.started: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        keys = nn.functional.normalize(self.teacher(batch[0]), dim=1)
        queries = nn.functional.normalize(self.encoder(batch[0]), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()], 1)
        place = int(self.pointer)
        if batch_idx == 0:
            self.started.append(place)
        self.queue[:, place : place + len(keys)] = keys.T
        self.pointer[0] = (place + len(keys)) % self.queue.shape[1]
        return nn.functional.cross_entropy(logits, torch.zeros(len(keys), dtype=torch.long))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), lr=0.1)


def test_a_queue_and_its_pointer_train_on() -> None:
    module = Queue()
    [message] = warned(lambda: fit(module, 12))
    assert "'queue'" in message
    assert "pointer'" not in message
    assert module.started == [SIZES[LARGEST] * round % 48 for round in range(12) for _ in SIZES]
    assert module.pointer.tolist() == [SIZES[LARGEST] * 12 % 48]


def test_a_queue_of_the_largest_client_is_one_that_training_made() -> None:
    module = Queue()
    assert warned(lambda: fit(module, 12, buffers={"queue": "largest"})) == []
    assert torch.allclose(module.queue.norm(dim=0), torch.ones(48))


# ---- unit vectors


class Discriminator(pl.LightningModule):
    """Layers with spectral norm, whose weights move a lot in a round."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            norm(nn.Conv1d(1, 8, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 3)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0][:, None]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def singular_values(self) -> list[float]:
        self.net.eval()(torch.zeros(1, 1, 4))
        weights = [cast(Tensor, layer.weight) for layer in (self.net[0], self.net[3])]
        return [float(torch.linalg.svdvals(weight.detach().flatten(1))[0]) for weight in weights]


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_weights_with_spectral_norm_keep_it(norm: Callable[[nn.Module], nn.Module]) -> None:
    module = Discriminator(norm)
    assert warned(lambda: fit(module, 4, local_epochs=5)) == []
    assert module.singular_values() == pytest.approx([1.0, 1.0], abs=0.02)
    vectors = [value for name, value in module.state_dict().items() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 4
    assert all(float(vector.norm()) == pytest.approx(1.0) for vector in vectors)


class Longest(nn.Module):
    """A parametrization of one's own: the weight's length of late, and how often it was computed."""

    length: Tensor
    computed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("length", torch.ones(()))
        self.register_buffer("computed", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.length.lerp_(weight.norm(), 0.5)
                self.computed += 1
        return weight / self.length


def longest_of(module: Counting) -> tuple[Longest, Tensor]:
    """The parametrization of the layer's weight, and the weight that it is given."""
    weight = module.get_submodule("layer.parametrizations.weight")
    assert isinstance(weight, parametrize.ParametrizationList)
    longest = weight[0]
    assert isinstance(longest, Longest)
    return longest, weight.original


def test_buffers_of_any_parametrization_fit_the_new_weights() -> None:
    module = Counting()
    parametrize.register_parametrization(module.layer, "weight", Longest())
    longest_of(module)[0].computed.zero_()
    fit(module, 2)
    longest, original = longest_of(module)
    assert float(longest.length) == pytest.approx(float(original.norm()))
    assert int(longest.computed) == 2 * SIZES[LARGEST] / 8


# ---- what nobody needs to be told of


class Renorm(nn.Module):
    """Running statistics of a layer that torch does not have."""

    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_std", torch.ones(4))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_std.lerp_(inputs.std(0), 0.5)
            self.num_batches_tracked += 1
        return inputs / self.running_std


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), Renorm()])
def test_running_statistics_are_averaged(layer: nn.Module) -> None:
    module = Counting()
    module.layer = nn.Sequential(layer, nn.Linear(4, 3))
    kinds = shared_tensors_of(module).kinds
    assert {kinds[name] for name, _ in module.named_buffers() if name.startswith("layer.")} == {("mean", True)}
    assert warned(lambda: fit(module, 2, buffers={"re*": "mean"})) == []
    batches = sum(size * math.ceil(size / 8) for size in SIZES) / sum(SIZES)
    assert module.get_buffer("layer.0.num_batches_tracked").item() == round(round(batches) + batches)


class Shared(Counting):
    """One buffer in two places, one that is none yet, an empty one and one that no checkpoint has."""

    complex: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Module()
        self.other.register_buffer("alias", self.whole)
        self.register_buffer("later", None)
        self.register_buffer("empty", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("hidden", torch.zeros((), dtype=torch.uint8), persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.complex += 1j * len(batch[0])
        self.hidden += 1
        return super().training_step(batch, batch_idx)


def test_buffers_of_odd_kinds() -> None:
    module = Shared()
    [message] = warned(lambda: fit(module, 2, buffers={"other.alias": "server", "later": "server", "empty": "mean"}))
    assert message.startswith("buffers: 'real', 'complex' changed")
    assert module.whole.item() == 0
    assert module.other.alias is module.whole
    assert module.complex.imag.tolist() == pytest.approx([2 * MEAN] * 2)
    assert module.hidden.item() == 2 * SIZES[LARGEST] / 8


# ---- what does not stay as it was


class Growing(Counting):
    """Buffers that grow, come up, are filled, go, and change their shape in place."""

    memory: Tensor
    filled: Tensor | None
    goes: Tensor | None
    lowest: Tensor
    lazy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 4))
        self.register_buffer("filled", None)
        self.register_buffer("goes", torch.ones(2))
        self.register_buffer("lowest", torch.tensor([]))
        self.started: list[tuple[int, bool, bool, bool, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 0:
            there = hasattr(self, "lazy")
            self.started.append((len(self.memory), self.filled is None, self.goes is None, there, self.lowest.numel()))
        self.memory = torch.cat([self.memory, batch[0]])
        self.filled = batch[2][:1].clone()
        self.goes = None
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", batch[2][:2].clone())
        self.lowest.resize_(4).copy_(batch[0].min(0).values)
        return super().training_step(batch, batch_idx)


@EXECUTORS
def test_buffers_without_one_shape_are_those_of_the_largest_client(executor: str) -> None:
    module = Growing()
    told = warned(lambda: fit(module, 3, executor=executor, buffers={"real": "mean"}))
    assert [message.partition(" appeared")[0] for message in told if " appeared" in message] == [
        "buffers: 'memory', 'filled', 'goes', 'lowest', 'lazy'"
    ]
    size = SIZES[LARGEST]
    assert module.started == [
        (round * size, round == 0, round > 0, round > 0, 4 if round else 0) for round in range(3) for _ in SIZES
    ]
    assert len(module.memory) == 3 * size
    assert module.goes is None
    assert module.filled is not None
    assert module.filled.tolist() == [LARGEST]
    assert module.lazy.tolist() == [LARGEST, LARGEST]
    assert module.lowest.shape == (4,)


@EXECUTORS
def test_each_client_keeps_buffers_without_one_shape_if_asked(executor: str) -> None:
    module = Growing()
    asked = dict.fromkeys(["memory", "filled"], "client") | dict.fromkeys(["goes", "lowest"], "server")
    trainer = fit(module, 3, executor=executor, buffers={**asked, "real": "mean"})
    assert [start[0] for start in module.started] == [round * size for round in range(3) for size in SIZES]
    assert (len(module.memory), module.filled, module.lowest.numel()) == (0, None, 0)
    assert module.goes is not None
    assert module.goes.tolist() == [1.0, 1.0]
    for client, size in enumerate(SIZES):
        own = trainer.strategy.personal_model(client)  # type: ignore[attr-defined]
        assert (len(own["memory"]), own["filled"].tolist()) == (3 * size, [client])


def test_a_checkpoint_inside_a_client_has_buffers_of_the_global_models_shape() -> None:
    states: list[dict[str, Tensor]] = []

    class Peek(pl.Callback):
        def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: object) -> None:
            states.append(trainer.strategy.lightning_module_state_dict())

    fit(Growing(), 1, trainer={"callbacks": [Peek()]})
    plain = Growing().state_dict()
    assert all(state.keys() == plain.keys() for state in states)
    assert all(state[name].shape == value.shape for state in states for name, value in plain.items())


@pytest.mark.parametrize("options", [{"personal": Ditto(0.1)}, {"mode": FedBuff(seconds=[1.0, 2.0, 3.0, 4.0])}])
def test_models_of_single_clients_need_buffers_of_one_shape(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"buffers: 'memory', .*buffers=\{'memory': 'server'\}"):
        fit(Growing(), 3, clients_per_round=2, **options)


class Cached(Counting):
    """Makes a table anew when it is too short, and remembers its length beside it, as rotary embeddings do."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(1.0), persistent=False)
        self.length, self.made = 1, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        wanted = int(batch[2][0]) + 2
        if wanted > self.length:
            self.length, self.made = wanted, self.made + 1
            self.register_buffer("table", torch.arange(float(wanted)), persistent=False)
        assert torch.equal(self.table[:wanted], torch.arange(float(wanted)))
        return super().training_step(batch, batch_idx)


def test_a_cache_that_is_made_anew_stays() -> None:
    module = Cached()
    assert warned(lambda: fit(module, 3, buffers={"real": "mean"})) == []
    assert module.made == len(SIZES)
    assert len(module.table) == module.length == len(SIZES) + 1


def test_scripted_layers_train() -> None:
    module = Counting()
    module.layer = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    before = saved(module)
    fit(module, 1, buffers={"real": "mean"})
    assert not torch.equal(saved(module)["layer.0.running_mean"], before["layer.0.running_mean"])


# ---- with everything else


def saved(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@EXECUTORS
def test_resume_is_bit_identical(executor: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "buffers": {"whole": "client", "real": "client", "flag": "largest"},
        "clients_per_round": 2,
        "executor": executor,
    }
    whole = Counting()
    fit(whole, 5, **options)
    fit(Counting(), 2, **options).save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = Counting()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ckpt_path")
        trainer = fit(resumed, 5, ckpt_path=tmp_path / "half.ckpt", **options)
    assert reference_loop.same(saved(whole), saved(resumed))
    seen = [trainer.strategy.personal_model(client)["whole"].item() for client in range(4)]  # type: ignore[attr-defined]
    assert any(value > size for value, size in zip(seen, SIZES, strict=True))
    assert all(value % size == 0 for value, size in zip(seen, SIZES, strict=True))


def test_resume_with_other_policies_is_said(tmp_path: Path) -> None:
    fit(Counting(), 1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"ckpt_path: buffers=\{'whole': 'server'\} differs from None"):
        fit(Counting(), 2, ckpt_path=tmp_path / "a.ckpt", buffers={"whole": "server"})


@pytest.mark.parametrize("options", [{"personal": Ditto(0.1)}, {"mode": FedBuff(seconds=[1.0, 3.0, 1.5, 7.0])}])
def test_whole_models_are_not_resumed_with_other_parts(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"clients_per_round": 2}
    fit(Counting(), 4, **options).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"buffers, personal: .*\['whole'\].* \[\] in the checkpoint"):
        fit(Counting(), 5, ckpt_path=tmp_path / "a.ckpt", buffers={"whole": "client"}, **options)
    fit(Counting(), 5, ckpt_path=tmp_path / "a.ckpt", buffers={"whole": "mean"}, **options)


def test_a_checkpoint_inside_a_client_has_the_global_models_buffers() -> None:
    states: list[dict[str, Tensor]] = []

    class Peek(pl.Callback):
        def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: object) -> None:
            file = io.BytesIO()
            torch.save(trainer.strategy.lightning_module_state_dict(), file)
            file.seek(0)
            states.append(torch.load(file, weights_only=True))

    fit(Words(), 1, trainer={"callbacks": [Peek()]}, buffers={"real": "client"})
    assert [(state["bits"].tolist(), state["real"].tolist()) for state in states] == [
        ([2**62 + 1, -(2**61) - 7], [0.0, 0.0])
    ] * 4


def test_personal_models_of_ditto_have_buffers_of_their_own() -> None:
    module = Counting()
    trainer = fit(module, 3, personal=Ditto(0.1), buffers={"whole": "client"})
    assert module.whole.item() == 0
    for client, size in enumerate(SIZES):
        own = trainer.strategy.personal_model(client)  # type: ignore[attr-defined]
        assert own["whole"].item() == 3 * size
        assert own["real"].tolist() == [3.0 * size] * 2


def test_late_clients_count_on_from_where_they_started() -> None:
    module = Queue()
    fit(module, 12, clients_per_round=2, mode=FedBuff(seconds=[1.0, 3.0, 1.5, 7.0], concurrency=3))
    assert module.pointer.item() % 8 == 0
    assert all(0 <= place < 48 for place in module.started)


def test_robust_rules_take_integers_from_the_largest_client() -> None:
    module = Counting()
    fit(module, 2, sizes=(8, 40, 24, 16, 8), aggregator=krum(1))
    assert module.whole.item() == 2 * 40


def test_what_is_private_stays_with_the_clients() -> None:
    private: dict[str, Any] = {"privacy": dp_fed_avg(clip_norm=1.0, noise_multiplier=0.1, delta=1e-3)}
    module = Counting()
    trainer = fit(module, 2, **private)
    assert (module.whole.item(), module.flag.item(), module.real.tolist()) == (0, False, [0.0, 0.0])
    assert trainer.strategy.last_round.upload_bytes == 4 * 4 * 15  # type: ignore[attr-defined]
    discriminator = Discriminator(parametrizations.spectral_norm)
    fit(discriminator, 2, **private)
    assert discriminator.singular_values() == pytest.approx([1.0, 1.0], abs=0.02)

    module = Counting()
    fit(module, 2, aggregator=secure_mean(clip=64.0, bits=24))
    assert (module.whole.item(), module.flag.item()) == (0, False)
    assert module.real.tolist() == pytest.approx([2 * sum(SIZES) / 4] * 2, abs=1e-3)


@pytest.mark.parametrize("policy", ["mean", "largest"])
def test_what_is_private_is_not_asked_for(policy: str) -> None:
    with pytest.raises(ValueError, match=rf"buffers=\{{'whole': '{policy}'\}} with privacy: .* Use 'client'"):
        fit(Counting(), privacy=dp_fed_avg(clip_norm=1.0, noise_multiplier=0.1, delta=1e-3), buffers={"whole": policy})
    if policy == "largest":
        with pytest.raises(ValueError, match=r"with aggregator=secure_mean.* the server would see"):
            fit(Counting(), aggregator=secure_mean(clip=1.0), buffers={"whole": policy})


def test_a_pattern_that_matches_nothing_is_answered_with_the_names() -> None:
    module = Counting()
    with pytest.raises(ValueError, match=r"buffers=\{'hwole': 'mean'\} matches no buffer. Did you mean 'whole'\?"):
        fit(module, buffers={"hwole": "mean"})
    with pytest.raises(ValueError, match="The names are 'whole', 'real', 'flag', 'constant': correct"):
        fit(module, buffers={"layer.weight": "mean"})
    with pytest.raises(ValueError, match=r"and personal=\['whole', 'real'\] both match 'real'"):
        fit(module, personal=["whole", "real"], buffers={"re*": "mean"})
    fit(module, 1, personal=["whole", "real"], buffers={"re*": "client"})
    assert (module.whole.item(), module.real[0].item()) == (0, 0.0)
