"""``fedscale size``: a whole study of a small project, as a newcomer types it."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, Partition, local_rules, server
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.callbacks.compute_accounting.study import STUDY_FILE
from lightning_fedscale.cli import main
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.study import METHODS, Answer, size, write
from lightning_fedscale.study import study as study_of_sizes
from lightning_fedscale.study.arguments import methods_of
from lightning_fedscale.study.methods import options_of
from lightning_fedscale.study.race import Job
from lightning_fedscale.study.settings import FED_AVG, Setting
from lightning_fedscale.study.trial import Project

HOSPITALS = Partition.from_lists([range(40), range(40, 100), range(100, 200)])


class Images(pl.LightningDataModule):
    """Labels of a teacher that no linear model can follow."""

    def __init__(self, batch_size: int = 10, noise: float = 0.0) -> None:
        super().__init__()
        self.batch_size = batch_size
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(400, 8, generator=draw)
        labels = (inputs[:, :4].prod(1) + noise * torch.randn(400, generator=draw) > 0).long()
        self.train, self.val = TensorDataset(inputs[:200], labels[:200]), TensorDataset(inputs[200:], labels[200:])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 200)


class Net(pl.LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum)


SMALL: dict[str, Any] = {
    "argument": "width", "sizes": [2, 8], "methods": [FED_AVG, "scaffold"], "batch_sizes": [10], "local_steps": [2],
    "rates": [1.0], "seeds": 2, "study_minutes": 60.0, "trainer": {"accelerator": "cpu"},
}  # fmt: skip


FLOPS = 1e5


def study(folder: Path, flops: float = FLOPS, **options: Any) -> Answer:
    return size(Net, Images, flops, folder=folder, **{"partition": HOSPITALS, **SMALL, **options})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    folder = tmp_path_factory.mktemp("study")
    return study(folder), folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that cost nothing: what they find is a formula."""

    def run(self: Project, job: Job, executor: str = "sequential", *, rounds: int = -1, **_: Any) -> dict[str, Any]:
        setting = job.setting
        options_of(self.methods[setting.method])
        flops = self.flops * job.share if rounds < 0 else rounds * 3000.0 * setting.size
        loss = 1 + math.log(setting.size / 5) ** 2 + math.log(setting.rate) ** 2 + 0.01 * job.seed + 1 / flops
        return {
            **setting._asdict(), "share": job.share, "seed": job.seed, "worst": 2.0, "params": 12.0 * setting.size,
            "loss": math.inf if setting.rate > 100 else loss, "flops": flops, "samples": flops / 60 / setting.size,
            "bytes": 1e3, "rounds": max(rounds, 5), "seconds": 0.1 + 1e-7 * flops, "executor": executor, "keeps": False,
        }  # fmt: skip

    monkeypatch.setattr(Project, "run", run)


