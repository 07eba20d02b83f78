"""What the tests of this folder train, in any number of processes, and what they keep of it to compare."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedscale import RoundRecord
from lightning_fedscale.aggregators import centered_clipping, trimmed_mean
from lightning_fedscale.attacks import attacked, sign_flip
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase
from lightning_fedscale.compressors import error_feedback, power_sgd, qsgd, top_k
from lightning_fedscale.devices import DeviceClass, Population
from lightning_fedscale.local_rules import Ditto, fed_dyn, fed_nova, fed_prox, scaffold
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.phases import page_hinkley, relative_change
from lightning_fedscale.privacy import dp_fed_avg
from lightning_fedscale.samplers import uniform
from lightning_fedscale.scaling import Rosenfeld
from lightning_fedscale.server import fed_adam, fed_avg, from_torch
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.types import ClientUpdate, IntArray
from tests.laws import reference
from tests.strategies import sequential

CLIENTS = 9
BATCH = 8
POISON = 1e30
"""A first input as large as this makes the loss of its batch infinite."""


class Module(pl.LightningModule):
    """BatchNorm, Dropout, an optimizer with state, a schedule, torchmetrics and logging in several forms.

    Args:
        optimizer: "sgd" with momentum, "plain" without, "adam", or "manual": two optimizers in manual optimization.
        talk: call Lightning's collectives inside ``training_step``.
    """

    def __init__(self, optimizer: str = "sgd", talk: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 4)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.automatic_optimization = optimizer != "manual"
        self._optimizer = optimizer
        self._talk = talk
        self.batches: list[tuple[int, float, int, int]] = []
        self.heard: list[tuple[float, ...]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.head(self.body(inputs))
        loss = nn.functional.cross_entropy(logits, labels)
        if inputs[:, 0].max() >= POISON:
            loss = loss * float("inf")
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(labels))
        if self._talk:
            self._hear(float(loss.detach()), batch_idx)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
        correct = int((logits.argmax(1) == labels).sum())
        self.batches.append((self.trainer.global_step, float(loss.detach()), correct, len(labels)))
        return loss

    def _hear(self, value: float, batch_idx: int) -> None:
        strategy = self.trainer.strategy
        strategy.barrier("in a client")
        gathered = self.all_gather(torch.tensor(value))
        assert isinstance(gathered, Tensor)
        self.heard.append(
            (
                value,
                float(gathered.sum()),
                float(strategy.broadcast(value)),
                float(strategy.reduce(torch.tensor(value), reduce_op="sum")),
                float(strategy.reduce_boolean_decision(batch_idx % 2 == 0)) - float(batch_idx % 2 == 0),
            )
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("test_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self._optimizer == "manual":
            return [
                torch.optim.Adam(self.body.parameters(), lr=1e-2),
                torch.optim.Adagrad(self.head.parameters(), lr=3e-2),
            ]
        if self._optimizer == "plain":
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)
        if self._optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=2e-2)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)}


class Buffered(Module):
    """A queue with a pointer, a flag and words of bits that float64 does not hold, a layer with spectral norm, and
    buffers that grow, come up, and can be made again."""

    queue: Tensor
    pointer: Tensor
    bits: Tensor
    seen: Tensor
    own: Tensor
    memory: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__("plain")
        self.head = cast(nn.Linear, nn.utils.parametrizations.spectral_norm(self.head))
        self.register_buffer("queue", torch.zeros(10, 12))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("bits", torch.tensor([2**62 + 1]))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("own", torch.zeros(12))
        self.register_buffer("memory", torch.zeros(0, 12))
        self.register_buffer("cache", torch.arange(1.0), persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.queue[int(self.pointer)] = batch[0].mean(0)
        self.pointer[0] = (self.pointer[0] + 1) % len(self.queue)
        self.bits[0] ^= 1 << (len(batch[0]) + 4 * batch_idx)
        self.seen.fill_(True)
        self.own += batch[0].mean(0)
        self.memory = torch.cat([self.memory, batch[0][:1]])[-6:]
        if not hasattr(self, "bank"):
            self.register_buffer("bank", batch[0][0].clone())
        if len(self.cache) < len(batch[0]):
            self.register_buffer("cache", torch.arange(float(len(batch[0]))), persistent=False)
        assert torch.equal(self.cache, torch.arange(float(len(self.cache))))
        return super().training_step(batch, batch_idx)


class Taught(Module):
    """A frozen teacher to which only clients with many batches write, so that not every rank sees it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(16, 4).requires_grad_(False)
        self.backbone = nn.Linear(12, 12).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3:
            for mine, other in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                mine.data.lerp_(other.data, 0.3)
        aim = self.teacher(self.body(batch[0])).detach()
        loss = super().training_step([self.backbone(batch[0]), batch[1]], batch_idx)
        return loss + 0.1 * (self.head(self.body(batch[0])) - aim).square().mean()


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments at random where the sample is fetched, that is in a worker process."""

    def __init__(self, data: TensorDataset) -> None:
        self.inputs, self.targets = data.tensors

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(12) + 0.1 * float(np.random.randn())
        return self.inputs[index] + noise, self.targets[index]


class Named(Module):
    """Logs what only some clients have, in the order in which it comes: values, and metrics of every class."""

    def __init__(self) -> None:
        super().__init__()
        self.hits = nn.ModuleList(MulticlassAccuracy(4, average="micro") for _ in range(4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.body(batch[0])).detach()
        for label in dict.fromkeys(batch[1].tolist()):
            of_class = batch[1] == label
            value, size = logits[of_class, label].mean(), int(of_class.sum())
            self.log(f"mean_{label}", value, on_step=True, on_epoch=True, sync_dist=True, batch_size=size)
            self.log(f"last_{label}", value, on_step=True, on_epoch=False, sync_dist=True, prog_bar=True)
            for kind in ("sum", "min", "max"):
                self.log(f"{kind}_{label}", value, on_step=False, on_epoch=True, sync_dist=True, reduce_fx=kind)
            self.hits[label](logits[of_class], batch[1][of_class])
            self.log(f"hits_{label}", self.hits[label], on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def shrinking(*, seed: int, round: int, num_clients: int, clients_per_round: int) -> IntArray:
    """A sampler that finds fewer clients than there are ranks in rounds 1 and 2, in the latter none."""
    found = (clients_per_round, 1, 0, clients_per_round)[round % 4]
    return uniform(seed=seed, round=round, num_clients=num_clients, clients_per_round=found)


class Followed:
    """Rounds that follow a phase: many clients and few steps while it is critical."""

    phase: CriticalPhase

    def made(self) -> CriticalPhase:
        """A new one for every run."""
        self.phase = CriticalPhase(relative_change(0.6, window=2), action="observe", noise_every=None)
        return self.phase

    def steps(self, round: int) -> int:
        return 1 if self.phase.critical else 5

    def cohort(self, *, clients_per_round: int, **keys: Any) -> IntArray:
        return uniform(clients_per_round=6 if self.phase.critical else clients_per_round, **keys)


FOLLOWED = Followed()


class Scenario(NamedTuple):
    """A run, described so that every process can build it."""

    strategy: Callable[[], dict[str, Any]]
    trainer: Callable[[], dict[str, Any]] = dict
    module: Callable[[], Module] = Module
    callbacks: Callable[[], list[pl.Callback]] = list
    poisoned: tuple[int, ...] = ()
    workers: int = 0
    evaluate: bool = False
    fails: bool = False
    least_ranks: int = 1
    collectives: int = 1  # most in a round
    afterwards: int = 0  # once training is over


def _scaled() -> dict[str, Any]:
    # So large a scale that the first batches overflow, and one that grows again soon: clients differ in what they find.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_epochs": 5}


SCENARIOS: dict[str, Scenario] = {
    "reset": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2},
        lambda: {"max_epochs": 3, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        evaluate=True,
    ),
    "keep": Scenario(
        lambda: {
            "clients_per_round": 4,
            "local_steps": 3,
            "rounds_per_epoch": 2,
            "client_optimizer": "keep",
            "server_optimizer": from_torch(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
        },
        lambda: {"max_epochs": 3},
        lambda: Module("adam"),
    ),
    "keep_in_files": Scenario(
        lambda: {**SCENARIOS["keep"].strategy(), "client_state_memory": 0},
        lambda: {"max_epochs": 3},
        lambda: Module("adam"),
    ),
    "keep_epochs": Scenario(
        lambda: {"clients_per_round": 5, "client_optimizer": "keep"}, lambda: {"max_epochs": 3}, lambda: Module("adam")
    ),
    "double": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2, "server_optimizer": from_torch(torch.optim.Adam, lr=0.05)},
        lambda: {"max_epochs": 3, "gradient_clip_val": 0.5, "precision": "64-true"},
    ),
    "bf16": Scenario(
        lambda: {"clients_per_round": 4, "server_optimizer": from_torch(torch.optim.SGD, lr=1.0, momentum=0.5)},
        lambda: {"max_epochs": 3, "precision": "bf16-mixed", "gradient_clip_val": 0.5},
    ),
    "fp16": Scenario(lambda: {"clients_per_round": 4}, _scaled),
    "manual": Scenario(
        lambda: {"clients_per_round": 4, "client_optimizer": "keep"},
        lambda: {"max_epochs": 3},
        lambda: Module("manual"),
    ),
    "uniform": Scenario(
        lambda: {"clients_per_round": 0.5, "aggregator": "uniform", "server_optimizer": fed_avg(lr=0.5), "seed": 3},
        lambda: {"max_epochs": 3, "limit_train_batches": 0.5},
    ),
    "talk": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2}, lambda: {"max_epochs": 2}, lambda: Module(talk=True)
    ),
    "rejected": Scenario(
        lambda: {"clients_per_round": 6, "client_optimizer": "keep", "local_steps": 2},
        lambda: {"max_epochs": 4},
        lambda: Module("adam"),
        poisoned=(2, 5),
    ),
    "workers": Scenario(lambda: {"clients_per_round": 4}, lambda: {"max_epochs": 2}, workers=1),
    "population": Scenario(
        lambda: {"clients_per_round": 6, "population": small_and_large(), "client_optimizer": "keep"},
        lambda: {"max_epochs": 3},
        lambda: Module("adam"),
    ),
    "phase_rounds": Scenario(
        lambda: {"clients_per_round": 5, "server_optimizer": from_torch(torch.optim.SGD, lr=0.7, momentum=0.5)},
        lambda: {"max_epochs": 5},
        callbacks=lambda: [CriticalPhase(relative_change(0.1, window=3), scale=1.5, noise_every=1)],
        collectives=2,
    ),
    "phase_adaptive_server": Scenario(
        lambda: {"clients_per_round": 5, "server_optimizer": from_torch(torch.optim.Adam, lr=0.05)},
        lambda: {"max_epochs": 5, "precision": "64-true"},
        callbacks=lambda: [CriticalPhase(page_hinkley(hold=2), scale=1.5)],
    ),
    "phase_steps": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2},
        lambda: {"max_epochs": 5, "gradient_clip_val": 0.5},
        lambda: Module("adam"),
        callbacks=lambda: [CriticalPhase(relative_change(0.05, window=4), scale=1.5, level="step")],
        collectives=2,
    ),
    "phase_several_optimizers": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2},
        lambda: {"max_epochs": 5},
        lambda: Module("manual"),
        callbacks=lambda: [CriticalPhase(relative_change(0.05, window=4), scale=1.5, level="step")],
        collectives=3,
    ),
    "phase_followed": Scenario(
        lambda: {"clients_per_round": 4, "local_steps": FOLLOWED.steps, "sampler": FOLLOWED.cohort},
        lambda: {"max_epochs": 5},
        callbacks=lambda: [FOLLOWED.made()],
    ),
    "phase_noise": Scenario(
        lambda: {"clients_per_round": 5},
        lambda: {"max_epochs": 6, "precision": "64-true"},
        callbacks=lambda: [CriticalPhase(action="noise", target_batch=16, noise_in="all", noise_every=2)],
        collectives=3,
    ),
    "accounting": Scenario(
        lambda: {"clients_per_round": 5, "local_epochs": 2},
        lambda: {"max_epochs": 2},
        callbacks=lambda: [ComputeAccounting(law=Rosenfeld(E=0.2, A=5.0, B=20.0, alpha=0.4, beta=0.4), rho=0.5)],
        afterwards=1,
    ),
    "client_metrics": Scenario(
        lambda: {"clients_per_round": 5},
        lambda: {"max_epochs": 3},
        callbacks=lambda: [ClientMetrics(every_n_rounds=2)],
        evaluate=True,
        collectives=2,
        afterwards=3,  # when names are first met
    ),
    "personal_metrics": Scenario(
        lambda: {"clients_per_round": 4, "personal": Ditto(0.5)},
        lambda: {"max_epochs": 2},
        # The second evaluates fewer clients than there are ranks.
        callbacks=lambda: [
            ClientMetrics(personal=True),
            ClientMetrics(clients=1, dataloaders=DataLoader(held_out(), 4)),
        ],
        evaluate=True,
        collectives=3,
        afterwards=6,
    ),
    "scaffold": Scenario(
        lambda: {"clients_per_round": 5, "local_rule": scaffold(), "aggregator": "uniform"},
        lambda: {"max_epochs": 3},
        lambda: Module("plain"),
    ),
    "scaffold_by_gradients": Scenario(
        lambda: {"clients_per_round": 4, "local_rule": scaffold("I")}, lambda: {"max_epochs": 3}, lambda: Module("adam")
    ),
    "fed_dyn": Scenario(
        lambda: {"clients_per_round": 5, "local_rule": fed_dyn(0.1), "aggregator": "uniform"},
        lambda: {"max_epochs": 3, "gradient_clip_val": 1.0},
        lambda: Module("plain"),
    ),
    "fed_nova": Scenario(
        lambda: {"clients_per_round": 5, "local_rule": fed_nova(), "server_optimizer": fed_adam(0.05)},
        lambda: {"max_epochs": 3},
    ),
    "compressed": Scenario(
        lambda: {
            "clients_per_round": 5,
            "local_rule": fed_prox(0.1),
            "compressor": error_feedback(top_k(0.1)),
            "downlink_compressor": qsgd(16),
        },
        lambda: {"max_epochs": 3},
        lambda: Module("adam"),
    ),
    "low_rank": Scenario(
        lambda: {"clients_per_round": 5, "compressor": power_sgd(2), "server_optimizer": "fed_exp"},
        lambda: {"max_epochs": 3},
    ),
    "personal": Scenario(
        lambda: {"clients_per_round": 5, "personal": ["body.1.*", "head.*"]}, lambda: {"max_epochs": 3}
    ),
    "buffers": Scenario(
        lambda: {"clients_per_round": 5, "buffers": {"queue": "largest", "own": "client", "*num_batches*": "server"}},
        lambda: {"max_epochs": 3},
        Buffered,
        collectives=5,
    ),
    "frozen": Scenario(
        lambda: {"clients_per_round": 5, "aggregator": trimmed_mean(1)},
        lambda: {"max_epochs": 3},
        Taught,
        collectives=4,  # in a round that starts again: twice the one, and two for the names
    ),
    "ditto": Scenario(lambda: {"clients_per_round": 4, "personal": Ditto(0.5)}, lambda: {"max_epochs": 3}),
    "hostile": Scenario(
        lambda: {"clients_per_round": 6, "aggregator": attacked(trimmed_mean(1), sign_flip(3.0), attackers=[1, 4])},
        lambda: {"max_epochs": 3},
    ),
    "centered": Scenario(
        lambda: {"clients_per_round": 5, "aggregator": centered_clipping(0.3, iterations=2)}, lambda: {"max_epochs": 3}
    ),
    "private": Scenario(
        lambda: {
            "clients_per_round": 4,
            "sampler": "poisson",
            "privacy": dp_fed_avg(clip_norm=0.5, noise_multiplier=0.1, delta=1e-3, accountant="rdp"),
            "personal": ["body.1.*"],
        },
        lambda: {"max_epochs": 3},
    ),
    "asynchronous": Scenario(
        lambda: {
            "clients_per_round": 4,
            "mode": FedBuff(concurrency=5, seconds=[1.0, 3.0, 1.5, 7.0, 2.0, 2.5, 4.0, 1.2, 0.8]),
        },
        lambda: {"max_epochs": 5},
    ),
    "all_rejected": Scenario(
        lambda: {"clients_per_round": 5},
        lambda: {"max_epochs": 3},
        poisoned=tuple(range(CLIENTS)),
        fails=True,
    ),
    "small_cohort": Scenario(lambda: {"clients_per_round": 1}, fails=True, least_ranks=2),
    "shrinking_cohort": Scenario(
        lambda: {"clients_per_round": 4, "sampler": shrinking, "client_optimizer": "keep"},
        lambda: {"max_epochs": 4},
    ),
    "names": Scenario(
        lambda: {"clients_per_round": 4, "sampler": shrinking, "rounds_per_epoch": 2},
        lambda: {"max_epochs": 3},
        Named,
    ),
    "after_failures": Scenario(lambda: {"clients_per_round": 3}, lambda: {"max_epochs": 2}),
}


def training_data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    return reference.dataset(176, dtype)


def held_out(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """48 samples, which 1, 2 and 3 ranks share evenly: what they log is the same mean."""
    inputs, labels = training_data(dtype).tensors
    return TensorDataset(inputs[:48] + 0.5, labels[:48])


def partitioner() -> DirichletPartitioner:
    return DirichletPartitioner(CLIENTS, None, alpha=0.3, min_partition_size=5, seed=1)


def small_and_large() -> Population:
    """Two kinds of devices, one of which is often late, and one of which does not always answer."""
    small = DeviceClass("small", 12_000, 1e6, 1e6, 1e4, 1e4)
    large = DeviceClass("large", 20_000, 1e7, 1e7, 1e6, 1e6, availability=0.7)
    return Population({small: 0.4, large: 0.6}, over_selection=1.5, deadline=0.35, min_clients=3, headroom=0.0)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


class Spy(pl.Callback):
    """Keeps everything that callbacks are told about rounds and clients, and which collectives ran in between."""

    def __init__(self, calls: list[tuple[str, bool]]) -> None:
        self._calls = calls
        self._seen = 0
        self.events: list[tuple[str, int, int]] = []
        self.deltas: dict[tuple[int, int], Tensor] = {}
        self.records: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []
        self.in_round: list[list[str]] = []

    def on_round_start(self, trainer: pl.Trainer, module: Module, round: int, cohort: IntArray) -> None:
        self.events.append(("round_start", round, len(cohort)))
        self._seen = len(self._calls)

    def on_client_start(self, trainer: pl.Trainer, module: Module, client: int) -> None:
        self.events.append(("client_start", trainer.global_step, client))

    def on_client_end(self, trainer: pl.Trainer, module: Module, update: ClientUpdate) -> None:
        self.events.append(("client_end", trainer.global_step, update.client))
        self.deltas[trainer.global_step, update.client] = update.delta.clone()

    def on_round_end(self, trainer: pl.Trainer, module: Module, record: RoundRecord) -> None:
        self.events.append(("round_end", record.round, len(record.clients)))
        self.in_round.append([name for name, _ in self._calls[self._seen :]])
        self.records.append({name: _plain(value) for name, value in vars(record).items()})
        self.metrics.append(record.metrics())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    name: str, calls: list[tuple[str, bool]] | None = None, start_method: str = "popen", **devices: Any
) -> dict[str, Any]:
    """Run a scenario and return what it left, as tensors and primitives.

    Args:
        name: key of `SCENARIOS`.
        calls: the growing list of collectives from `watch_collectives`.
        start_method: as the strategy's.
        devices: ``devices`` and ``num_nodes`` of the Trainer.
    """
    scenario = SCENARIOS[name]
    options = scenario.trainer()
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    data: Dataset[Any] = training_data(dtype)
    if scenario.poisoned:
        inputs, labels = training_data(dtype).tensors
        partition = partitioner()
        partition.dataset = labels
        for client in scenario.poisoned:
            inputs[partition.load_partition(client)[0], 0] = 2 * POISON
        data = TensorDataset(inputs, labels)
    if scenario.workers:
        data = Noisy(training_data(dtype))
    loader = DataLoader(
        data, BATCH, shuffle=True, num_workers=scenario.workers, persistent_workers=scenario.workers > 0
    )
    calls = [] if calls is None else calls
    spy, module, first_call = Spy(calls), scenario.module(), len(calls)
    strategy = sequential(partitioner=partitioner(), start_method=start_method, **scenario.strategy())
    trainer = reference.quiet_trainer(
        callbacks=[spy, *scenario.callbacks()], strategy=strategy, **{**options, **devices}
    )
    result: dict[str, Any] = {"error": "", "evaluated": {}}
    start = {key: value.clone() for key, value in module.state_dict().items()}
    try:
        trainer.fit(module, loader, DataLoader(held_out(dtype), BATCH) if scenario.evaluate else None)
    except (RuntimeError, ValueError) as error:
        if not scenario.fails:
            raise
        result["error"] = f"{type(error).__name__}: {error}"
    result["calls"] = calls[first_call:]
    if scenario.evaluate:
        result["evaluated"] = {
            **trainer.validate(module, DataLoader(held_out(dtype), BATCH), verbose=False)[0],
            **trainer.test(module, DataLoader(held_out(dtype), BATCH), verbose=False)[0],
        }
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return result | {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "rounds": trainer.global_step,
        "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "start": start,
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "scale": 0.0 if scaler is None else scaler.get_scale(),
        "batches": module.batches,
        "heard": module.heard,
        "events": spy.events,
        "deltas": spy.deltas,
        "records": spy.records,
        "metrics": spy.metrics,
        "logged": spy.logged,
        "in_round": spy.in_round,
    }


_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier", "recv", "reduce",
    "reduce_scatter", "scatter", "scatter_object_list", "send",
)  # fmt: skip


def watch_collectives() -> list[tuple[str, bool]]:
    """From now on, note every collective that this process joins, and whether the strategy asked for it."""
    calls: list[tuple[str, bool]] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, Path(sys._getframe(1).f_code.co_filename).name == "collectives.py"))
            return original(*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, watched(name, getattr(dist, name)))
    return calls
