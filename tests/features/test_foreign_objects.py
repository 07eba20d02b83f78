"""Objects that stand in for a project's own: mocks of callbacks and loggers, and what passes all questions on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock, Mock, create_autospec

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import Dataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe, RoundEvents
from lightning_fedscale.partitioners.labels import class_names, find_labels
from lightning_fedscale.utils.foreign import attribute_of, has, is_really
from tests.laws import reference

EXECUTORS = ["sequential", "vectorized", "auto"]
MOCKS: list[Callable[[Any], Any]] = [
    lambda kind: Mock(spec=kind),
    lambda kind: MagicMock(spec=kind),
    lambda kind: create_autospec(kind, instance=True),
    lambda kind: Mock(),
    lambda kind: MagicMock(),
]


class Validated(reference.Classifier):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def trained(executor: str, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Validated(dropout=0.0)
    strategy = FederatedStrategy(num_clients=3, executor=executor)  # type: ignore[arg-type]
    trainer = reference.quiet_trainer(max_epochs=2, strategy=strategy, **options)
    data = reference.dataset(48)
    trainer.fit(module, reference.loader(data), reference.loader(data, shuffle=False))
    assert trainer.global_step == 2
    return module.state_dict()


@pytest.mark.parametrize(
    ("executor", "make", "kind"),
    [
        *((executor, MOCKS[0], Callback) for executor in EXECUTORS),
        *(("auto", make, Callback) for make in MOCKS[1:]),
        *(("auto", MOCKS[0], kind) for kind in (RoundEvents, GradientAccumulationScheduler, ThroughputMonitor)),
    ],
)
def test_a_mocked_callback_is_told_what_a_callback_is_told(
    executor: str, make: Callable[[Any], Any], kind: type[Callback]
) -> None:
    watch = make(kind)
    found = trained(executor, callbacks=[watch])
    assert watch.on_train_batch_end.call_count == 2
    # The hooks on the client are told of every one of the 3 * 2 local batches in each round.
    assert watch.on_before_backward.call_count == watch.on_before_optimizer_step.call_count == 12
    if hasattr(kind, "on_client_end"):
        assert watch.on_client_end.call_count == 6
    for name, value in trained("sequential").items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("make", MOCKS)
@pytest.mark.parametrize("kind", [Logger, TensorBoardLogger, CSVLogger, WandbLogger, MLFlowLogger])
def test_a_mocked_logger_is_given_every_rounds_values(
    make: Callable[[Any], Any], kind: type[Logger], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = make(kind)
    callbacks = [ComputeAccounting(), ClientMetrics(), CriticalPhase(), MaxBatchProbe(apply=False)]
    trained("sequential", logger=[logger], callbacks=callbacks, default_root_dir=tmp_path)
    names = [set(call.kwargs.get("metrics") or call.args[0]) for call in logger.log_metrics.call_args_list]
    assert sum("round/loss" in each for each in names) == 2
    assert not list(tmp_path.iterdir())  # where a mock says that its files are, nobody writes any


class Proxy:
    """Passes on what it is asked."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Failing:
    @property
    def targets(self) -> Any:
        raise KeyError("not loaded yet")


def test_an_answer_counts_where_it_means_something() -> None:
    assert attribute_of(Proxy([1]), "append") is not None
    assert attribute_of(Proxy([1]), "extended") is None
    assert attribute_of(Failing(), "targets", 3) == 3
    assert not has(Failing(), "targets")
    assert attribute_of(Mock(), "targets") is attribute_of(MagicMock(), "targets") is None
    assert attribute_of(Mock(spec=["targets"]), "targets") is not None
    assert is_really(CSVLogger("."), Logger)  # type: ignore[type-abstract]
    assert not is_really(Mock(spec=CSVLogger), Logger)  # type: ignore[type-abstract]


class Lazy(Dataset[tuple[torch.Tensor, int]]):
    """Answers to any name with what its file would hold, as wrappers of remote data do."""

    def __getattr__(self, name: str) -> Any:
        return Mock()

    @property
    def targets(self) -> Any:
        raise RuntimeError("no file")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2), index % 3


def test_labels_of_a_dataset_that_answers_to_any_name_are_read_off_its_samples() -> None:
    assert find_labels(Lazy()).tolist() == [0, 1, 2] * 4
    assert class_names(Lazy()) is None
