"""What is on disk is what gets installed, under the name it is documented by."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from packaging.version import Version

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
    names = {path.name for path in (ROOT / "callbacks").rglob("*.py")}
    if link.is_file():  # a checkout without symbolic links: a text file names the target, the mapping does the work
        assert link.read_text(encoding="utf-8") == "../callbacks"
    else:
        assert {path.name for path in link.rglob("*.py")} == names


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


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": f"{PACKAGE}.__version__"}
    assert str(Version(lightning_fedscale.__version__)) == lightning_fedscale.__version__


def complaint_about(changelog: str, version: Version) -> str:
    """What is wrong with a changelog for this version; nothing if it is as it should be."""
    headings = re.findall(r"^## (.*)$", changelog, re.M)
    if headings[:1] != ["[Unreleased]"]:
        return "its first heading must be [Unreleased]"
    released = re.findall(r"^## \[([^\]]+)\] - \d{4}-\d\d-\d\d$", changelog, re.M)
    if len(released) != len(headings) - 1:
        return "every other heading must be like [1.2.0] - 2027-01-31"
    if version.is_devrelease:
        if version.base_version in released:
            return f"{version.base_version} is released: the next version is a higher one"
        unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## ")[0]
        return "" if re.search(r"^- ", unreleased, re.M) else "[Unreleased] says nothing of this version"
    return "" if released[:1] == [str(version)] else f"the first release must be [{version}], with its date"


def test_the_changelog_has_an_entry_for_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert complaint_about(changelog, Version(lightning_fedscale.__version__)) == ""


@pytest.mark.parametrize(
    ("changelog", "version", "complaint"),
    [
        ("## [Unreleased]\n\n- new\n\n## [0.1.0] - 2027-01-31\n", "0.2.0.dev0", ""),
        ("## [Unreleased]\n\n## [0.1.0] - 2027-01-31\n\n- new\n", "0.1.0", ""),
        ("## [Unreleased]\n\n- new\n", "0.1.0", "first release"),
        ("## [Unreleased]\n\n## [0.1.0] - soon\n", "0.1.0", "every other heading"),
        ("## [Unreleased]\n\n## [0.1.0] - 2027-01-31\n\n- new\n", "0.2.0.dev0", "says nothing"),
        ("## [Unreleased]\n\n- new\n\n## [0.1.0] - 2027-01-31\n", "0.1.0.dev0", "is released"),
        ("## [0.1.0] - 2027-01-31\n", "0.1.0", "first heading"),
    ],
)
def test_wrong_changelogs_are_found(changelog: str, version: str, complaint: str) -> None:
    found = complaint_about(changelog, Version(version))
    assert complaint in found
    assert bool(complaint) == bool(found)
