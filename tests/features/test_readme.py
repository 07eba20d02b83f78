"""README.md is short, what it shows can be typed, and what it says of a position is what the code says."""

from __future__ import annotations

import re

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.features import executed
from tests.features.test_docs import tool

README = executed.ROOT / "README.md"
TEXT = README.read_text("utf8")


def test_it_is_read_in_a_few_minutes() -> None:
    assert len(TEXT.splitlines()) <= 120
    assert len(TEXT.split()) <= 900


def test_its_code_runs_from_top_to_bottom() -> None:
    trained: list[int] = []
    names = executed.project(trained, max_epochs=2)
    executed.execute(README, names)
    # Two rounds of a hundred clients, two of ten with all callbacks.
    assert trained == [2, 2]
    assert names["trainer"].strategy.num_clients == 100
    assert names["callbacks"][0].result.max_batch > 0
    assert names["callbacks"][2].ledger.training_flops > 0


def test_it_begins_with_the_code_and_has_the_two_commands() -> None:
    assert TEXT.index("strategy=FederatedStrategy(") < TEXT.index("\n## ")
    assert TEXT.index("docs/pictures/position.png") < TEXT.index("\n## ")
    assert re.findall(r"^make (\w+)", TEXT, re.M) == ["demo", "test"]
    targets = re.findall(r"^(\w+):", (executed.ROOT / "Makefile").read_text("utf8"), re.M)
    assert set(re.findall(r"\bmake (\w+)", TEXT)) <= set(targets)
    assert re.findall(r"^## (.*)$", TEXT, re.M)[-1] == "Contributing"


def test_its_position_is_that_of_the_code() -> None:
    position = tool("position")
    said = re.search(r'"([^"]* too large for 10 clients [^"]*)"', TEXT)
    assert said is not None
    assert " ".join(said[1].split()) == position.POSITION.sentences()
    with Image.open(position.PICTURE) as picture:
        assert isinstance(picture, PngImageFile)
        assert picture.text["Description"] == position.POSITION.sentences(), "python docs/position.py"
    here = position.POSITION
    assert (here.params, here.flops, here.clients, here.rho, here.law) == (1e9, 1e20, 10, 1.0, "Chinchilla")
