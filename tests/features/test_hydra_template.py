"""A project in the shape of lightning-hydra-template, unmodified, becomes federated from its command line.

The files are written here in that shape: configuration in ``configs/``, an application in ``src/train.py`` that makes
data, model, callbacks, loggers and Trainer of it, and a module that is given its network and partial optimizers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pandas import read_csv

from lightning_fedscale.scaling import read_runs
from tests import pythons

ROOT = Path(__file__).parents[2]

PROJECT = {
    "src/__init__.py": "",
    "src/data/__init__.py": "",
    "src/data/points_datamodule.py": '''
from typing import Optional

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split


class PointsDataModule(LightningDataModule):
    def __init__(self, data_dir: str = "data/", lengths=(160, 40, 40), batch_size: int = 8, num_workers: int = 0):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train = self.data_val = self.data_test = None

    def setup(self, stage: Optional[str] = None) -> None:
        if self.data_train is None:
            generator = torch.Generator().manual_seed(42)
            points = torch.randn(sum(self.hparams.lengths), 12, generator=generator)
            labels = (points @ torch.randn(12, 4, generator=generator)).argmax(1)
            parts = random_split(TensorDataset(points, labels), self.hparams.lengths, generator=generator)
            self.data_train, self.data_val, self.data_test = parts

    def loader(self, data, shuffle=False):
        return DataLoader(
            dataset=data, batch_size=self.hparams.batch_size, num_workers=self.hparams.num_workers, shuffle=shuffle
        )

    def train_dataloader(self):
        return self.loader(self.data_train, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.data_val)

    def test_dataloader(self):
        return self.loader(self.data_test)
''',
    "src/models/__init__.py": "",
    "src/models/points_module.py": '''
import torch
from lightning import LightningModule
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy


class PointsModule(LightningModule):
    def __init__(self, net, optimizer, scheduler, compile):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = torch.nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=4)
        self.val_acc = Accuracy(task="multiclass", num_classes=4)
        self.test_acc = Accuracy(task="multiclass", num_classes=4)
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch):
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self):
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def test_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.test_loss(loss)
        self.test_acc(preds, targets)
        self.log("test/loss", self.test_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True, prog_bar=True)

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        watched = {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": watched}
''',
    "src/models/components.py": '''
from torch import nn


class DenseNet(nn.Module):
    def __init__(self, input_size: int = 12, width: int = 16, output_size: int = 4):
        super().__init__()
        layers = [nn.Linear(input_size, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, output_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)
''',
    "src/utils.py": '''
import hydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf


def instantiate_all(part):
    """Of a dictionary of nodes, those with a target: callbacks or loggers."""
    nodes = [] if part is None else [node for _, node in part.items()]
    return [hydra.utils.instantiate(node) for node in nodes if isinstance(node, DictConfig) and "_target_" in node]


@rank_zero_only
def log_hyperparameters(cfg, model, trainer):
    cfg = OmegaConf.to_container(cfg)
    hparams = {name: cfg[name] for name in ("model", "data", "trainer")}
    hparams["model/params/total"] = sum(p.numel() for p in model.parameters())
    hparams.update({name: cfg.get(name) for name in ("callbacks", "task_name", "tags", "ckpt_path", "seed")})
    for logger in trainer.loggers:
        logger.log_hyperparams(hparams)
''',
    "src/train.py": '''
import os
import sys

sys.path.insert(0, os.environ.setdefault("PROJECT_ROOT", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import hydra
import lightning as L

from src.utils import instantiate_all, log_hyperparameters


def train(cfg):
    if cfg.get("seed"):
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_all(cfg.get("callbacks"))
    logger = instantiate_all(cfg.get("logger"))
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    if logger:
        log_hyperparameters(cfg, model, trainer)
    if cfg.get("train"):
        trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    train_metrics = trainer.callback_metrics
    if cfg.get("test"):
        ckpt_path = trainer.checkpoint_callback.best_model_path or None
        trainer.test(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    return {**train_metrics, **trainer.callback_metrics}


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    metrics = train(cfg)
    name = cfg.get("optimized_metric")
    return None if not name else metrics[name].item()


if __name__ == "__main__":
    main()
''',
    "configs/train.yaml": '''
defaults:
  - _self_
  - data: points
  - model: points
  - callbacks: default
  - logger: null
  - trainer: default
  - paths: default
  - hydra: default
  - experiment: null
  - hparams_search: null
  - optional local: default
  - debug: null

task_name: "train"
tags: ["dev"]
train: True
test: True
ckpt_path: null
seed: null
''',
    "configs/data/points.yaml": '''
_target_: src.data.points_datamodule.PointsDataModule
data_dir: ${paths.data_dir}
batch_size: 8
lengths: [160, 40, 40]
num_workers: 0
''',
    "configs/model/points.yaml": '''
_target_: src.models.points_module.PointsModule
optimizer:
  _target_: torch.optim.Adam
  _partial_: true
  lr: 0.01
  weight_decay: 0.0
scheduler:
  _target_: torch.optim.lr_scheduler.ReduceLROnPlateau
  _partial_: true
  mode: min
  factor: 0.1
  patience: 10
net:
  _target_: src.models.components.DenseNet
  input_size: 12
  width: 16
  output_size: 4
compile: false
''',
    "configs/callbacks/default.yaml": '''
defaults:
  - model_checkpoint
  - early_stopping
  - model_summary
  - _self_

model_checkpoint:
  dirpath: ${paths.output_dir}/checkpoints
  filename: "epoch_{epoch:03d}"
  monitor: "val/acc"
  mode: "max"
  save_last: True
  auto_insert_metric_name: False

early_stopping:
  monitor: "val/acc"
  patience: 100
  mode: "max"

model_summary:
  max_depth: -1
''',
    "configs/callbacks/model_checkpoint.yaml": '''
model_checkpoint:
  _target_: lightning.pytorch.callbacks.ModelCheckpoint
  dirpath: null
  filename: null
  monitor: null
  save_last: null
  mode: "min"
  auto_insert_metric_name: True
''',
    "configs/callbacks/early_stopping.yaml": '''
early_stopping:
  _target_: lightning.pytorch.callbacks.EarlyStopping
  monitor: ???
  patience: 3
  mode: "min"
''',
    "configs/callbacks/model_summary.yaml": '''
model_summary:
  _target_: lightning.pytorch.callbacks.RichModelSummary
  max_depth: 1
''',
    "configs/logger/csv.yaml": '''
csv:
  _target_: lightning.pytorch.loggers.csv_logs.CSVLogger
  save_dir: "${paths.output_dir}"
  name: "csv/"
  prefix: ""
''',
    "configs/logger/tensorboard.yaml": '''
tensorboard:
  _target_: lightning.pytorch.loggers.tensorboard.TensorBoardLogger
  save_dir: "${paths.output_dir}/tensorboard/"
  name: null
  log_graph: False
  default_hp_metric: True
  prefix: ""
''',
    "configs/trainer/default.yaml": '''
_target_: lightning.pytorch.trainer.Trainer
default_root_dir: ${paths.output_dir}
min_epochs: 1
max_epochs: 10
accelerator: cpu
devices: 1
check_val_every_n_epoch: 1
deterministic: False
''',
    "configs/trainer/ddp.yaml": '''
defaults:
  - default

strategy: ddp
accelerator: cpu
devices: 2
''',
    "configs/paths/default.yaml": '''
root_dir: ${oc.env:PROJECT_ROOT}
data_dir: ${paths.root_dir}/data/
log_dir: ${paths.root_dir}/logs/
output_dir: ${hydra:runtime.output_dir}
work_dir: ${hydra:runtime.cwd}
''',
    "configs/hydra/default.yaml": '''
run:
  dir: ${paths.log_dir}/${task_name}/runs/${now:%Y-%m-%d}_${now:%H-%M-%S}
sweep:
  dir: ${paths.log_dir}/${task_name}/multiruns/${now:%Y-%m-%d}_${now:%H-%M-%S}
  subdir: ${hydra.job.num}

job_logging:
  handlers:
    file:
      filename: ${hydra.runtime.output_dir}/${task_name}.log
''',
    "configs/experiment/example.yaml": '''
# @package _global_
defaults:
  - override /data: points
  - override /model: points
  - override /callbacks: default
  - override /trainer: default

tags: ["points"]
seed: 12345
trainer:
  max_epochs: 3
  gradient_clip_val: 0.5
model:
  net:
    width: 8
''',
}  # fmt: skip

BY_HAND = """
import os

