"""What loggers get of a federated run: settings, HParams, curves that belong together, the partition."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader, Dataset

from lightning_fedscale import FederatedStrategy, compressors, local_rules, privacy, server
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.cli.digits import Classifier, Digits
from lightning_fedscale.partitioners import DirichletPartitioner, IidPartitioner, Partition, Partitioner
from lightning_fedscale.scaling import Rosenfeld, read_logs

pytestmark = pytest.mark.filterwarnings("ignore")

LAW = Rosenfeld(E=1.8, A=1.0, B=0.5, alpha=0.4, beta=0.35)


class Net(Classifier):
    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.save_hyperparameters()


class Chatty(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("batch_loss", loss)
        return loss


def train(
    logger: Any, *callbacks: pl.Callback, module: pl.LightningModule | None = None, data: Any = None, rounds: int = 3,
    **options: Any,
) -> pl.Trainer:  # fmt: skip
    strategy = {"num_clients": 6, "clients_per_round": 3, "executor": "sequential", **options}
    trainer = pl.Trainer(
        max_epochs=rounds, logger=logger, callbacks=list(callbacks), log_every_n_steps=1, accelerator="cpu",
        strategy=FederatedStrategy(**strategy), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net() if module is None else module, Digits(100) if data is None else data)
    return trainer


def events(folder: str) -> EventAccumulator:
    return EventAccumulator(folder, size_guidance={"tensors": 0, "images": 0}).Reload()


def hparams(folder: str, part: str) -> Any:
    """What HParams reads: the first summary of the name."""
    content = events(folder).SummaryMetadata(f"_hparams_/{part}").plugin_data.content
    return getattr(HParamsPluginData.FromString(content), part)


def settings_in(folder: str) -> dict[str, Any]:
    found = hparams(folder, "session_start_info").hparams
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in found.items()}


class Kept(Logger):
    """Has the interface of `MLFlowLogger`: an experiment without TensorBoard's methods, settings that never change."""

    name, version, experiment = "kept", 0, object()

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.names: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.names |= set(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        assert all(self.settings.get(name, value) == value for name, value in dict(params).items())
        self.settings |= dict(params)


class WithImages(Kept, WandbLogger):  # type: ignore[misc]
    """As W&B's, which takes figures by `log_image`."""

    def __init__(self) -> None:
        super().__init__()
        self.images: set[str] = set()

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(hasattr(image, "savefig") for image in images)
        self.images.add(key)

    def finalize(self, status: str) -> None:
        pass


class WithFigures(Kept, MLFlowLogger):  # type: ignore[misc]
    """As MLflow's, whose client takes figures by `log_figure`."""

    run_id = "run"

    def __init__(self) -> None:
        super().__init__()
        self.images: set[str] = set()

    @property
    def experiment(self) -> Any:  # type: ignore[override]
        return self

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        assert run_id == self.run_id
        assert hasattr(figure, "savefig")
        self.images.add(artifact_file.removesuffix(".png"))

    def finalize(self, status: str = "success") -> None:
        pass


# ---- settings


def test_every_logger_gets_the_settings_beside_the_modules_own(tmp_path: Path) -> None:
    board, table, kept = TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv"), Kept()
    partitioner = DirichletPartitioner(6, alpha=0.3, min_partition_size=1)
    options: dict[str, Any] = {
        "num_clients": None, "partitioner": partitioner, "server_optimizer": server.fed_adam(lr=0.02),
        "local_rule": local_rules.fed_prox(mu=0.5), "compressor": compressors.qsgd(levels=127), "local_steps": 4,
    }  # fmt: skip
    trainer = train([board, table, kept], **options)
    expected = {
        "width": 8,
        "lr": 0.1,
        "federated/num_clients": 6,
        "federated/clients_per_round": 3,
        "federated/samples": 1200,
        "federated/params": 64 * 8 + 8 + 8 * 10 + 10,
        "federated/local_epochs": "none",
        "federated/local_steps": 4,
        "federated/partitioner.alpha": 0.3,
        "federated/server_optimizer": "fed_adam(lr=0.02, beta1=0.9, beta2=0.99, tau=0.001)",
        "federated/server_optimizer.lr": 0.02,
        "federated/local_rule": "fed_prox(mu=0.5)",
        "federated/local_rule.mu": 0.5,
        "federated/compressor": compressors.qsgd(levels=127).name,
        "federated/privacy": "none",
        "federated/client_optimizer": "reset",
        "federated/seed": 0,
    }
    files = [yaml.safe_load(Path(str(each.log_dir), "hparams.yaml").read_text()) for each in (board, table)]
    for found in (*files, kept.settings, settings_in(board.log_dir)):
        assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    assert trainer.lightning_module.hparams == {"width": 8, "lr": 0.1}


def test_words_for_what_has_no_numbers(tmp_path: Path) -> None:
    kept = Kept()
    held = Partition.from_lists(np.array_split(np.arange(1200), 6))
    train(kept, partitioner=held, num_clients=None, local_steps=lambda round: 1, personal=["net.2.*"])
    found = {name.removeprefix("federated/"): value for name, value in kept.settings.items()}
    assert (found["partitioner"], found["local_steps"], found["personal"]) == ("Partition", -1, "net.2.*")
    noisy = Kept()
    train(noisy, privacy=privacy.dp_fed_avg(clip_norm=0.5, noise_multiplier=0.1, delta=1e-3), sampler="poisson")
    assert noisy.settings["federated/privacy.clip_norm"] == 0.5
    assert noisy.settings["federated/sampler"] == "poisson"


class Finished(Partitioner):
    """Its argument has the name of a property that needs a dataset."""

    def __init__(self, partition: Partition) -> None:
        super().__init__(partition.num_clients)
        self._finished = partition

    def _split(self) -> Partition:
        return self._finished


class Skewed(IidPartitioner):
    """Keeps one argument under another name, one as a private attribute, and takes any others."""

    def __init__(self, num_partitions: int, skew: float, strength: float, *rest: Any, **others: Any) -> None:
        super().__init__(num_partitions)
        self.exponent, self._strength = skew, strength


class Parsed(IidPartitioner):
    """Has an attribute that a base class might want."""

    def __init__(self, num_partitions: int, seed: int = 42) -> None:
        super().__init__(num_partitions, seed=seed)
        self.arguments = ["--seed=42"]


@pytest.mark.parametrize(
    ("partitioner", "shown", "numbers"),
    [
        (Finished(Partition.from_lists(np.array_split(np.arange(1200), 6))), "Finished()", {}),
        (Skewed(6, 0.5, 3.0), "Skewed(num_partitions=6, strength=3.0)", {"strength": 3.0}),
        (Parsed(6), "Parsed(num_partitions=6)", {}),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Partitioner) else "",
)
def test_any_partitioner_trains_with_a_logger(
    partitioner: Partitioner, shown: str, numbers: dict[str, float]
) -> None:  # fmt: skip
    kept = Kept()
    train(kept, partitioner=partitioner, num_clients=None, rounds=1)
    found = {name: value for name, value in kept.settings.items() if name.startswith("federated/partitioner")}
    expected = {f"federated/partitioner.{name}": value for name, value in numbers.items()}
    assert found == {"federated/partitioner": shown, **expected}


@pytest.mark.parametrize(
    ("compressor", "numbers"),
    [
        (compressors.top_k(k=7), {"k": 7}),
        (compressors.top_k(ratio=0.1), {"ratio": 0.1}),
        (compressors.qsgd(127), {"levels": 127}),
        (compressors.power_sgd(rank=2, min_compression=3), {"rank": 2, "min_compression": 3}),
        (compressors.sign(per_tensor=True), {}),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_the_numbers_of_a_compressor_are_settings(
    compressor: compressors.Compressor, numbers: dict[str, float]
) -> None:  # fmt: skip
    kept = Kept()
    train(kept, compressor=compressor, downlink_compressor=compressor, rounds=1)
    for name in ("compressor", "downlink_compressor"):
        assert kept.settings[f"federated/{name}"] == compressor.name
        found = {each: value for each, value in kept.settings.items() if each.startswith(f"federated/{name}.")}
        assert found == {f"federated/{name}.{each}": value for each, value in numbers.items()}


# ---- HParams


def test_hparams_show_the_users_metrics_and_no_placeholder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(logger, ComputeAccounting(law=LAW), ClientMetrics())
    shown = {info.name.tag for info in hparams(logger.log_dir, "experiment").metric_infos}
    of_clients = {"clients/val_accuracy/worst10", "clients/val_accuracy/mean"}
    assert {name for name in shown if name.startswith("clients/val_accuracy")} == of_clients
    assert {"val_loss", "val_accuracy", "round/loss", "compute/size_ratio", "compute/flops_total"} <= shown
    assert not shown & {"hp_metric", "round/seconds", "compute/tokens"}
    scalars = read_logs(logger.log_dir).scalars
    assert shown <= set(scalars)
    assert "hp_metric" not in scalars
    assert len(scalars["val_loss"]) == 3  # no points but those that were measured
    first = {info.name for info in hparams(logger.log_dir, "experiment").hparam_infos if info.differs}
    assert {"width", "lr", "federated/num_clients", "federated/server_optimizer.lr"} <= first
    assert "federated/mode" not in first
    assert logger._default_hp_metric  # the logger is as it was


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_that_ends_early_is_compared_too(rounds: int, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(logger, rounds=rounds)
    assert "val_loss" in {info.name.tag for info in hparams(logger.log_dir, "experiment").metric_infos}


def test_an_interrupted_run_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("pulled the plug")

    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="pulled"):
        train(logger, Stop())
    logger.experiment.flush()
    assert "val_loss" in {info.name.tag for info in hparams(logger.log_dir, "experiment").metric_infos}
    assert logger._default_hp_metric


def test_a_search_for_a_learning_rate_does_not_spend_the_row(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(logger, LearningRateFinder(num_training_steps=3, min_lr=0.01, max_lr=0.1))
    assert "val_loss" in {info.name.tag for info in hparams(logger.log_dir, "experiment").metric_infos}


def test_what_the_user_gives_to_hparams_comes_first(tmp_path: Path) -> None:
    class Own(Net):
        def on_train_start(self) -> None:
            assert isinstance(self.logger, TensorBoardLogger)
            self.logger.log_hyperparams(self.hparams, {"hp/mine": 0.5})  # type: ignore[arg-type]

    logger = TensorBoardLogger(tmp_path)
    train(logger, module=Own())
    assert [info.name.tag for info in hparams(logger.log_dir, "experiment").metric_infos] == ["hp/mine"]


# ---- the same scalars everywhere


def test_all_loggers_get_the_same_scalars(tmp_path: Path) -> None:
    board, table, kept = TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv"), Kept()
    of_wandb, of_mlflow = WithImages(), WithFigures()
    callbacks = [MaxBatchProbe(budget="1GiB", apply=False), CriticalPhase(action="observe"), ComputeAccounting(law=LAW),
                 ClientMetrics()]  # fmt: skip
    train([board, table, kept, of_wandb, of_mlflow], *callbacks, module=Chatty(), rounds=6, client_log_every_n=2)
    written = set(read_logs(table.log_dir).scalars)
    for namespace in ("round", "client", "clients", "phase", "probe", "compute"):
        assert any(name.startswith(f"{namespace}/") for name in written)
    for logger in (kept, of_wandb, of_mlflow):
        assert logger.names - {"epoch"} == written
    curves = {name for name in read_logs(board.log_dir).scalars if name.startswith("compute/loss_by_")}
    assert set(read_logs(board.log_dir).scalars) - curves == written
    for name, values in read_logs(board.log_dir).scalars.items():
        if name not in curves:
            assert values.to_numpy() == pytest.approx(read_logs(table.log_dir).scalars[name].to_numpy(), rel=1e-5)
    figures = {"client/labels", "clients/val_loss/sorted", "phase/course", "compute/position", "probe/memory"}
    assert figures <= of_wandb.images
    assert of_wandb.images == of_mlflow.images == set(read_logs(board.log_dir).pictures)


# ---- layouts and figures


def test_curves_that_belong_together_are_on_one_page(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    callbacks = [MaxBatchProbe(budget="1GiB", apply=False), CriticalPhase(action="observe"), ComputeAccounting(law=LAW)]
    train(logger, *callbacks, client_log_every_n=2)
    shown = events(logger.log_dir).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = Layout.FromString(shown)
    titles = [category.title for category in layout.category]
    assert titles[0] == "Rounds"
    assert set(titles) == {"Rounds", "Clients' batches", "MaxBatchProbe", "CriticalPhase", "ComputeAccounting"}
    (rounds,) = (category for category in layout.category if category.title == "Rounds")
    patterns = {tag.rstrip("$") for chart in rounds.chart for tag in chart.multiline.tag}
    assert patterns <= set(read_logs(logger.log_dir).scalars)  # no chart of what this run does not have


def test_who_holds_what_is_a_figure(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(logger)
    picture = read_logs(logger.log_dir).pictures["client/labels"]
    assert matplotlib.image.imread(io.BytesIO(picture)).std() > 0.1


class Unread(Dataset[Any]):
    """Whose labels are known only to those who read every sample."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return torch.full((64,), float(index)) / 60, index % 10


def test_no_sample_is_read_for_a_figure(tmp_path: Path) -> None:
    reads = []
    for logger in (False, TensorBoardLogger(tmp_path)):
        data = Unread()
        train(logger, data=DataLoader(data, 10, shuffle=True))
        reads.append(data.reads)
    assert reads[0] == reads[1]
    assert read_logs(tmp_path / "lightning_logs" / "version_0").pictures == {}


def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    trainer = train(False)
    assert trainer.global_step == 3
    assert list(Path.cwd().iterdir()) == []


def test_the_trainer_gets_its_callbacks_back(tmp_path: Path) -> None:
    trainer = train(TensorBoardLogger(tmp_path))
    assert "RunSettingsLogger" not in {type(each).__name__ for each in trainer.callbacks}  # type: ignore[attr-defined]
