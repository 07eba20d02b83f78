"""The fast local step and Lightning's full closure give the same bits, whatever the module and the Trainer ask for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.executors import local_step
from tests.features import local_loops, reference_loop
from tests.laws import reference
from tests.strategies import sequential

ROUNDS = 4


class Model(reference.Classifier):
    """Dropout, BatchNorm, momentum and weight decay; also keeps what hooks and loggers were told."""

    make_optimizer: Callable[[Model], Any] = staticmethod(
        lambda self: torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    )

    def __init__(self) -> None:
        super().__init__(dropout=0.3, batch_norm=True)
        self.told: list[Any] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.told.append((batch_idx, self.trainer.is_last_batch, {k: v.clone() for k, v in outputs.items()}))

    def configure_optimizers(self) -> Any:
        return type(self).make_optimizer(self)


def with_optimizer(make: Callable[[Any], Any]) -> type[Model]:
    return type("WithOptimizer", (Model,), {"make_optimizer": staticmethod(make)})


class Extras(Model):
    """Returns a dictionary, and None for some batches."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else {"loss": loss, "inputs": batch[0]}


class ZerosKept(Extras):
    make_optimizer = staticmethod(lambda self: KeepsZeros(self.parameters(), lr=0.1, momentum=0.9))


class OnlyBatch(Model):
    def training_step(self, batch: list[Tensor]) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