@pytest.fixture
def first_trains(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every method, the first run trains or is refused; what the others find is a formula."""
    trained = Project.run
    request.getfixturevalue("quick")
    formula, seen = Project.run, set[str]()

    def run(self: Project, job: Job, *args: Any, **options: Any) -> dict[str, Any]:
        if job.setting.method not in seen:
            trained(self, job, *args, **options)
            seen.add(job.setting.method)
        return formula(self, job, *args, **options)

    monkeypatch.setattr(Project, "run", run)


def test_an_answer_has_all_that_was_asked(found: tuple[Answer, Path]) -> None:
    answer, folder = found
    assert answer.best.low <= answer.best.loss <= answer.best.high
    assert answer.best.seeds == 2
    assert {each.setting.size for each in answer.results} >= {2, 8}
    assert {each.setting.method for each in answer.results} >= {FED_AVG, "scaffold"}
    assert answer.current[0].setting.size == 8, "the argument's default"
    assert answer.current[0].setting.method == FED_AVG
    assert answer.best.worst > 0
    best = answer.best
    samples = best.rounds * 3 * best.setting.local_steps * best.setting.batch_size
    assert best.passes == pytest.approx(samples / 200, rel=0.05)
    assert best.most_passes == pytest.approx(samples / 3 / 40, rel=0.05)
    vectors = 2 if best.setting.method == "scaffold" else 1
    assert best.bytes == pytest.approx(2 * 4 * vectors * best.params * best.rounds, rel=0.02)
    assert json.loads((folder / "study.json").read_text())["fingerprint"] == HOSPITALS.fingerprint


def test_every_run_spends_its_share(found: tuple[Answer, Path]) -> None:
    """Of the same compute for every setting, to a round; the whole budget for what is compared."""
    import pandas as pd

    table = pd.read_csv(found[1] / "runs.csv")
    counted = table[table["share"] > 0]
    one_round = counted["flops"] / counted["rounds"]
    assert (counted["flops"] >= counted["share"] * FLOPS * 0.999).all()
    assert (counted["flops"] <= counted["share"] * FLOPS + one_round * 1.001).all()


def test_a_finished_study_runs_nothing_again(found: tuple[Answer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Project, "run", lambda *_, **__: pytest.fail("ran again"))
    assert study(found[1]) == found[0]


@pytest.mark.usefixtures("quick")
def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    """Every run that was over is kept, and the answer is that of a study that nobody interrupted."""
    whole, lines = study(tmp_path / "whole"), list[str]()

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 5:
            raise KeyboardInterrupt

    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        study(folder, say=interrupt)
    kept = (folder / "runs.csv").read_text()
    assert study(folder) == whole
    assert (folder / "runs.csv").read_text().startswith(kept)


def test_workers_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, or a pool of the user's; what one of them trains is what this one trains."""
    # Both are copies of one new process, which imports what each of them would import.
    multiprocessing.set_forkserver_preload(["lightning_fedscale.study"])
    monkeypatch.setattr(study_of_sizes, "get_context", lambda _: multiprocessing.get_context("forkserver"))
    options: dict[str, Any] = {"flops": 5e4, "sizes": [2, 4], "methods": [FED_AVG], "study_minutes": 0.01}
    one, two = study(tmp_path / "1", **options), study(tmp_path / "2", **options, workers=2)
    with ThreadPoolExecutor(1) as pool:
        three = study(tmp_path / "3", **options, pool=pool)
    losses = [{each.setting: each.loss for each in answer.results} for answer in (one, two, three)]
    for others in losses[1:]:
        both = losses[0].keys() & others.keys()
        assert both
        for each in both:
            assert losses[0][each] == pytest.approx(others[each], abs=1e-5)
    with pytest.raises(TypeError, match="pool=2: pass a concurrent"):
        study(tmp_path / "4", **options, pool=2)


def test_the_expression_trains_as_the_study_did(found: tuple[Answer, Path]) -> None:
    answer = found[0]
    strategy = eval(
        answer.strategy,
        {"FederatedStrategy": FederatedStrategy, "partition": HOSPITALS, "local_rules": local_rules, "server": server},
    )
    best = answer.best.setting
    torch.manual_seed(1)
    net = Net(best.size, 0.1 * best.rate)
    trainer = pl.Trainer(
        strategy=strategy, max_steps=round(answer.best.rounds), max_epochs=-1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(net, datamodule=Images(best.batch_size))
    images = Images()
    loss = nn.functional.cross_entropy(net.layers(images.val.tensors[0]), images.val.tensors[1]).item()
    assert answer.best.low - 0.05 < loss < answer.best.high + 0.05


def test_executors_train_alike(tmp_path: Path) -> None:
    project = Project(
        Net, Images, argument="width", partition=HOSPITALS, clients_per_round=2, methods={FED_AVG: {}}, flops=4e5,
        seed=0, loss=None, trainer={"accelerator": "cpu"},
    )  # fmt: skip
    job = Job(Setting(4, FED_AVG, 8, 3, 0.5), 1.0, 1)
    one, other = project.run(job, "sequential"), project.run(job, "vectorized")
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert one["samples"] == other["samples"]


@pytest.mark.usefixtures("quick")
def test_keeping_nothing_is_no_method(tmp_path: Path) -> None:
    """SGD without momentum has no state."""
    answer = study(tmp_path, methods=[FED_AVG, "kept_optimizer"])
    assert any("kept_optimizer was left out" in note for note in answer.notes)


@pytest.mark.usefixtures("first_trains")
def test_a_method_that_is_refused_takes_no_part(tmp_path: Path) -> None:
    """SCAFFOLD's option II is for plain SGD, and this has momentum."""
    second = {"_target_": "lightning_fedscale.local_rules.scaffold", "option": "II"}
    methods = {FED_AVG: {}, "second": {"local_rule": second}}
    options = {**SMALL, "partition": HOSPITALS, "sizes": [2, 4], "methods": methods, "study_minutes": 0.001}
    answer = size(Momentum, Images, 5e4, folder=tmp_path, **options)
    (note,) = (each for each in answer.notes if each.startswith("second"))
    assert note.startswith("second was left out: ")
    assert {each.setting.method for each in answer.results} == {FED_AVG}


class Momentum(Net):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width, momentum=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"argument": "depth"}, r"argument='depth': .*Net has no such argument.* width, lr, momentum"),
        ({"argument": "lr", "sizes": [1, 2]}, r"argument='lr': .* has 90 parameters both with 1 and with 2"),
        ({"sizes": []}, r"sizes=\[\]: .* or current="),
        ({"sizes": [0, 2]}, r"sizes=0"),
        ({"flops": 10.0}, r"flops=10: this budget allows \S+ rounds of the smallest model"),
        ({"flops": -1.0}, r"flops=-1.0: pass a finite number above 0"),
        ({"seeds": 1}, r"seeds=1"),
        ({"methods": ["scafold"]}, r"methods='scafold'"),
        ({"methods": []}, r"methods=\[\]: "),
        ({"rates": [0.0]}, r"rates=0.0: pass a finite number above 0"),
        ({"rates": []}, r"rates=\[\]: "),
        ({"study_minutes": 0}, r"study_minutes=0: pass a finite number above 0"),
        ({"study_flops": -1e9}, r"study_flops=-1000000000.0: pass a finite number above 0"),
        ({"partition": Partition.from_lists([[0, 999]])}, r"999"),
        ({"partition": "nowhere.json"}, r"nowhere.json"),
        ({"loss": "lost"}, r"loss='lost': validation_step logs val_loss"),
        ({"current": 0}, r"current=0"),
        ({"clients_per_round": 5}, r"clients_per_round=5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        study(tmp_path, **options)


@pytest.mark.usefixtures("quick")
def test_a_study_of_one_client_is_a_study(tmp_path: Path) -> None:
    answer = study(tmp_path, partition="iid", clients=1)
    assert answer.clients == 1


@pytest.mark.usefixtures("quick")
def test_a_study_leaves_the_callers_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    study(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("quick")
def test_what_there_was_no_time_for_is_told(tmp_path: Path) -> None:
    """Also a present model of which the budget pays too few rounds."""
    notes = study(tmp_path / "short", sizes=[2, 4, 8, 16], study_minutes=1e-3).notes
    assert any(note.startswith("there was no time to train width ") for note in notes)
    notes = study(tmp_path / "large", current=1000).notes
    assert "width 1000 was left out: the budget allows too few rounds of it" in notes


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_study_stays_in_its_compute(tmp_path: Path, workers: int) -> None:
    """Also where there is much more time than that; and it takes most of it."""
    said = list[str]()
    options: dict[str, Any] = {"sizes": [2, 4, 8, 16], "rates": [0.5, 1.0, 2.0], "local_steps": [1, 2, 4]}
    with ThreadPoolExecutor(1) as pool:
        options |= {"workers": workers, "pool": pool}
        answer = study(tmp_path, study_flops=30 * FLOPS, say=said.append, **options)
    spent = float(pd.read_csv(tmp_path / "runs.csv")["flops"].sum())
    assert answer.study_flops == spent
    assert 20 * FLOPS < spent <= 30 * FLOPS
    told = re.search(r"([\d.]+) minutes, (\S+) FLOPs", said[0])
    assert told is not None
    assert float(told[1]) < 1
    assert float(told[2]) <= 30 * FLOPS


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("flops", "stages"),
    [(FLOPS, "1/3 of the budget, and the best of these with all of it"), (0.3 * FLOPS, "all of the budget")],
)
def test_a_study_says_first_what_it_trains_with_how_much(tmp_path: Path, flops: float, stages: str) -> None:
    said = list[str]()
    study(tmp_path, flops, say=said.append)
    assert said[0].startswith("About ")
    assert said[0].endswith(f"settings train with {stages}.")


@pytest.mark.usefixtures("quick")
def test_all_that_diverges_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every setting diverged at the full budget: pass smaller rates"):
        study(tmp_path, rates=[1e30])


def test_a_run_that_diverges_is_infinite(tmp_path: Path) -> None:
    project = Project(
        Net, Images, argument="width", partition=HOSPITALS, clients_per_round=None, methods={FED_AVG: {}}, flops=5e4,
        seed=0, loss=None, trainer={"accelerator": "cpu"},
    )  # fmt: skip
    assert project.run(Job(Setting(4, FED_AVG, 10, 2, 1e30), 1.0, 0))["loss"] == math.inf


@pytest.mark.usefixtures("quick")
def test_the_best_is_found_beyond_what_was_named(tmp_path: Path) -> None:
    """Of a formula whose best size, 5, and rate, 1, lie between those that were named; rates go by factors of two."""
    answer = study(tmp_path, rates=[0.25, 4.0])
    assert answer.best.setting.size in (4, 5, 6)
    assert 2**-0.5 < answer.best.setting.rate < 2**0.5


def test_another_study_is_not_mixed_in(found: tuple[Answer, Path]) -> None:
    with pytest.raises(ValueError, match=r"holds another study \(flops 100000.0 there and 300000.0 here\)"):
        study(found[1], flops=3e5)


# ---- the command


FEW = ["--study-minutes", "0.01"]  # as few runs as a study can have


def typed(folder: Path, *more: str) -> list[str]:
    HOSPITALS.save(folder / "hospitals.json")
    return [
        "size", "--module", f"{__name__}.Net", "--data", f"{__name__}.Images", "--argument", "width", "--current", "4",
        "--partition", str(folder / "hospitals.json"), "--flops", "3e5", "--study-minutes", "60", "--sizes", "[2, 4]",
        "--methods", "[fed_avg]", "--batch_sizes", "[10]", "--local_steps", "[2]", "--rates", "[1]", "--seeds", "2",
        "--accelerator", "cpu", "--runs", str(folder / "runs"), "--output", str(folder), *more,
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed(tmp_path, "--module.lr=0.2", "--data.noise", "0.1")) == 0
    out, err = capsys.readouterr()
    assert err.startswith("About ")
    assert "minutes" in err.splitlines()[0]
    assert "FLOPs" in err.splitlines()[0]
    assert "Best setting: width " in out
    assert "Train with: FederatedStrategy(num_clients=3, partitioner=" in out
    assert (tmp_path / "size.png").stat().st_size > 1000
    page = (tmp_path / "size.md").read_text()
    assert "| width | Method |" in page
    assert "Intervals are 95 % intervals over seeds" in page
    assert json.loads((tmp_path / "size.json").read_text())["best"]["method"] == FED_AVG
    assert main(typed(tmp_path, "--module.lr=0.2", "--data.noise", "0.1", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["argument"] == "width"
    assert main(typed(tmp_path)) == 1, "with other arguments of the module it is another study"
    assert "holds another study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--module.depth=3"], "has no argument depth. Pass one of width, lr, momentum"),
        (
            ["--strategy.compresor=qsgd"],
            "strategy: FederatedStrategy has no argument 'compresor'. Did you mean 'comp",
        ),
        (["--strategy.local_steps=3"], "strategy: local_steps=3 cannot be set here"),
        (["--data", "nowhere.Data"], "data='nowhere.Data': cannot be imported"),
        (["--data", "os.path"], "Pass a class or a function that makes it"),
        (["--data.batch_size=0"], "Images.train_dataloader: batch_size should be a positive integer"),
        (
            ["--partition", "nowhere.json"],
            "partitioner='nowhere.json': the file cannot be read: No such",
        ),
    ],
)
def test_wrong_words_are_told(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed(tmp_path, *more)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedscale size: ")
    assert said in line


@pytest.mark.usefixtures("first_trains")
def test_methods_share_what_the_strategy_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--strategy.compressor=qsgd", "--strategy.client_optimizer", "keep"]
    assert main(typed(tmp_path, *given, "--json", *FEW)) == 0
    answer = json.loads(capsys.readouterr().out)
    for rules in answer["study"]["methods"].values():
        assert rules["compressor"].startswith("qsgd")
        assert rules["client_optimizer"] == "keep"
    assert "compressor='qsgd'" in answer["strategy"]


def test_what_methods_share_is_used() -> None:
    job = Job(Setting(8, FED_AVG, 10, 2, 1.0), 1.0, 0)
    one, other = (
        Project(
            Net, Images, argument="width", partition=HOSPITALS, clients_per_round=None,
            methods=methods_of([FED_AVG], each), flops=FLOPS, seed=0, loss=None, trainer={"accelerator": "cpu"},
        ).run(job)["bytes"]
        for each in (None, {"compressor": "qsgd"})
    )  # fmt: skip
    assert other < 0.75 * one  # the way down is not compressed


# ---- a run that was studied


def counted(
    answer: Answer, folder: Path, size: int = 8, flops: float = FLOPS, more: Sequence[pl.Callback] = (), **options: Any
) -> ComputeAccounting:
    """Train as a user does who has a study's numbers beside the run."""
    write(answer, folder)
    accounting = ComputeAccounting(max_flops=flops, study=folder / STUDY_FILE)
    strategy = FederatedStrategy(**{"partitioner": HOSPITALS, "local_epochs": None, "local_steps": 2, **options})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, strategy=strategy, callbacks=[*more, accounting], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(size), datamodule=Images())
    return accounting