os.environ["PROJECT_ROOT"] = os.getcwd()
import hydra
import lightning as L

from lightning_fedscale import FederatedStrategy

with hydra.initialize(version_base="1.3", config_path="configs"):
    cfg = hydra.compose("train", overrides=["experiment=example"])
L.seed_everything(cfg.seed, workers=True)
data, model = hydra.utils.instantiate(cfg.data), hydra.utils.instantiate(cfg.model)
strategy = FederatedStrategy(num_clients=4, executor="sequential")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(max_epochs=3, gradient_clip_val=0.5, accelerator="cpu", devices=1, strategy=strategy, **quiet)
trainer.fit(model, datamodule=data)
print(repr(float(trainer.callback_metrics["train/loss"])))
"""

SEARCH = "hydra.searchpath=[pkg://lightning_fedscale.conf]"
FEDERATED = [SEARCH, "+trainer/strategy=federated"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    return tmp_path / "project"


def run(project: Path, *arguments: str, script: str = "src/train.py") -> subprocess.CompletedProcess[str]:
    """``python src/train.py`` with these arguments, as the project's user types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PROJECT_ROOT", None)
    # Such projects keep their network among the hyperparameters, which torch 2.6 refuses to load, whatever trains.
    environment["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return pythons.run(script, *arguments, environment=environment, folder=project)


def outputs(project: Path, kind: str) -> list[Path]:
    return sorted(path.parent for path in (project / "logs" / "train" / kind).rglob("train.log"))


def test_an_unmodified_project_becomes_federated(project: Path) -> None:
    arguments = ["experiment=example", "logger=[csv,tensorboard]", "trainer.strategy.executor=sequential"]
    done = run(
        project, *arguments, *FEDERATED, "trainer.strategy.num_clients=4", "callbacks=[default,compute_accounting]"
    )
    assert done.returncode == 0, done.stderr
    assert "Federated: 4 clients hold 160 samples (40 to 40 each)" in done.stderr + done.stdout
    (folder,) = outputs(project, "runs")
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    (ledger,) = folder.rglob("position.json")
    assert json.loads(ledger.read_text())["clients"] == 4
    assert json.loads(ledger.read_text())["samples"] == 3 * 160
    (table,) = folder.rglob("metrics.csv")
    assert "round/drift" in table.read_text().splitlines()[0]
    assert "test/acc" in done.stdout
    # As if the project's own script had named the strategy.
    (project / "by_hand.py").write_text(BY_HAND)
    by_hand = run(project, script="by_hand.py")
    assert by_hand.returncode == 0, by_hand.stderr
    column = read_csv(table)["train/loss"].dropna()
    assert len(column) == 3
    assert column.iloc[-1] == pytest.approx(float(by_hand.stdout.splitlines()[-1]), rel=1e-6)


def test_the_experiment_of_the_documentation(project: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "hydra.md").read_text("utf8")
    files = re.findall(r"```yaml\n# configs/(?:train|experiment/federated).yaml\n(.*?)```", page, re.S)
    search, experiment = files
    with (project / "configs/train.yaml").open("a") as file:
        file.write(search)
    (project / "configs/experiment/federated.yaml").write_text(experiment)
    done = run(project, "experiment=federated", "trainer.max_epochs=1", "trainer.strategy.num_clients=5")
    assert done.returncode == 0, done.stderr
    assert "Federated: 5 clients hold 160 samples" in done.stderr + done.stdout
    (ledger,) = outputs(project, "runs")[0].rglob("position.json")
    assert json.loads(ledger.read_text())["clients"] == 5


def test_parts_by_group_in_place_of_ddp(project: Path) -> None:
    done = run(
        project, "experiment=example", *FEDERATED, "trainer/strategy/partitioner=dirichlet",
        "trainer.strategy.num_clients=3", "trainer.strategy.partitioner.alpha=5.0", "+trainer.strategy.unknown=1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "unexpected keyword argument 'unknown'" in done.stderr
    done = run(
        project, "trainer=ddp", "trainer.max_epochs=1", *FEDERATED, "trainer/strategy/server_optimizer=fed_adam",
        "trainer/strategy/local_rule=fed_prox", "trainer.strategy.local_rule.mu=0.1", "trainer.strategy.num_clients=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 clients hold 160 samples" in done.stderr + done.stdout  # on two processes, as the project asks for


def test_multirun(project: Path) -> None:
    done = run(
        project, "-m", "experiment=example", *FEDERATED, "trainer.strategy.num_clients=1,2", "model.net.width=4,8",
        "trainer.max_epochs=1", "logger=csv", "callbacks=[default,compute_accounting]", "+optimized_metric=val/acc",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = outputs(project, "multiruns")
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    ledgers = [json.loads(next(folder.rglob("position.json")).read_text()) for folder in folders]
    assert [each["clients"] for each in ledgers] == [1, 1, 2, 2]
    assert ledgers[0]["params"] < ledgers[1]["params"]


def test_without_our_words_it_is_what_it_was(project: Path) -> None:
    done = run(project, "experiment=example", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert "Federated" not in done.stderr + done.stdout


def test_the_advice_at_the_end_can_be_followed(project: Path) -> None:
    """A module that is given its network has no argument for a size: the command is the project's own script."""
    arguments = ["trainer.max_epochs=1", "test=False", *FEDERATED, "callbacks=[default,compute_accounting]"]
    done = run(project, "logger=csv", "trainer.strategy.executor=sequential", *arguments)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    (line,) = [each.strip() for each in said.splitlines() if each.strip().startswith("python src/train.py")]
    command, _, law = line.partition(" && ")
    assert law == "fedscale fit fedscale_sweep --loss=val/loss"
    words = shlex.split(command)
    assert words[:3] == ["python", "src/train.py", "-m"]
    swept = dict(word.lstrip("+").split("=", 1) for word in words[3:])
    assert swept["model.net.width"] == "4,8,16,32,64"
    assert swept["trainer.strategy.num_clients"] == "1,4"
    assert swept["model.optimizer.lr"] == "0.005,0.01,0.02"
    # As printed, but one of each.
    one = [word if word.startswith(("hydra", "callbacks=")) else word.split(",")[0] for word in words[2:]]
    followed = run(project, *one)
    assert followed.returncode == 0, followed.stderr
    (ledger,) = (project / "fedscale_sweep").rglob("position.json")
    assert json.loads(ledger.read_text())["flops"] >= float(
        swept["callbacks.compute_accounting.max_flops"].split(",")[0]
    )
    row = read_runs(project / "fedscale_sweep", "val/loss").to_dict("records")[0]
    assert (row["clients"], row["learning_rate"]) == (1, 0.005)
