"""What runs show in TensorBoard, and their reports, seen in a real browser."""

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
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.cli.run_page import read_run, write_page
from lightning_fedscale.scaling import Rosenfeld
from tests.browser import MISSING, Browser, wait
from tests.dist.processes import free_port
from tests.features.test_compute_accounting import Net, data, trainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """TensorBoard over a run with the callbacks that lay out charts."""
    folder, port = tmp_path_factory.mktemp("logs"), free_port()
    accounting = ComputeAccounting(law=Rosenfeld(E=0.05, A=0.3, B=0.8, alpha=0.4, beta=0.35))
    run = trainer(
        MaxBatchProbe(budget="1GiB", apply=False), CriticalPhase(action="observe"), accounting, ClientMetrics(),
        max_epochs=25,
        logger=TensorBoardLogger(folder, name="run"), strategy=FederatedStrategy(num_clients=7, executor="sequential"),
    )  # fmt: skip
    run.fit(Net(), data(200), data(50))
    write_page(read_run(folder / "run"), folder / "report.html")
    command = ["-m", "tensorboard.main", "--logdir", folder, "--port", port, "--host", "127.0.0.1", "--load_fast=false"]
    with (folder / "output.txt").open("wb") as output:
        board = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=output)
    try:
        wait(lambda: DIRECT.open(f"http://127.0.0.1:{port}/data/runs").status == 200, board)
        yield f"http://127.0.0.1:{port}/", folder / "report.html"
    finally:
        board.terminate()
        board.wait()


@pytest.fixture
def address(shown: tuple[str, Path]) -> str:
    return shown[0]


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


def test_rounds_and_callbacks_have_their_charts_and_the_margin_is_drawn(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    browser.open(f"{address}#custom_scalars")
    wait(lambda: "parameters in the optimal band" in browser.text())
    wait(
        lambda: browser.count("path.area") == 2
    )  # the band, and the spread of clients; where steps do not match, TensorBoard draws none
    text = browser.text()
    categories = ("Rounds", "ComputeAccounting", "CriticalPhase", "MaxBatchProbe", "ClientMetrics: clients")
    for title in (*categories, "client drift", "loss against compute", "gradient norm", "largest batch"):
        assert title in text
    assert "do not match" not in text
    assert colours(browser, tmp_path / "charts.png").std() > 0.1


def test_the_figure_is_there(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(f"{address}#images&tagFilter=compute")
    wait(lambda: "compute/position" in browser.text() and browser.count("img") >= 2)
    assert colours(browser, tmp_path / "position.png").std() > 0.1


def test_settings_and_metrics_are_columns_of_hparams(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(f"{address}#hparams")
    wait(lambda: "federated/num_clients" in browser.text() and "run/version_0" in browser.text())
    text = browser.text()
    for column in ("federated/clients_per_round", "federated/params", "val_loss", "round/loss", "compute/size_ratio"):
        assert column in text
    assert "hp_metric" not in text
    assert colours(browser, tmp_path / "hparams.png").std() > 0.1


def test_labels_of_clients_are_a_figure(browser: Browser, address: str) -> None:
    browser.open(f"{address}#images&tagFilter=client")
    wait(lambda: "client/labels" in browser.text() and browser.count("img") >= 1)


def test_all_clients_are_a_figure_and_the_worst_ones_a_table(browser: Browser, address: str) -> None:
    browser.open(f"{address}#images&tagFilter=clients")
    wait(lambda: "clients/val_loss/sorted" in browser.text() and browser.count("img") >= 1)
    browser.open(f"{address}#text")
    wait(lambda: "clients/val_loss/worst" in browser.text() and browser.count("table") >= 1)


def test_phases_and_memory_are_figures(browser: Browser, address: str) -> None:
    for tag in ("phase/course", "probe/memory"):
        browser.open(f"{address}#images&tagFilter={tag.partition('/')[0]}")

        def is_shown(tag: str = tag) -> bool:
            return tag in browser.text() and browser.count("img") >= 1

        wait(is_shown)


def test_a_report_shows_all_its_pictures(browser: Browser, shown: tuple[str, Path], tmp_path: Path) -> None:
    browser.open(shown[1].as_uri())
    wait(lambda: "What it cost" in browser.text())
    loaded = "return [...document.images].map(image => image.complete && image.naturalWidth > 100)"
    wait(lambda: all(browser.run(loaded)))
    assert len(browser.run(loaded)) >= 8
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
    assert colours(browser, tmp_path / "report.png").std() > 0.05  # mostly paper
