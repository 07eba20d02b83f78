"""Make a command line from functions, with the syntax of LightningCLI."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any, NamedTuple, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from lightning_fedscale.cli.makers import Maker

_PATHS = {"run": (None, "folder of a run"), "runs": ("+", "CSV files, directories of runs, or patterns of them")}
"""Positional arguments, which a shell may have expanded from a pattern: their number and their help."""

_NESTED = re.compile(r"--(module|data|strategy)\.([^=\s]+)(?:=(.*))?", re.DOTALL)
"""Arguments of the object that a `Maker` names, and of the strategy."""

register_type(Maker, serializer=str, deserializer=str)  # the class is imported after all arguments are parsed

_JSON = re.compile(r"^ +json: (.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"(the following arguments are required: )(\w+\..*)")


class Named(NamedTuple):
    """The arguments of a `Maker`.

    Attributes:
        argument: name of the command's argument.
        path: path of a class or function.
        arguments: arguments of the class or function.
    """

    argument: str
    path: str
    arguments: dict[str, Any]

    def made(self) -> Maker:
        """Make the maker.

        Raises:
            ValueError: if the path cannot be imported, or the object has no such argument.
        """
        try:
            return Maker(self.path, self.arguments)
        except ValueError as error:
            raise ValueError(f"{self.argument}={self.path!r}: {error}") from error


class _Parser(ArgumentParser):
    """A parser that reports missing arguments in the form of the command line, with the sub-command's usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found, chosen = _REQUIRED.fullmatch(message), self._subcommands_action
        if found is not None and chosen is not None:
            names = [each.partition(".") for each in found[2].split(", ")]
            missing = ", ".join(name if name in _PATHS else f"--{name}" for _, _, name in names)
            chosen.choices[names[0][0]].error(f"{found[1]}{missing}")
        super().error(message, ex)


def function_of(command: str) -> Callable[..., None]:
    """Return the function of a sub-command."""
    found: Callable[..., None] = getattr(import_module(f"lightning_fedscale.cli.{command}"), command)
    return found


def parse(
    commands: Mapping[str, str], arguments: Sequence[str], others: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """Parse the sub-command and its values; exit with 2 for invalid arguments.

    Modules and data modules are built, but those of a `Maker` are returned as `Named`.

    Args:
        commands: help of the sub-commands by their names; only that of the one in the arguments is imported.
        arguments: the arguments after ``fedscale``.
        others: help of the sub-commands with a custom command line, to list them.
    """
    about = "Federated learning for PyTorch Lightning"
    parser = _Parser(prog="fedscale", description=about, version=version("lightning-fedscale"))
    chosen = parser.add_subcommands(required=True, dest="command", title="commands", description=None)
    given = [_underscored(each) for each in arguments if each != "--json=false"]
    command = next((each for each in given if not each.startswith("-")), "")
    function = function_of(command) if command in commands else None
    for name, summary in sorted({**commands, **(others or {})}.items()):
        own = _Parser(description=summary)
        chosen.add_subcommand(name, own, help=summary)
        if name != command or function is None:
            continue
        own.add_argument("--config", action="config", help="a YAML file with any of these arguments")
        parameters = signature(function).parameters.values()
        paths = [each.name for each in parameters if each.name in _PATHS and each.default is Parameter.empty]
        for each in paths:
            number, meaning = _PATHS[each]
            own.add_argument(each, nargs=number, help=meaning)
        own.add_function_arguments(function, fail_untyped=False, skip={*paths, "json"})
        if json := _JSON.search(function.__doc__ or ""):
            own.add_argument("--json", action="store_true", help=json[1])
    makers = _makers(function)
    nested, given = _nested(given) if makers else ({}, given)
    parsed = parser.instantiate(parser.parse_args(given))
    values = parsed[parsed["command"]].as_dict()
    values.pop("config", None)
    for name in makers:
        values[name] = Named(name, str(values[name]), nested.get(name, {}))
    if "strategy" in nested and "strategy" in values:
        values["strategy"] = {**(values["strategy"] or {}), **nested["strategy"]}
    return parsed["command"], values


def _underscored(word: str) -> str:
    """Convert ``--study-minutes`` to ``--study_minutes``, and ``--json=true`` to ``--json``.

    Example:
        >>> _underscored("--study-minutes=5"), _underscored("--json=true"), _underscored("-3")
        ('--study_minutes=5', '--json', '-3')
    """
    flag, equal, value = word.partition("=")
    if flag.startswith("--"):
        word = flag[:2] + flag[2:].replace("-", "_") + equal + value
    return "--json" if word == "--json=true" else word


def _makers(function: Callable[..., None] | None) -> list[str]:
    """Return the names of the function's arguments that take a `Maker`."""
    return [] if function is None else [name for name, kind in get_type_hints(function).items() if kind is Maker]


def _nested(given: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Separate the arguments of modules, data modules and the strategy, which are made later, from the others.

    Example:
        >>> _nested(["size", "--data", "my.Data", "--data.batch_size=64", "--module.layers", "[1, 2]"])
        ({'data': {'batch_size': 64}, 'module': {'layers': [1, 2]}}, ['size', '--data', 'my.Data'])
    """
    own: dict[str, dict[str, Any]] = {}
    others, words = list[str](), iter(given)
    for word in words:
        if (found := _NESTED.fullmatch(word)) is None:
            others.append(word)
        else:
            value = found[3] if found[3] is not None else next(words, "true")
            own.setdefault(found[1], {})[found[2]] = yaml.safe_load(value)
    return own, others
