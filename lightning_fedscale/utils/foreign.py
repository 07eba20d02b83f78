"""Inspect objects of other libraries safely: mocks and proxies have every attribute."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

_T = TypeVar("_T")

_NOBODY_HAS = "_attribute_that_no_object_has"


def attribute_of(thing: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of the object, or the default if the object lacks it or its value is meaningless.

    A value is meaningless if the object has every attribute, like a `Mock`, or if a property raises.

    Args:
        thing: any object.
        name: name of the attribute.
        default: value to return otherwise.

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
    """Return whether an object has an attribute, even if its properties may raise any exception."""
    try:
        getattr(thing, name)
    except Exception:
        return False
    return True


def is_really(thing: object, kind: type[_T]) -> TypeGuard[_T]:
    """Check ``isinstance`` without accepting ``Mock(spec=kind)``, which lacks the attributes set in ``__init__``.

    Example:
        >>> from unittest.mock import Mock
        >>> isinstance(Mock(spec=dict), dict), is_really(Mock(spec=dict), dict)
        (True, False)
    """
    return issubclass(type(thing), kind)


def is_raised_in(error: BaseException, package: str) -> bool:
    """Return whether a line of the package itself raised the error, not code that the package called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")
