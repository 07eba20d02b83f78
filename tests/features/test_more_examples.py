"""The examples of composed methods, run as a user would: the facts that they print would change if a part broke."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.image import imread

from tests.features.test_examples import cells, number, run_example

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_examples_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))


def test_examples_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("[0-9]*.py")}
    assert lines.pop("02_existing_project.py") <= 90  # A whole project, before and after.
    assert max(lines.values()) <= 60


def assert_figure(name: str) -> None:
    assert min(imread(Path("demo_output", name)).shape[:2]) > 500


def test_robust_rules_bear_an_attack_that_ruins_the_mean() -> None:
    rows = cells(run_example("08_robust_training.py", "--fast"))
    found = {name: [number(cell) for cell in row] for name, row in rows.items() if name}
    assert found["mean"][0] > 85
    assert found["mean"][1] < 40
    assert len(found) == 6
    for name in found.keys() - {"mean"}:
        assert found[name][1] > found[name][0] - 5  # 3 in the full run, see tests/features/test_robust.py
    for before, after, worst_before, worst_after in found.values():
        assert worst_before < before
        assert worst_after < after
    assert_figure("robust_training.png")


def test_private_training_ends_before_its_budget_is_exceeded() -> None:
    printed = run_example("09_private_training.py", "--fast")
    found = re.search(r"at most (\d+) rounds, and epsilon at most ([\d.]+)", printed)
    assert found is not None
    rounds, budget = int(found[1]), float(found[2])
    rows = cells(printed)
    assert rows["no privacy"][:2] == [str(rounds), "none"]
    (little_rounds, little_spent, _), (much_rounds, much_spent, _) = rows["noise 0.8"], rows["noise 1.5"]
    assert 1 < int(little_rounds) < rounds  # It was ended by its budget,
    assert 0.5 * budget < float(little_spent) <= budget  # of which most is spent.
    assert int(much_rounds) == rounds
    assert 0 < float(much_spent) < float(little_spent)
    assert number(rows["no privacy"][2]) > 60  # Ten digits: chance is 10.
    assert_figure("private_training.png")


def test_heterogeneous_clients_send_less_and_scaffold_learns_more() -> None:
    rows = cells(run_example("10_heterogeneous_clients.py", "--fast"))
    plain, scaffold, sparse, both = (
        number(rows[name][0]) for name in ("FedAvg", "SCAFFOLD", "FedAvg, top-k", "SCAFFOLD, top-k")
    )
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    assert plain == round(10 * 10 * parameters * 4 / 1e6, 3)
    assert abs(scaffold - 2 * plain) < 0.002  # The control variate is as large as the update,
    assert abs(both - (plain + sparse)) < 0.002  # and only the update is compressed.
    assert sparse < plain / 10
    assert number(rows["SCAFFOLD"][1]) > number(rows["FedAvg"][1])
    assert number(rows["SCAFFOLD, top-k"][1]) > number(rows["FedAvg, top-k"][1])
    assert_figure("heterogeneous_clients.png")


def test_diloco_on_two_processes_exchanges_rarely() -> None:
    printed = run_example("11_diloco.py", "--fast")
    assert printed.count("Figure: ") == 1  # One of the processes reports.
    rows = cells(printed)
    exchanges = {name: int(row[0]) for name, row in rows.items() if name}
    assert exchanges == {"data parallel": 40, "DiLoCo, 5 local steps": 8, "DiLoCo, 20 local steps": 2}
    for name in exchanges:
        assert rows[name][1] == "0 and 1"
        assert float(rows[name][2]) < 2  # At first it is ln 10 = 2.3.
    assert_figure("diloco.png")


def test_phases_drive_messages_and_local_steps() -> None:
    rows = cells(run_example("12_phase_driven_compression.py", "--fast"))
    much, driven, little = rows["much"], rows["by phase"], rows["little"]
    critical, rounds = map(int, driven[0].split(" of "))
    assert 0 < critical < rounds
    assert int(driven[1]) == 5 * critical + 10 * (rounds - critical)
    large, small = number(driven[2]), number(driven[3])
    parameters = 64 * 128 + 128 + 128 * 10 + 10
    place = (parameters - 1).bit_length()
    for share, size in ((0.2, large), (0.01, small)):
        kept = share * parameters * (32 + place) / 8
        assert abs(size - kept) < 0.01 * kept + 8
    assert number(little[4]) < number(driven[4]) < number(much[4])
    assert_figure("phase_driven_compression.png")


def test_a_study_answers_and_leaves_its_page() -> None:
    printed = run_example("13_size.py", "--fast")
    assert printed.startswith("About ")
    assert re.search(r"^Best setting: width \d+ ", printed, re.M)
    assert re.search(r"^Train with: FederatedStrategy\(num_clients=8, ", printed, re.M)
    assert "| width |" in Path("size_study", "size.md").read_text()
    assert min(imread(Path("size_study", "size.png")).shape[:2]) > 500
