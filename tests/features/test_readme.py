"""What the README shows can be typed."""

from __future__ import annotations

import re

import lightning_fedscale
from tests.features import executed
from tests.laws import reference

README = executed.ROOT / "README.md"


def test_its_code_runs_from_top_to_bottom() -> None:
    trained: list[int] = []
    names = executed.project(trained, max_epochs=2)
    executed.execute(README, names)
    assert len(executed.blocks(README)) >= 3
    # Two rounds with a hundred clients, two with a probe before them; the others train without clients.
    assert trained[:2] == [2, 2]
    assert len(trained) == 6
    assert names["probe"].result.device_classes.keys() == {"phone", "jetson", "t4"}
    assert names["model"].best_batch(clients=4, local_steps=5) == 89


def test_its_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text("utf8"))
    assert len(pictures) == 5
    assert all((README.parent / picture).stat().st_size > 10_000 for picture in pictures)


def test_every_promised_metric_is_logged_and_no_other() -> None:
    text = README.read_text("utf8")
    sentence = re.search(r"Every round logs (.*?), whatever", text, re.S)
    assert sentence is not None
    promised = {name.removeprefix("round/") for name in re.findall(r"`([\w/]+)`", sentence[1])}
    run = reference.quiet_trainer(max_epochs=1, strategy=lightning_fedscale.FederatedStrategy())
    run.fit(reference.make_module(), reference.loader(reference.dataset()))
    assert promised == {name.removeprefix("round/") for name in run.strategy.last_round.metrics()}  # type: ignore[attr-defined]