def test_a_run_is_told_what_its_study_measured(
    found: tuple[Answer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, _ = found
    for width, method in ((8, FED_AVG), (2, "scaffold")):
        own = [each for each in answer.results if each.setting[:2] == (width, method)]
        measured = counted(answer, tmp_path, width, **options_of(METHODS[method])).measured
        assert measured is not None
        assert measured.best["loss"] == answer.best.loss
        assert (measured.here is None) == (not own)
        if measured.here is not None:
            assert measured.here["behind"] == own[0].behind
        said = " ".join(capsys.readouterr().out.split())
        assert f"width {answer.best.setting.size}" in said
        assert answer.best.setting.method in said
        assert "with fedscale sweep" not in said
        assert "fit one" not in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"partitioner": Partition.from_lists([range(100), range(100, 200)])}, "another partition"),
        ({"clients_per_round": 2}, "3 clients per round"),
        ({"flops": FLOPS / 4}, "FLOPs"),
        ({"local_rule": local_rules.fed_prox(mu=7.0)}, "method"),
        ({"size": 5}, "parameters"),
    ],
)
def test_a_study_of_something_else_says_nothing(
    options: dict[str, Any], reason: str, found: tuple[Answer, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert counted(found[0], tmp_path, **options).measured is None
    assert "does not apply to this run" in caplog.text
    assert reason in caplog.text


class Spoils(pl.Callback):
    """Takes the study away while a run goes on, or edits it."""

    def __init__(self, path: Path, text: str | None) -> None:
        self.path, self.text = path, text

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.unlink()
        if self.text is not None:
            self.path.write_text(self.text, encoding="utf-8")


@pytest.mark.parametrize("text", [None, "{", '{"study": {}}'])
def test_a_study_that_is_gone_ends_no_training(
    text: str | None, found: tuple[Answer, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    accounting = counted(found[0], tmp_path, more=[Spoils(tmp_path / STUDY_FILE, text)])
    assert accounting.ledger.training_flops > 0
    assert accounting.measured is None
    assert "does not apply to this run: it cannot be read" in caplog.text


EVEN = torch.ones(3)


class Weighted(Net):
    """With a default that has no one truth."""

    def __init__(self, width: int = 8, weights: Any = EVEN) -> None:
        super().__init__(width)
        self.save_hyperparameters()


def test_defaults_that_are_arrays_end_no_training(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, strategy=FederatedStrategy(num_clients=2), logger=False,
        callbacks=[ComputeAccounting()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Weighted(4, weights=2.0), datamodule=Images())
    assert "--module.weights=2.0" in caplog.text


def test_only_a_file_that_was_named_must_be_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for held in ("[1, 2]", "{", '{"size": 3}', '{"study": 1, "results": 1, "best": 1, "flops": 1, "argument": 1}'):
        Path(STUDY_FILE).write_text(held, encoding="utf-8")
        assert ComputeAccounting().measured is None
        with pytest.raises(ValueError, match=r"study='size\.json'"):
            ComputeAccounting(study=STUDY_FILE)
    with pytest.raises(TypeError, match="study=3"):
        ComputeAccounting(study=3)  # type: ignore[arg-type]


# ---- the advice at the end of a run that was not studied


class Kept(Net):
    """Remembers its arguments, as modules with ``save_hyperparameters`` do."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.save_hyperparameters()


@pytest.mark.usefixtures("first_trains")
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"num_clients": 3}, ["--clients 3"]),
        ({"num_clients": 4, "clients_per_round": 2, "partitioner": "dirichlet"},
         ["--partition dirichlet", "--clients 4", "--clients_per_round 2"]),
        ({"partitioner": "three.json"}, ["--partition three.json"]),
        ({"partitioner": HOSPITALS}, ["--partition clients.json"]),
        ({"partitioner": DirichletPartitioner(3, alpha=9.0, min_partition_size=1)}, ["--partition clients.json"]),
    ],
)  # fmt: skip
def test_a_run_that_nothing_is_known_of_names_the_study_to_make(
    options: dict[str, Any], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    HOSPITALS.save("three.json")
    strategy = FederatedStrategy(**{"local_epochs": None, "local_steps": 2, **options})
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, strategy=strategy, callbacks=[ComputeAccounting()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        trainer.fit(Kept(4, lr=0.05), datamodule=Images())
    (line,) = (each.strip() for each in caplog.text.splitlines() if each.strip().startswith("fedscale size"))
    for flag in [*flags, "--argument width", "--current 4", "--module.lr=0.05"]:
        assert flag in line
    if "clients.json" in line:  # which the advice explains
        assert "clients.json is what trainer.strategy.partition.save('clients.json') writes" in caplog.text
        assert strategy.partition is not None
        strategy.partition.save("clients.json")
    few = "--study-minutes 0.01 --seeds 2 --sizes [2,4] --methods [fed_avg] --batch-sizes [10] --local-steps [2]"
    asked = shlex.split(re.sub(r"--flops \S+", "--flops 1e5", line))[1:]
    assert main([*asked, *few.split(), "--rates", "[1.0]", "--accelerator", "cpu"]) == 0
    assert Path("size.json").is_file()
