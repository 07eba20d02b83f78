"""What is on disk is what gets installed, under the name it is documented by."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import lightning_fedscale
from tests.unit.test_imports import PACKAGE, ROOT, files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_package_on_disk_is_declared() -> None:
    on_disk = {PACKAGE + "." + name.removesuffix(".__init__") for name in files() if name.endswith(".__init__")}
    assert set(SETUPTOOLS["packages"]) == on_disk | {PACKAGE}


def test_no_module_lies_outside_a_package() -> None:
    folders = {path.parent for path in files().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_callbacks_is_mapped_and_linked() -> None:
    assert SETUPTOOLS["package-dir"] == {PACKAGE: PACKAGE, f"{PACKAGE}.callbacks": "callbacks"}
    link = ROOT / PACKAGE / "callbacks"
    names = {path.name for path in (ROOT / "callbacks").glob("*.py")}
    if link.is_file():  # a checkout without symbolic links: a text file names the target, the mapping does the work
        assert link.read_text(encoding="utf-8") == "../callbacks"
    else:
        assert {path.name for path in link.glob("*.py")} == names


def test_top_level_callbacks_says_where_to_import_from() -> None:
    run = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert "import lightning_fedscale.callbacks instead" in run.stderr


def test_the_front_door_stays_small() -> None:
    assert len(lightning_fedscale.__all__) <= 20
    assert all(hasattr(lightning_fedscale, name) for name in lightning_fedscale.__all__)


def test_types_are_announced() -> None:
    assert (ROOT / PACKAGE / "py.typed").is_file()


def test_version_is_the_declared_one() -> None:
    assert lightning_fedscale.__version__ == PYPROJECT["project"]["version"]
