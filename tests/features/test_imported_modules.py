"""A command or an import imports only what it needs: torch and Lightning take seconds, however short the work."""

from __future__ import annotations

import ast
import atexit
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import lightning_fedscale
from lightning_fedscale import devices, pytorch_lightning
from lightning_fedscale.cli import COMMANDS
from lightning_fedscale.cli.arguments import function_of
from lightning_fedscale.utils import late_imports
from tests.unit.test_imports import files

TRAINING = ["torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "hydra"]
FIGURES = ["matplotlib"]
LOGS = ["tensorboard", "torch.utils.tensorboard"]
TABLES = ["pandas"]
MATHEMATICS = ["numpy", "scipy"]
STATISTICS = ["scipy.stats"]
PARSER = ["jsonargparse", "yaml"]
ALL = [*TRAINING, *FIGURES, *LOGS, *TABLES, *MATHEMATICS, *PARSER]

IMPORTS = {
    "import lightning_fedscale": ALL,
    "import lightning_fedscale.cli": [*TRAINING, *FIGURES, *LOGS, *TABLES, *MATHEMATICS],
    "import lightning_fedscale.scaling": [*TRAINING, *FIGURES, *LOGS, *STATISTICS],
    "import lightning_fedscale.partitioners": [*TRAINING, *FIGURES, *LOGS, *TABLES, "scipy"],
    "import lightning_fedscale.phases": [*TRAINING, *FIGURES, *LOGS, *TABLES, *STATISTICS],
    "from lightning_fedscale.devices import device_class": [*TRAINING, *FIGURES, *LOGS, *TABLES, "scipy"],
    "from lightning_fedscale import FederatedStrategy": ["hydra", *LOGS, *TABLES],
    "import lightning_fedscale.callbacks": ["hydra", *LOGS],
}
"""Modules that must not be imported, by what is."""

PARSED = [*TRAINING, *FIGURES, *LOGS, *TABLES, *MATHEMATICS]
RUN = [*TRAINING, *LOGS]
COMMAND_LINES = {
    "--help": (0, "fit", PARSED),
    "--version": (0, lightning_fedscale.__version__, PARSED),
    "toast": (2, "invalid choice", PARSED),
    "plan --help": (0, "--flops", PARSED),
    "plan --flop-s=1": (2, "--flop_s", PARSED),
    "fit": (2, "runs", PARSED),
    "report": (2, "run", PARSED),
    "size --module=my.Net": (2, "--data", PARSED),
    "sweep --help": (0, "--module", PARSED),
    "plan --flops=1e20 --clients=10 --device=phone": (0, "phone", [*RUN, *FIGURES, *STATISTICS]),
    "plan --flops=1e20 --law=nothing": (1, "law='nothing'", [*RUN, *FIGURES, *STATISTICS]),
    "plan --flops=1e20 --plot=plan.png": (0, "Parameters", RUN),
    "fit runs.csv --bootstrap=2": (0, "Report", RUN),
    "report run": (0, "Report", RUN),
}
"""The exit code of a command line, a word that it prints, and modules that it must not import."""


def imported(code: str, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run code in a new process; with it, the modules that are imported at its end."""
    at_end = "import atexit, json, sys\natexit.register(lambda: open('modules', 'w').write(json.dumps([*sys.modules])))"
    path = os.pathsep.join([str(Path(lightning_fedscale.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", f"{at_end}\n{code}", *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return run, set(json.loads((folder / "modules").read_text(encoding="utf-8")))


AFTER_TORCH = """
import gc, json, os, sys, traceback
import jsonargparse, torch._dynamo, torchmetrics

gc.collect()
gc.freeze()  # so that collections in the copies do not pass over all this
for line in sys.stdin:
    folder, code = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, file in enumerate((os.devnull, "output", "errors")):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), number)
        sys.argv, status = ["-c"], 0
        try:
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        with open("modules", "w") as file:
            json.dump([*sys.modules], file)
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def imported_after_torch(code: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """As `imported`, in a copy of a process that has imported torch and others, which takes most of the time.

    None of them knows of Lightning or of this package, so what is imported first is still the code's own.
    """
    server = _after_torch()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(folder), code]) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    output, errors = ((folder / name).read_text(encoding="utf-8") for name in ("output", "errors"))
    modules = set(json.loads((folder / "modules").read_text(encoding="utf-8")))
    return subprocess.CompletedProcess(["python", "-c", code], status, output, errors), modules


