"""The command ``fedscale``.

Each sub-command is a function in its own file: its arguments, types and docstring make the command line and the help.
Only ``train`` has Hydra's command line. The file of a sub-command is imported only to run it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_fedscale.cli.arguments import Named, function_of, parse
from lightning_fedscale.cli.errors import INTERRUPTED, exit_after_broken_pipe, is_interruption, is_user_error

COMMANDS = {
    "bench": "Time rounds with each executor against plain steps on the same number of batches of the same sizes.",
    "fit": "Fit a scaling law to runs, and write it, a report and a figure.",
    "partition": "Show how a partitioner divides the training data among clients, as numbers and as a figure.",
    "plan": "Plan how large a model to train, on how much data, for a compute budget and a number of clients.",
    "probe": "Find the largest batch that fits, without training and without using the memory.",
    "report": "Write one page about a finished run: curves, phases, position, costs, probe and settings.",
    "size": "Find the size, method, batch and local steps for clients and a budget, by training on the clients' own"
    " data.",
    "sweep": "Train a module in several sizes, with several numbers of clients, and fit a scaling law to the runs.",
}
"""Names of the sub-commands, with the first lines of their functions' docstrings."""

_TRAIN = {"train": "Train a module and its data on federated clients, by Hydra."}

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
    command, values = parse(COMMANDS, given, _TRAIN)
    function = function_of(command)
    try:
        function(**{name: each.made() if isinstance(each, Named) else each for name, each in values.items()})
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
