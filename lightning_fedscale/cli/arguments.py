"""From functions to a command line, with the syntax of LightningCLI."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any, NamedTuple, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from lightning_fedscale.cli.makers import Maker

_PATHS = {"run": (None, "folder of a run"), "runs": ("+", "CSV files, directories of runs, or patterns of them")}
"""Arguments without a flag, since a shell's pattern may have made them: how many there are, and what they are."""

_NESTED = re.compile(r"--(module|data|strategy)\.([^=\s]+)(?:=(.*))?", re.DOTALL)
"""Arguments of what a `Maker` names, and of the strategy."""

register_type(Maker, serializer=str, deserializer=str)  # imported once everything else is right

_JSON = re.compile(r"^ +json: (.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"(the following arguments are required: )(\w+\..*)")


class Named(NamedTuple):
    """What a `Maker` is to be made of.

    Attributes:
        argument: for which it was named.
        path: of a class or function.
        arguments: of it.
    """

    argument: str
    path: str
    arguments: dict[str, Any]

    def made(self) -> Maker:
        """The maker.

        Raises:
            ValueError: if there is no such thing, or it has no such argument.
        """
        try:
            return Maker(self.path, self.arguments)
        except ValueError as error:
            raise ValueError(f"{self.argument}={self.path!r}: {error}") from error


class _Parser(ArgumentParser):
    """Says what is missing as people type it, and with the usage of the sub-command."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found, chosen = _REQUIRED.fullmatch(message), self._subcommands_action
        if found is not None and chosen is not None:
            names = [each.partition(".") for each in found[2].split(", ")]
            missing = ", ".join(name if name in _PATHS else f"--{name}" for _, _, name in names)
            chosen.choices[names[0][0]].error(f"{found[1]}{missing}")
        super().error(message, ex)


def parse(
    commands: Mapping[str, Callable[..., None]],
    arguments: Sequence[str],
    others: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The sub-command and its values; exits with 2 for arguments that are wrong.

    Modules and data modules are built; those that a `Maker` stands for are only `Named`.

    Args:
        commands: functions by the names of their sub-commands.
        arguments: what follows ``fedscale``.
        others: what sub-commands do that have a command line of their own; they are listed.
    """
    about = "Federated learning for PyTorch Lightning"
    parser = _Parser(prog="fedscale", description=about, version=version("lightning-fedscale"))
    chosen = parser.add_subcommands(required=True, dest="command", title="commands", description=None)
    every: dict[str, Callable[..., None] | str] = {**commands, **(others or {})}
    for name, does in sorted(every.items()):
        if isinstance(does, str):
            chosen.add_subcommand(name, _Parser(), help=does)
            continue
        function, summary = does, (does.__doc__ or "").split("\n\n")[0]
        own = _Parser(description=summary)
        own.add_argument("--config", action="config", help="a YAML file with any of these arguments")
        parameters = signature(function).parameters.values()
        paths = [each.name for each in parameters if each.name in _PATHS and each.default is Parameter.empty]
        for each in paths:
            number, meaning = _PATHS[each]
            own.add_argument(each, nargs=number, help=meaning)
        own.add_function_arguments(function, fail_untyped=False, skip={*paths, "json"})
        if json := _JSON.search(function.__doc__ or ""):
            own.add_argument("--json", action="store_true", help=json[1])
        chosen.add_subcommand(name, own, help=summary)
    given = [_underscored(each) for each in arguments if each != "--json=false"]
    makers = _makers(commands.get(next((each for each in given if not each.startswith("-")), "")))
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
    """``--study-minutes`` is ``--study_minutes``; a flag alone is true.

    Example:
        >>> _underscored("--study-minutes=5"), _underscored("--json=true"), _underscored("-3")
        ('--study_minutes=5', '--json', '-3')
    """
    flag, equal, value = word.partition("=")
    if flag.startswith("--"):
        word = flag[:2] + flag[2:].replace("-", "_") + equal + value
    return "--json" if word == "--json=true" else word


def _makers(function: Callable[..., None] | None) -> list[str]:
    """Names of its arguments that a `Maker` is passed for."""
    return [] if function is None else [name for name, kind in get_type_hints(function).items() if kind is Maker]


def _nested(given: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Arguments of modules, data modules and the strategy, which are made later, and the other arguments.

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
