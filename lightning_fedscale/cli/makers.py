"""A project's own class or function, named on the command line, with its arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any


class Maker:
    """A callable for arguments such as ``--module my.Net --module.depth=3``.

    It can be pickled, since the class or function is imported by its path.

    Args:
        path: path of a class or function.
        arguments: arguments of every call.

    Raises:
        ValueError: if the path cannot be imported, or the object has no such argument.

    Example:
        >>> made = Maker("fractions.Fraction", {"denominator": 4})
        >>> made(numerator=3)
        Fraction(3, 4)
    """

    def __init__(self, path: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.path, self.arguments = path, dict(arguments or {})
        where, _, name = path.rpartition(".")
        try:
            self._made = getattr(import_module(where), name)
        except (AttributeError, ImportError, ValueError) as error:
            raise ValueError(f"cannot be imported ({error}). Pass package.module.Name.") from error
        if not callable(self._made):
            raise ValueError(f"this is not callable ({self._made!r}). Pass a class or a function that makes it.")
        self.__module__, self.__qualname__ = where, name
        self.__signature__ = inspect.signature(self._made)
        known = self.__signature__.parameters
        if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            for each in self.arguments:
                if each not in known:
                    remedy = f"Pass one of {', '.join(known)}." if known else "It takes none."
                    raise ValueError(f"has no argument {each}. {remedy}")

    def version_of(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the version of a function for the one of Lightning's two packages that the module belongs to.

        Args:
            function: a function that has a version for each package.
            arguments: arguments to make the module with, to find its type.
        """
        kind = self._made
        if not isinstance(kind, type):
            with suppress(Exception):  # the function will report the error
                kind = type(self(**arguments))
        other = sys.modules.get("pytorch_lightning")
        if other is None or not isinstance(kind, type) or not issubclass(kind, other.LightningModule):
            return function
        package, _, below = function.__module__.partition(".")
        found: Callable[..., Any] = getattr(import_module(f"{package}.pytorch_lightning.{below}"), function.__name__)
        return found

    def __call__(self, **arguments: Any) -> Any:
        """Call the class or function, with these arguments too."""
        return self._made(**{**self.arguments, **arguments})

    def __reduce__(self) -> tuple[Any, ...]:
        return Maker, (self.path, self.arguments)
