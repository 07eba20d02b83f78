"""Import modules when they are used, and act when another library is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which import what it exports when it is used (PEP 562).

    A name that a module of the package has too cannot be exported like this, since importing that module sets the
    attribute of the package.

    Args:
        package: the package's name.
        homes: for each name, the module below the package that defines it; a module is its own home.
    """

    def find(name: str) -> Any:
        if (home := homes.get(name)) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{home}")
        found = module if home.rpartition(".")[2] == name else getattr(module, name)
        setattr(sys.modules[package], name, found)  # so that the next use is as fast as that of any attribute
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names


def after_import(module: str, then: Callable[[], object]) -> None:
    """Call a function as soon as a module is imported: now if it already is, never if nobody imports it."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(MetaPathFinder):
    """Finds one module as the finders after it do, and calls the function after the module has run."""

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        finders = [*sys.meta_path]  # another thread may change the list
        others = finders[finders.index(self) + 1 :] if self in finders else finders
        spec = next(filter(None, (each.find_spec(fullname, path, target) for each in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: ModuleType) -> None:
                run(module)
                # A loader may serve several modules, and a module may be looked for, or reloaded, several times.
                if module.__name__ == self._module and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._then()

            # Only this loader's function is replaced: inspection of the module still sees its own loader.
            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec
