"""Checks of arguments that all packages share: each error names the argument, its value and the remedy."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"whole": "integer"})


def integer(name: str, value: object, minimum: int = 1, maximum: int | None = None, meaning: str = "") -> int:
    """Return ``value`` as an int of at least ``minimum`` and at most ``maximum``, if there is one.

    Args:
        name: name of the argument.
        value: the user's value.
        minimum: least valid value.
        maximum: largest valid value; None if there is none.
        meaning: what the number is, for the message, such as "the number of updates to average".

    Raises:
        TypeError: it is not an integer.
        ValueError: it is too small or too large.

    Example:
        >>> integer("num_partitions", 3)
        3
        >>> integer("levels", 1, 2, 65536)
        Traceback (most recent call last):
        ValueError: levels=1: pass an integer from 2 to 65536.
    """
    allowed = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    allowed = f"{meaning}, {allowed}" if meaning else allowed
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: pass {allowed}, not {type(value).__name__}.")
    if int(value) < minimum or (maximum is not None and int(value) > maximum):
        raise ValueError(f"{name}={value}: pass {allowed}.")
    return int(value)


def flag(name: str, value: object) -> bool:
    """Return a value that must be True or False.

    Args:
        name: name of the argument.
        value: the user's value.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: pass True or False.")
    return value


def is_number(value: object) -> bool:
    """Return whether ``value`` is a real number; booleans and NaN are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def number(name: str, value: object, remedy: str, accepts: Callable[[float], bool] = math.isfinite) -> float:
    """Return ``value`` as a float.

    Args:
        name: name of the argument.
        value: the user's value.
        remedy: what to pass instead, from "pass" to the full stop.
        accepts: returns whether a number is valid.

    Raises:
        TypeError: it is not a number.
        ValueError: the number is invalid.

    Example:
        >>> number("strength", -1, "pass a number of at least 0.", lambda strength: strength >= 0)
        Traceback (most recent call last):
        ValueError: strength=-1: pass a number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: {remedy}")
    if not accepts(float(value)):
        raise ValueError(f"{name}={value}: {remedy}")
    return float(value)


def in_interval(name: str, value: object, start: float, end: float, *, closed_end: bool = True) -> float:
    """Return ``value`` as a float between ``start`` and ``end``."""
    remedy = f"pass a number in [{start:g}, {end:g}{']' if closed_end else ')'}."
    return number(name, value, remedy, lambda found: start <= found <= end and (closed_end or found < end))


def positive(name: str, value: object) -> float:
    """Return ``value`` as a positive, finite float.

    Example:
        >>> positive("lr", 0)
        Traceback (most recent call last):
        ValueError: lr=0: pass a finite number above 0.
    """
    return number(name, value, "pass a finite number above 0.", lambda found: 0 < found < math.inf)


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Check that ``value`` is one of the allowed strings.

    Example:
        >>> one_of("noise", "sever", ("server", "client"))
        Traceback (most recent call last):
        ValueError: noise='sever': pass one of 'server', 'client'. Did you mean 'server'?
    """
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r}: pass one of {names}.{did_you_mean(value, allowed)}")


def unknown(argument: str, name: object, known: Iterable[str], unlisted: Iterable[str] = ()) -> ValueError:
    """Return the error for a name that no registry has; `named` raises it.

    Args:
        argument: the user's argument that the name was passed to.
        name: the name.
        known: the names that the message lists.
        unlisted: further valid names, which the message has only if one is the closest.
    """
    names = list(known)
    hint = did_you_mean(name, [*names, *unlisted])
    return ValueError(f"{argument}={name!r} is not known.{hint} Known: {', '.join(map(repr, names))}.")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a sentence with the closest known name, to be appended to a message; empty if none is close.

    Example:
        >>> did_you_mean("Dirichlett", ["iid", "dirichlet"])
        " Did you mean 'dirichlet'?"
    """
    cutoff = 0.6 if isinstance(name, str) else 1.0  # nobody misspells None
    close = get_close_matches(str(name).lower().replace("-", "_"), known, n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def named(argument: str, name: str, factories: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the factory of this name, which must not need arguments.

    Args:
        argument: the user's argument that the name was passed to.
        name: name of a factory.
        factories: all factories by name.

    Raises:
        ValueError: the name is unknown, or its factory needs arguments.

    Example:
        >>> named("local_rule", "fedprox", {"fed_prox": lambda mu: mu})
        Traceback (most recent call last):
        ...
        ValueError: local_rule='fedprox' is not known. Did you mean 'fed_prox'? Known: 'fed_prox'.
        >>> named("local_rule", "fed_prox", {"fed_prox": lambda mu: mu})
        Traceback (most recent call last):
        ...
        ValueError: local_rule='fed_prox' needs mu: pass an object, fed_prox(mu=...).
    """
    if name not in factories:
        raise unknown(argument, name, factories)
    missing = needed(factories[name])
    if missing:
        raise ValueError(f"{argument}={name!r} needs {', '.join(missing)}: pass an object, {_call(name, missing)}.")
    return factories[name]


def called(argument: str, value: object, room: str, factories: Mapping[str, Callable[..., Any]]) -> None:
    """Check that ``value`` is not a factory that the user forgot to call.

    Args:
        argument: name of the argument.
        value: the user's value.
        room: the module in which users find the factories.
        factories: all factories by name.

    Raises:
        TypeError: if it is a factory.

    Example:
        >>> from lightning_fedscale import local_rules
        >>> called("local_rule", local_rules.fed_prox, "local_rules", local_rules.FACTORIES)
        Traceback (most recent call last):
        ...
        TypeError: local_rule=fed_prox is a function: call it, local_rules.fed_prox(mu=...).
    """
    for name, factory in factories.items():
        if value is factory:
            call = _call(f"{room}.{name}", needed(factory))
            raise TypeError(f"{argument}={name} is a function: call it, {call}.")


def known_arguments(caller: str, factory: Callable[..., Any], arguments: Iterable[str]) -> None:
    """Check that a factory has all these arguments.

    Args:
        caller: beginning of the message.
        factory: the factory to be called.
        arguments: names of the arguments.

    Raises:
        TypeError: if the factory lacks one of them.

    Example:
        >>> known_arguments("register('fed5')", dict.fromkeys, {"itterable": 3})
        Traceback (most recent call last):
        ...
        TypeError: register('fed5'): fromkeys has no argument 'itterable'. Did you mean 'iterable'?
    """
    known = list(inspect.signature(factory).parameters)
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known) or f" It has {', '.join(known)}."
            raise TypeError(f"{caller}: {factory.__name__} has no argument {name!r}.{hint}")


def enumerated(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names as text for a message.

    Example:
        >>> enumerated(["queue", "bank", "seen"], most=2)
        "'queue', 'bank' and 1 more"
    """
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def needed(factory: Callable[..., Any]) -> list[str]:
    """Return the names of a factory's required arguments."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(factory).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _call(name: str, arguments: Sequence[str]) -> str:
    return f"{name}({', '.join(f'{argument}=...' for argument in arguments)})"
