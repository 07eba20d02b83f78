"""From functions to a command line, with the syntax of LightningCLI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any

from jsonargparse import ArgumentParser

_PATHS = {"run": (None, "folder of a run"), "runs": ("+", "CSV files, or directories of runs")}
"""Arguments without a flag, since a shell's pattern may have made them: how many there are, and what they are."""


def parse(
    commands: Mapping[str, Callable[..., None]],
    arguments: Sequence[str] | None,
    others: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The sub-command and its values, with modules and data modules built; exits with 2 for arguments that are wrong.

    Args:
        commands: functions by the names of their sub-commands.
        arguments: None for those of this process.
        others: what sub-commands do that have a command line of their own; they are listed.
    """
    about = "Federated learning for PyTorch Lightning"
    parser = ArgumentParser(prog="fedscale", description=about, version=version("lightning-fedscale"))
    chosen = parser.add_subcommands(required=True, dest="command", title="commands", description=None)
    every: dict[str, Callable[..., None] | str] = {**commands, **(others or {})}
    for name, does in sorted(every.items()):
        if isinstance(does, str):
            chosen.add_subcommand(name, ArgumentParser(), help=does)
            continue
        function, summary = does, (does.__doc__ or "").split("\n\n")[0]
        own = ArgumentParser(description=summary)
        own.add_argument("--config", action="config", help="a YAML file with any of these arguments")
        parameters = signature(function).parameters.values()
        paths = [each.name for each in parameters if each.name in _PATHS and each.default is Parameter.empty]
        for each in paths:
            number, meaning = _PATHS[each]
            own.add_argument(each, nargs=number, help=meaning)
        own.add_function_arguments(function, fail_untyped=False, skip=set(paths))
        chosen.add_subcommand(name, own, help=summary)
    given = sys.argv[1:] if arguments is None else arguments
    # A flag that is only named, as everywhere.
    given = ["--json=true" if each == "--json" else each for each in given]
    parsed = parser.instantiate(parser.parse_args(given))
    values = parsed[parsed["command"]].as_dict()
    values.pop("config", None)
    return parsed["command"], values
