"""From functions to a command line, with the syntax of LightningCLI."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

_PATHS = {"run": (None, "folder of a run"), "runs": ("+", "CSV files, directories of runs, or patterns of them")}
"""Arguments without a flag, since a shell's pattern may have made them: how many there are, and what they are."""

_JSON = re.compile(r"^ +json: (.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"(the following arguments are required: )(\w+\..*)")


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
    """The sub-command and its values, with modules and data modules built; exits with 2 for arguments that are wrong.

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
    given = ["--json" if each == "--json=true" else each for each in arguments if each != "--json=false"]
    parsed = parser.instantiate(parser.parse_args(given))
    values = parsed[parsed["command"]].as_dict()
    values.pop("config", None)
    return parsed["command"], values
