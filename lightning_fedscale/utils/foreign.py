"""Asking objects of other people's what they can do: mocks and proxies answer to any name."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

_T = TypeVar("_T")

_NOBODY_HAS = "_attribute_that_no_object_has"


def attribute_of(thing: Any, name: str, default: Any = None) -> Any:
    """An attribute that the object has; the default if it has none, or if its answer means nothing.

    An answer means nothing where any name is answered, as by a `Mock`, and where a property raises.

    Args:
        thing: any object.
        name: of the attribute.
        default: returned otherwise.

    Example:
        >>> from unittest.mock import Mock
        >>> attribute_of(Mock(), "add_figure") is None, attribute_of([], "append") is None
        (True, False)
    """
    try:
        value = getattr(thing, name)
    except Exception:
        return default
    return default if has(thing, _NOBODY_HAS) else value


def has(thing: Any, name: str) -> bool:
    """`hasattr` for objects whose properties may raise anything."""
    try:
        getattr(thing, name)
    except Exception:
        return False
    return True


def is_really(thing: object, kind: type[_T]) -> TypeGuard[_T]:
    """`isinstance` that is not deceived by ``Mock(spec=kind)``, which has none of the attributes set in ``__init__``.

    Example:
        >>> from unittest.mock import Mock
        >>> isinstance(Mock(spec=dict), dict), is_really(Mock(spec=dict), dict)
        (True, False)
    """
    return issubclass(type(thing), kind)


def is_raised_in(error: BaseException, package: str) -> bool:
    """Whether a package's own line raised it, not one that the package called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")
