"""The command ``fedscale``.

Each sub-command is a function in its own file: its arguments, types and docstring make the command line and the help.
Only ``train`` has Hydra's command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_fedscale.cli.arguments import Named, parse
from lightning_fedscale.cli.bench import bench
from lightning_fedscale.cli.errors import INTERRUPTED, exit_after_broken_pipe, is_interruption
from lightning_fedscale.cli.fit import fit
from lightning_fedscale.cli.partition import partition
from lightning_fedscale.cli.plan import plan
from lightning_fedscale.cli.probe import probe
from lightning_fedscale.cli.report import report
from lightning_fedscale.cli.size import size
from lightning_fedscale.cli.sweep import sweep
from lightning_fedscale.core.options.trainer_checks import is_user_error

COMMANDS: dict[str, Callable[..., None]] = {
    "bench": bench,
    "fit": fit,
    "partition": partition,
    "plan": plan,
    "probe": probe,
    "report": report,
    "size": size,
    "sweep": sweep,
}

_KEPT = " Finished runs are kept: the same command resumes with the missing runs."
_AFTERWARDS = {"size": _KEPT, "sweep": _KEPT}
"""Messages of commands that can be resumed after an interruption."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after ``fedscale``; None for those of this process.

    Returns:
        The exit code: 0, 1 if the request cannot be fulfilled, or 130 after Ctrl-C. Invalid arguments exit with 2.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return exit_after_broken_pipe()


def _run(given: Sequence[str]) -> int:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # to import the user's own modules, as for a script
    if given and given[0] == "train":
        from lightning_fedscale.cli.train import train  # only when needed, since importing Hydra is slow

        return train(given[1:])
    command, values = parse(COMMANDS, given, {"train": "Train a module and its data on federated clients, by Hydra."})
    try:
        COMMANDS[command](**{name: each.made() if isinstance(each, Named) else each for name, each in values.items()})
    except (KeyboardInterrupt, SystemExit) as stopped:
        if not is_interruption(stopped):
            raise
        print(f"fedscale {command}: interrupted.{_AFTERWARDS.get(command, '')}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"fedscale {command}: {error}", file=sys.stderr)
        return 1
    return 0