@functools.cache
def _after_torch() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(lightning_fedscale.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", AFTER_TORCH], env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()


@pytest.mark.parametrize(("code", "forbidden"), IMPORTS.items(), ids=IMPORTS)
def test_an_import_brings_only_what_it_needs(code: str, forbidden: Sequence[str], tmp_path: Path) -> None:
    run, modules = (imported if "torch" in forbidden else imported_after_torch)(code, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "lightning_fedscale" in modules
    assert modules.isdisjoint(forbidden)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_imports_only_what_it_needs(line: str, tmp_path: Path) -> None:
    code, word, forbidden = COMMAND_LINES[line]
    rows = (Path(__file__).parent / "digits_runs.csv").read_text(encoding="utf-8")
    (tmp_path / "runs.csv").write_text(rows, encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch,step,val_loss\n0,3,0.5\n1,7,0.4\n", encoding="utf-8")
    main = "from lightning_fedscale.cli import main\nsys.exit(main())"
    run, modules = imported(main, tmp_path, *line.split())
    assert run.returncode == code, run.stderr
    assert word in run.stdout + run.stderr
    assert "jsonargparse" in modules
    assert modules.isdisjoint(forbidden)


def test_heavy_modules_are_found_where_they_are(tmp_path: Path) -> None:
    """The tests above would find them: a figure, a table and a fit import what they need."""
    _, modules = imported("import lightning_fedscale.scaling", tmp_path)
    assert modules.issuperset([*TABLES, *MATHEMATICS])
    _, modules = imported_after_torch("import lightning_fedscale.strategy, lightning_fedscale.scaling", tmp_path)
    assert modules.issuperset([*TRAINING[:2], *TABLES, *MATHEMATICS, *PARSER])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_all_commands_says_what_each_one_says(name: str) -> None:
    assert (function_of(name).__doc__ or "").split("\n\n")[0] == COMMANDS[name]


# ---- names that are imported when they are used


def late(package: ModuleType) -> dict[str, str]:
    """The names that a package imports for type checkers only, with their modules."""
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("package", [lightning_fedscale, devices], ids=lambda each: each.__name__)
def test_a_type_checker_sees_the_names_that_there_are(package: ModuleType) -> None:
    names = late(package)
    assert names, "nothing is imported late"
    assert set(names) <= set(package.__all__) <= set(dir(package))
    for name, module in names.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_every_name_is_there_at_once(tmp_path: Path) -> None:
    names = [*lightning_fedscale.__all__, "callbacks", "scaling", "strategy", "types", "__version__"]
    for name in names:
        assert getattr(lightning_fedscale, name) is not None
    code = f"from lightning_fedscale import *\nassert set({lightning_fedscale.__all__}) <= set(globals())"
    run, _ = imported_after_torch(code, tmp_path)
    assert run.returncode == 0, run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_fedscale.nothing  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import lightning_fedscale, lightning.pytorch as pl",
        "import lightning.pytorch as pl, lightning_fedscale",
        "import lightning_fedscale.core.lightning.hooks, lightning.pytorch as pl",
        "from lightning_fedscale import FederatedStrategy\nimport lightning.pytorch as pl",
        "import lightning_fedscale.pytorch_lightning, lightning.pytorch as pl",
        "import lightning_fedscale.pytorch_lightning, pytorch_lightning as pl",
    ],
)
def test_lightning_knows_the_strategy_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    code = f"""{first}
from jsonargparse import ArgumentParser
from lightning_fedscale.server import ServerOptimizer
trainer = pl.Trainer(strategy="federated", accelerator="cpu", logger=False)
parser = ArgumentParser(exit_on_error=False)
parser.add_argument("--server", type=ServerOptimizer)
given = {{"class_path": "lightning_fedscale.server.fed_adam", "init_args": {{"lr": 0.1}}}}
found = parser.parse_object({{"server": given}})
print(type(trainer.strategy).__name__, isinstance(found.server, ServerOptimizer))
"""
    run, _ = imported_after_torch(code, tmp_path)
    assert run.stdout.splitlines()[-1:] == ["FederatedStrategy True"], run.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_fedscale\nfrom lightning.pytorch.cli import LightningCLI",
        "from lightning.pytorch.cli import LightningCLI\nimport lightning_fedscale",
    ],
)
def test_lightning_cli_finds_the_strategy_without_its_path(imports: str, tmp_path: Path) -> None:
    code = f"""{imports}
from lightning.pytorch.demos.boring_classes import BoringModel
given = {{"strategy": {{"class_path": "FederatedStrategy", "init_args": {{"num_clients": 4}}}}, "logger": False}}
trainer = {{**given, "accelerator": "cpu", "devices": 1}}
cli = LightningCLI(BoringModel, args={{"trainer": trainer}}, run=False)
print(type(cli.trainer.strategy).__name__, cli.config.trainer.strategy.init_args.num_clients)
"""
    run, _ = imported_after_torch(code, tmp_path)
    assert run.stdout.splitlines()[-1:] == ["FederatedStrategy 4"], run.stderr