class FrozenPart(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Skips(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class Draws(Model):
    """Transfer hooks that draw random numbers."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]] if self.training else batch


class ReturnsParameter(pl.LightningModule):
    """The loss is a parameter itself, which the step then moves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.weight

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwiceForward(torch.optim.SGD):
    """Asks for the gradients twice, at two places, as sharpness-aware methods do."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        first = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=0.01)
        closure()
        super().step()
        return first


class KeepsZeros(torch.optim.SGD):
    """Gradients are set to zero in place; with momentum that is another step than none where there is no loss."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


def hooked_after(module: Any) -> Optimizer:
    """A hook after the step that moves the parameters."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def shrink(optimizer: Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.mul_(0.9)

    optimizer.register_step_post_hook(shrink)
    return optimizer


def groups(module: Any) -> Optimizer:
    decay, rest = [module.net[0].weight], [p for p in module.parameters() if p is not module.net[0].weight]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1, "lr": 0.02}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )


def scheduled(module: Any) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    step = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": step}


def hooked(module: Any) -> Optimizer:
    """A hook that halves what gradients there are; the optimizer has it called before it asks for new ones."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def halve(optimizer: Optimizer, *_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(halve)
    return optimizer


def patched(module: Any) -> Any:
    """A step of its own on the object, below the one that schedulers put there."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    usual = optimizer.step

    def twice(self: Optimizer, closure: Any = None) -> Any:
        closure()
        return usual(closure)

    optimizer.step = MethodType(twice, optimizer)  # type: ignore[method-assign]
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "accumulation schedule": {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 2: 3})]},
    "averaged weights": {"callbacks": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=2)]},
    "64 bits": {"precision": "64-true"},
    "bfloat16": {"precision": "bf16-true"},
    "float16": {"precision": "16-true"},
    "autocast": {"precision": "bf16-mixed", "gradient_clip_val": 0.05},
    "anomaly detection": {"detect_anomaly": True},
    "kept optimizers": {"strategy": {"client_optimizer": "keep"}, "module": with_optimizer(groups)},
    "local steps": {"strategy": {"local_steps": 5, "clients_per_round": 2}, "module": with_optimizer(groups)},
    "several passes": {"strategy": {"local_epochs": 3}, "accumulate_grad_batches": 2},
    "groups": {"module": with_optimizer(groups)},
    "schedule": {"module": with_optimizer(scheduled)},
    "adagrad": {"module": with_optimizer(lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05))},
    "rprop": {"module": with_optimizer(lambda m: torch.optim.Rprop(m.parameters(), lr=0.01))},
    "foreach": {"module": with_optimizer(lambda m: torch.optim.Adam(m.parameters(), lr=0.01, foreach=True))},
    "fused": {"module": with_optimizer(lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True))},
    "lbfgs": {"module": with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))},
    "lbfgs, accumulated": {
        "module": with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3)),
        "accumulate_grad_batches": 2,
    },
    "two gradients a step": {"module": with_optimizer(lambda m: TwiceForward(m.parameters(), lr=0.1, momentum=0.9))},
    "step hooks": {"module": with_optimizer(hooked), "accumulate_grad_batches": 2},
    "a hook after the step": {"module": with_optimizer(hooked_after)},
    "a step of its own": {"module": with_optimizer(patched)},
    "zeros kept": {"module": ZerosKept},
    "dictionaries and None": {"module": Extras, "accumulate_grad_batches": 2},
    "no batch_idx": {"module": OnlyBatch},
    "frozen": {"module": FrozenPart},
    "skipped rest": {"module": Skips},
    "hooks that draw": {"module": Draws},
    "loss is a parameter": {"module": ReturnsParameter},
    "no cache": {"strategy": {"cache_dataset": False}},
}


def train(scenario: dict[str, Any]) -> tuple[list[reference_loop.State], list[Any], dict[str, Tensor], list[float]]:
    """The global model after every round; what hooks, loggers and records were told."""
    options = dict(scenario)
    module = local_loops.make(options.pop("module", Model))
    callbacks: list[pl.Callback] = options.pop("callbacks", list)()
    snapshots = reference_loop.Snapshots()
    strategy = sequential(partitioner=reference_loop.partition(), **options.pop("strategy", {}))
    trainer = reference.quiet_trainer(
        strategy=strategy, max_epochs=ROUNDS, callbacks=[snapshots, *callbacks], **options
    )
    trainer.fit(module, reference.loader(reference_loop.data()))
    record = strategy.last_round
    assert record is not None
    return snapshots.after_round, getattr(module, "told", []), dict(trainer.callback_metrics), record.losses.tolist()


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_bits_on_both_paths(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        models, told, metrics, losses = train(SCENARIOS[name])
        assert caplog.text.count("a local step runs only training_step") == 1
        monkeypatch.setattr(local_step, "reason_for_lightning_step", lambda trainer: "a test wants to compare")
        full_models, full_told, full_metrics, full_losses = train(SCENARIOS[name])
        assert caplog.text.count("full closure, since a test wants to compare") == 1
    assert not reference_loop.same(models[0], models[-1])
    for fast, full in zip(models, full_models, strict=True):
        assert reference_loop.same(fast, full)
    for (index, last, outputs), (full_index, full_last, full_outputs) in zip(told, full_told, strict=True):
        assert (index, last, outputs.keys()) == (full_index, full_last, full_outputs.keys())
        assert all(torch.equal(outputs[key], full_outputs[key]) for key in outputs)
    assert losses == full_losses
    assert metrics.keys() == full_metrics.keys()
    for key in metrics.keys() - {"round/seconds", "round/idle"}:
        assert torch.equal(metrics[key], full_metrics[key]), key


def test_what_others_put_around_the_step_of_a_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # torch wraps a class's step when it is first used
    usual, calls = torch.optim.SGD.step, []

    @functools.wraps(usual)  # it also copies the mark that torch has wrapped this function
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    record = train({})
    assert len(calls) == sum(len(told) > 0 for told in record[1]) > 0


def test_torchs_profiler_sees_the_steps() -> None:
    with torch.profiler.profile() as profiler:
        train({})
    steps = next(event for event in profiler.key_averages() if event.key == "Optimizer.step#SGD.step")
    assert steps.count >= ROUNDS


# ---- where the full closure is needed


class Manual(Model):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


MODULE_HOOKS: dict[str, Callable[..., Any]] = {
    "backward": lambda self, loss: loss.backward(),
    "optimizer_step": lambda self, epoch, batch_idx, optimizer, closure: optimizer.step(closure),
    "optimizer_zero_grad": lambda self, epoch, batch_idx, optimizer: optimizer.zero_grad(),
    "configure_gradient_clipping": lambda self, *args, **kwargs: None,
    "on_before_zero_grad": lambda self, optimizer: None,
    "on_before_backward": lambda self, loss: None,
    "on_after_backward": lambda self: None,
    "on_before_optimizer_step": lambda self, optimizer: None,
}


class Doubled(FederatedStrategy):
    """Turns every gradient around, as a check that it is asked."""

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(2 * closure_loss, *args, **kwargs)


def reason(module: pl.LightningModule, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    strategy = options.pop("strategy", None) or sequential(partitioner=reference_loop.partition())
    with caplog.at_level(logging.INFO):
        trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2, **options)
        trainer.fit(module, reference.loader(reference_loop.data()))
    (line,) = (r.getMessage() for r in caplog.records if "a local step" in r.getMessage())
    return line.partition("full closure, since ")[2]


@pytest.mark.parametrize("hook", MODULE_HOOKS)
@pytest.mark.parametrize("where", ["class", "instance"])
def test_hooks_of_the_module(hook: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(hook)
        return MODULE_HOOKS[hook](self, *args, **kwargs)

    kind = type("Own", (Model,), {hook: own}) if where == "class" else Model
    module = local_loops.make(kind)
    if where == "instance":
        setattr(module, hook, own.__get__(module))
    assert reason(module, caplog) == f"the module overrides {hook}."
    assert len(calls) == 2 * 7  # a round has seven local batches


@pytest.mark.parametrize(
    "hook", ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
)
def test_hooks_of_callbacks(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    callback = LambdaCallback(**{hook: lambda *args: calls.append(hook)})
    assert reason(local_loops.make(Model), caplog, callbacks=[callback]) == f"LambdaCallback overrides {hook}."
    assert len(calls) == 2 * 7


def test_other_reasons(caplog: pytest.LogCaptureFixture) -> None:
    assert reason(local_loops.make(Manual), caplog) == "the module uses manual optimization."
    caplog.clear()
    assert "SimpleProfiler" in reason(local_loops.make(Model), caplog, profiler="simple")
    caplog.clear()
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    assert reason(local_loops.make(Model), caplog, plugins=[scaling]).startswith("precision 16-mixed")
    caplog.clear()
    strategy = Doubled(partitioner=reference_loop.partition(), executor="sequential")
    assert reason(local_loops.make(Model), caplog, strategy=strategy) == "Doubled overrides backward."


def test_a_bad_answer_of_training_step_is_lightnings_own_complaint() -> None:
    class Wrong(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return {"no": "loss"} if batch_idx else super().training_step(batch, batch_idx)

    with pytest.raises(Exception, match="the 'loss' key needs to be present"):
        train({"module": Wrong})


def test_the_model_is_trained_at_all() -> None:
    """Against the hand-written loop, on both paths' common ground."""
    module = local_loops.make(reference.Classifier)
    snapshots = reference_loop.Snapshots()
    reference_loop.fit(module, callbacks=[snapshots], max_epochs=ROUNDS)
    for got, right in zip(snapshots.after_round, reference_loop.models(ROUNDS)[1:], strict=True):
        assert reference_loop.same(got, right)
