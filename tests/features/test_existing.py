"""Other people's projects, unmodified, from their own environments; and what they showed, reproduced without them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections import UserDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import CriticalPhase
from tests import pythons

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "existing"


def python_with(project: str, package: str) -> str:
    """A Python that has the project: that of `make existing`, or this one."""
    own = ROOT / ".existing" / project
    if (own / ".installed").exists():
        return str(own / "bin" / "python")
    if find_spec(package) is None:
        pytest.skip(f"{project} is not installed; `make existing` does it")
    return sys.executable


def results(python: str, script: str) -> dict[str, tuple[float, float]]:
    """What a script printed under ``--fast``: by name, central and federated; seconds are nobody's business."""
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(Path.cwd()), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPTS / script), "--fast"]
    if python == sys.executable:
        done = pythons.run(*command, environment=environment)
    else:
        done = subprocess.run([python, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Path("printed.txt").write_text(done.stdout)
    found = re.findall(r"^  (.*): (\S+) central, (\S+) federated$", done.stdout, re.MULTILINE)
    return {name: (float(central), float(federated)) for name, central, federated in found if name != "seconds"}


@pytest.mark.slow
def test_forecasting() -> None:
    found = results(python_with("pytorch-forecasting", "pytorch_forecasting"), "forecasting.py")
    assert max(found["quantile loss of the forecasts"]) < 1.0


def assert_nothing_differs(printed: str, models: int = 1) -> None:
    """Callbacks, an interruption and a second process changed nothing that a float64 shows."""
    lines = ("callbacks instead of none", "interrupted and resumed", "two processes instead of one")
    for line in lines:
        found = re.findall(rf"^  {line}: weights differ by (\S+)$", printed, re.MULTILINE)
        assert len(found) == models
        assert max(map(float, found)) <= (1e-5 if line == lines[2] else 0.0)
    found = re.findall(r"^  largest batch: \S+; FLOPs: (\S+)$", printed, re.MULTILINE)
    assert len(found) == models
    assert min(map(float, found)) > 0


@pytest.mark.slow
def test_global_forecasts() -> None:
    found = results(python_with("darts", "darts"), "global_forecasts.py")
    assert max(max(errors) for errors in found.values()) < 1.2  # that of repeating the last value is 0.85
    assert max(found["MAE of the forecasts, N-BEATS"]) < found["MAE of repeating the last value"][0]
    printed = Path("printed.txt").read_text()
    assert_nothing_differs(printed, models=2)
    assert printed.count("; clients evaluated: 20") == 2
    errors = re.findall(r"MAE of (\S+) after one process, (\S+) after two", printed)
    assert all(float(one) == pytest.approx(float(two), rel=1e-3) for one, two in errors)


@pytest.mark.slow
def test_tables() -> None:
    found = results(python_with("pytorch-tabular", "pytorch_tabular"), "tables.py")
    assert found["accuracy on held-out rows, %"][0] > 35  # of four classes
    printed = Path("printed.txt").read_text()
    assert_nothing_differs(printed)
    assert "; clients evaluated: 10" in printed


@pytest.mark.slow
def test_molecules() -> None:
    found = results(python_with("chemprop", "chemprop"), "molecules.py")
    (central, federated), (guess, _) = found["MAE in square angstroms"], found["MAE of the mean area"]
    assert central < guess
    assert federated < 1.1 * guess  # two rounds


@pytest.mark.slow
def test_single_cells() -> None:
    found = results(python_with("scvi-tools", "scvi"), "single_cells.py")
    assert min(found["types told from 5 neighbours in latent space, %"]) > 60  # by chance at most 30


@pytest.mark.slow
def test_lightning_demos() -> None:
    found = results(sys.executable, "lightning_demos.py")
    assert max(found["bits per held-out word"]) < 0.8 * min(found["bits before training"])
    lines = Path("printed.txt").read_text().splitlines()
    trained = [line for line in lines if ": trained, loss" in line]
    refused = [line for line in lines if ": refused, train_dataloader: " in line]
    assert (len(trained), len(refused)) == (4, 3)
    assert "batch_sampler=SequenceSampler has no sampler" in refused[-1]


def assert_checked(samples: int) -> str:
    """What `checks.check` printed is as it should be; returns it."""
    printed = Path("printed.txt").read_text()
    for how in ("central", "federated"):
        assert f"{how}, MaxBatchProbe: a batch of " in printed
        assert f"{how}, CriticalPhase: " in printed
        assert f"{how}, ComputeAccounting: " in printed
        assert "nothing was probed" not in printed
        counted, flops = re.findall(rf"^  {how}: (\S+) samples, .* (\S+) FLOPs$", printed, re.MULTILINE)[0]
        assert float(counted.replace(",", "")) == 2 * samples  # passes
        assert float(flops) > 0
    assert "callbacks instead of none: weights differ by 0\n" in printed
    assert "interrupted and resumed: weights differ by 0\n" in printed
    assert float(re.findall(r"^  two processes: weights differ by (\S+)$", printed, re.MULTILINE)[0]) < 1e-6
    assert "two processes, central: larger batches, so weights differ by " in printed
    return printed


@pytest.mark.slow
def test_graphs() -> None:
    found = results(python_with("torch-geometric", "torch_geometric"), "graphs.py")
    assert found["kinds of held-out graphs told, %"][0] > 40  # by chance 33
    assert_checked(1200)


@pytest.mark.slow
def test_adapters() -> None:
    found = results(python_with("peft", "peft"), "adapters.py")
    assert max(found["bits per held-out word"]) < min(found["bits before training"])
    printed = assert_checked(1397)
    assert "No position: " in printed
    assert "of the parameters are frozen" in printed
    merged = re.findall(r"adapters merged into the model: logits differ by (\S+)$", printed, re.MULTILINE)
    assert float(merged[0]) < 1e-5


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_the_projects_are_unmodified(script: str) -> None:
    """No class of theirs is derived from but Lightning's module, and nothing of theirs is assigned to."""
    for node in ast.walk(ast.parse((SCRIPTS / script).read_text())):
        if isinstance(node, ast.ClassDef):
            assert [ast.unparse(base) for base in node.bases] == ["pl.LightningModule"]
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                assert own or not isinstance(target, ast.Attribute) or ast.unparse(target) in ALLOWED


ALLOWED = {
    "scvi.settings.verbosity",  # a setting of theirs, made for it
    "words.pre_tokenizer",  # likewise, of tokenizers
    "handler.emit",  # Python's
}


def test_metrics_added_up_in_inference_mode_and_settings_of_the_loss_that_change_by_epoch() -> None:
    """As scvi-tools logs: sums kept as metrics and updated under `inference_mode`, a weight by the current epoch."""

    class Annealed(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()
            self.weights: set[float] = set()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            weight = min(1.0, self.current_epoch / 2)
            self.weights.add(weight)
            loss = self.step(batch)
            self.note(loss, len(batch))
            self.log("weight", weight, on_step=True, on_epoch=False)
            return loss * (1 + weight)

        @torch.inference_mode()
        def note(self, loss: torch.Tensor, samples: int) -> None:
            self.mean.update(loss)
            self.log("mean", self.mean, on_step=False, on_epoch=True, batch_size=samples, sync_dist=True)

    module = Annealed()
    trainer = Trainer(
        strategy=FederatedStrategy(num_clients=4),
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    assert module.weights == {0.0, 0.5, 1.0}
    assert isinstance(trainer.strategy, FederatedStrategy)
    assert trainer.strategy.last_round is not None
    assert 2 * trainer.callback_metrics["mean"].item() == pytest.approx(trainer.strategy.last_round.loss, rel=1e-5)


class Encoding(UserDict[str, torch.Tensor]):
    """As transformers' collators make batches: no dict, and opened as one by the module."""


@pytest.mark.parametrize("federated", [False, True])
def test_noise_is_measured_on_batches_in_classes_of_their_own(federated: bool) -> None:
    """As `BatchEncoding`: a batch that is no dict is cut into halves in its own type, and they are those of a dict."""

    class Opens(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            kinds.add(type(batch))
            return self.step(batch["x"])

    def collate(rows: list[torch.Tensor]) -> Any:
        return kind(x=torch.stack(rows))

    found = {}
    for kind in (dict, Encoding):
        kinds: set[type] = set()
        seed_everything(0, verbose=False)
        phase = CriticalPhase(noise_every=1)
        trainer = Trainer(
            strategy=FederatedStrategy(num_clients=4) if federated else "auto",
            max_epochs=6,
            callbacks=[phase],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "CriticalPhase: the noise")
            trainer.fit(Opens(), DataLoader(RandomDataset(32, 64), batch_size=8, collate_fn=collate))
        assert kinds == {kind}
        found[kind] = phase.sampling_noise
    assert found[dict].estimates > 1
    assert repr(found[dict]) == repr(found[Encoding])