def test_the_package_uses_no_old_name(tmp_path: Path) -> None:
    code = f"""
import warnings
warnings.filterwarnings("error", "lightning_fedscale.* now: import that", DeprecationWarning)
from importlib import import_module
for name in {list(files())}:
    if not name.endswith("__main__") and "pytorch_lightning" not in name:
        import_module(("lightning_fedscale." + name).removesuffix(".__init__"))
"""
    run, _ = imported_after_torch(code, tmp_path)
    assert run.returncode == 0, run.stderr


def test_what_is_pickled_of_the_twin_is_found_in_a_new_process(tmp_path: Path) -> None:
    pickled = pickle.dumps(pytorch_lightning.callbacks.CriticalPhase)
    code = f"import pickle; kind = pickle.loads({pickled!r}); print(kind.__module__, kind.__mro__[1].__module__)"
    run, _ = imported_after_torch(code, tmp_path)
    assert run.stdout.split() == [
        "lightning_fedscale.pytorch_lightning.callbacks.critical_phase.callback",
        "pytorch_lightning.callbacks.callback",
    ], run.stderr


@pytest.mark.parametrize("first", ["", "import lightning.pytorch; "])
def test_the_package_can_be_reloaded(first: str, tmp_path: Path) -> None:
    code = (
        f"{first}import importlib, lightning_fedscale\nimportlib.reload(lightning_fedscale)\nimport lightning.pytorch"
    )
    run, _ = imported_after_torch(code, tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_loader_of_several_modules_may_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen application: the module is complete when the function runs."""

    class Everywhere(importlib.abc.Loader, importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, self) if name.startswith("frozen_") else None

        def exec_module(self, module: ModuleType) -> None:
            if module.__name__ == "frozen_outer":
                importlib.import_module("frozen_inner")
            module.complete = True  # type: ignore[attr-defined]

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Everywhere()])
    seen: list[bool] = []
    for _ in range(2):
        late_imports.after_import("frozen_outer", lambda: seen.append(hasattr(sys.modules["frozen_outer"], "complete")))
    importlib.import_module("frozen_outer")
    assert seen == [True, True]
    for name in ("frozen_inner", "frozen_outer"):
        monkeypatch.delitem(sys.modules, name)


def test_a_function_runs_once_after_an_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imported_late.py").write_text("value = 1\n", encoding="utf-8")
    (tmp_path / "broken_once.py").write_text(
        "import imported_late\nassert imported_late.value == 2\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    seen: list[str] = []
    for name in ("imported_late", "broken_once"):
        late_imports.after_import(name, lambda name=name: seen.append(name))  # type: ignore[misc]
    assert importlib.util.find_spec("imported_late") is not None  # which imports nothing
    assert seen == []
    with pytest.raises(AssertionError):
        importlib.import_module("broken_once")
    module = importlib.import_module("imported_late")
    assert seen == ["imported_late"]
    importlib.reload(module)
    monkeypatch.setattr(module, "value", 2)
    importlib.import_module("broken_once")
    assert seen == ["imported_late", "broken_once"]
    late_imports.after_import("imported_late", lambda: seen.append("now"))
    assert seen[-1] == "now"
    for name in ("imported_late", "broken_once"):
        monkeypatch.delitem(sys.modules, name)
