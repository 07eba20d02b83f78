"""What `ComputeAccounting` draws, seen in TensorBoard in a real browser."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase
from lightning_fedscale.scaling import Rosenfeld
from tests.browser import MISSING, Browser, wait
from tests.dist.processes import free_port
from tests.features.test_compute_accounting import Net, data, trainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard over a run with two callbacks that lay out charts."""
    folder, port = tmp_path_factory.mktemp("logs"), free_port()
    accounting = ComputeAccounting(law=Rosenfeld(E=0.6, A=3.0, B=8.0, alpha=0.4, beta=0.35))
    run = trainer(
        CriticalPhase(action="observe"), accounting, max_epochs=25, logger=TensorBoardLogger(folder, name="run"),
        strategy=FederatedStrategy(num_clients=7, executor="sequential"),
    )  # fmt: skip
    run.fit(Net(), data(200))
    command = ["-m", "tensorboard.main", "--logdir", folder, "--port", port, "--host", "127.0.0.1", "--load_fast=false"]
    with (folder / "output.txt").open("wb") as output:
        board = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=output)
    try:
        wait(lambda: DIRECT.open(f"http://127.0.0.1:{port}/data/runs", timeout=5).status == 200)
        yield f"http://127.0.0.1:{port}/"
    finally:
        board.terminate()
        board.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser"), (1400, 1500)) as browser:
        yield browser


def colours(browser: Browser, path: Path) -> Any:
    """The screenshot, as numbers."""
    browser.screenshot(path)
    return matplotlib.image.imread(path)


def test_loss_against_compute_lies_over_the_predicted_optimum(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(f"{address}#scalars&tagFilter=loss_by")
    wait(lambda: "compute/loss_by_" in browser.text() and browser.count(".line-plot") > 1)
    text = browser.text()
    assert "run/version_0" in text
    assert "run/version_0/predicted_optimal" in text
    assert colours(browser, tmp_path / "loss.png").std() > 0.1


def test_both_callbacks_have_their_charts_and_the_margin_is_drawn(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    browser.open(f"{address}#custom_scalars")
    wait(lambda: "parameters in the optimal band" in browser.text())
    wait(lambda: browser.count("path.area") == 1)  # the band; where steps do not match, TensorBoard draws none
    text = browser.text()
    for title in ("ComputeAccounting", "CriticalPhase", "loss against compute", "size ratio", "gradient norm"):
        assert title in text
    assert "do not match" not in text
    assert colours(browser, tmp_path / "charts.png").std() > 0.1


def test_the_figure_is_there(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(f"{address}#images")
    wait(lambda: "compute/position" in browser.text() and browser.count("img") >= 2)
    assert colours(browser, tmp_path / "position.png").std() > 0.1
