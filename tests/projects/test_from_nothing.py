"""A newcomer's first five minutes, by each way in."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from tests.browser import MISSING
from tests.projects import from_nothing


@pytest.mark.slow
@pytest.mark.parametrize("way", from_nothing.WAYS)
def test_from_an_empty_folder_to_a_report(way: str) -> None:
    if way == "hydra":
        pytest.importorskip("tests.features.test_hydra_template", reason="the template project is not here")
    pytest.importorskip("lightning_fedscale.cli.report", reason="there is no fedscale report here")
    found = from_nothing.go(way, Path.cwd() / way)
    assert found["federated"] > 0.6
    assert found["central"] > 0.6
    assert found["position"]
    page = Path(way, "report.html").read_text("utf8")
    assert "round/loss" in page
    if not MISSING:
        assert matplotlib.image.imread(Path(way, "tensorboard.png")).std() > 0.05
