"""Messages of `cli`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_fedscale.cli.arguments import Named
from lightning_fedscale.cli.bench import bench
from lightning_fedscale.cli.files import made
from lightning_fedscale.cli.makers import Maker
from lightning_fedscale.cli.plan import plan
from lightning_fedscale.cli.probe import probe
from lightning_fedscale.cli.run_page import read_run
from tests.wording import Row


def _read(*files: str) -> None:
    """Read a folder with these files."""
    with TemporaryDirectory() as folder:
        for each in files:
            Path(folder, each).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, each).write_text("step,loss\n0,1.0\n")
        try:
            read_run(Path(folder, "runs"))
        except ValueError as error:
            raise ValueError(str(error).replace(folder, "")) from None


def nothing() -> None:
    """Without arguments."""


ROWS: list[Row] = [
    Row(
        lambda: Named("module", "lost.Net", {}).made(),
        ValueError,
        "module='lost.Net': cannot be imported (No module named 'lost'). Pass package.module.Name.",
    ),
    Row(
        lambda: Maker("math.pi"),
        ValueError,
        "this is not callable (3.141592653589793). Pass a class or a function that makes it.",
    ),
    Row(
        lambda: Maker("textwrap.dedent", {"width": 3}),
        ValueError,
        "has no argument width. Pass one of text.",
    ),
    Row(
        lambda: Maker("tests.wording.cli.nothing", {"width": 3}),
        ValueError,
        "has no argument width. It takes none.",
    ),
    Row(
        lambda: made("output", "/dev/null/x"),
        ValueError,
        "output='/dev/null/x': this folder cannot be created: Not a directory.",
    ),
    Row(lambda: read_run("nowhere"), ValueError, "run='nowhere': there is no such directory."),
    Row(lambda: _read("runs"), ValueError, "run='/runs': this is a file. Pass the folder that a logger wrote."),
    Row(
        lambda: _read("runs/notes.txt"),
        ValueError,
        "run='/runs': it has neither TensorBoard's events nor a metrics.csv. Pass the folder that a logger wrote, such"
        " as lightning_logs/version_0.",
    ),
    Row(
        lambda: _read("runs/a/metrics.csv", "runs/b/metrics.csv"),
        ValueError,
        "run='/runs': it holds 2 runs, and a report is about one. Pass one of: /runs/a, /runs/b.",
    ),
    Row(lambda: plan(1e20, clients=[]), ValueError, "clients=[]: pass at least one number of clients."),
    Row(lambda: bench(seconds=0.0), ValueError, "seconds=0.0: pass a finite number above 0."),
    Row(
        lambda: probe(None, budget=[]),  # type: ignore[arg-type]
        ValueError,
        "budget=[]: pass an amount of memory, or several in a list.",
    ),
]
