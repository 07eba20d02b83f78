"""What a contender sees of the benchmark: its task, and a clock that lets contenders take turns.

A contender is a process of its own. It trains through all rounds of the task with its own loop and calls
`Contest.round_over` at the same point of every round; there the process waits, between turns, until the referee
(`benchmarks.referee`) says go. So contenders that are alive at the same time never train at the same time, and one that
has no notion of turns is measured in the midst of its own loop.

Needs Python and numpy only, for it runs in the environment of every peer.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Turns(NamedTuple):
    """The rounds of a run: ``warm_up`` rounds, then ``number`` turns of one untimed round and ``rounds`` timed ones.

    Example:
        >>> Turns(warm_up=5, number=10, rounds=20).total
        215
    """

    warm_up: int
    number: int
    rounds: int

    @property
    def total(self) -> int:
        """Rounds of a whole run."""
        return self.warm_up + self.number * (1 + self.rounds)


class Task(NamedTuple):
    """Data, clients, cohorts and hyperparameters, the same for every contender.

    Attributes:
        settings: model and hyperparameters, see `benchmarks.tasks`.
        inputs: training inputs.
        labels: training labels.
        indices: training samples grouped by client; client ``k`` holds ``indices[offsets[k]:offsets[k + 1]]``.
        offsets: see ``indices``.
        cohorts: the clients of every round, ``(rounds, clients per round)``, ascending.
        initial: initial weights by the torch model's parameter name.
    """

    settings: dict[str, Any]
    inputs: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    offsets: np.ndarray
    cohorts: np.ndarray
    initial: dict[str, np.ndarray]

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.offsets) - 1

    @property
    def turns(self) -> Turns:
        """How the rounds are divided."""
        return Turns(**self.settings["turns"])

    def client(self, number: int) -> np.ndarray:
        """Training samples of a client."""
        return self.indices[self.offsets[number] : self.offsets[number + 1]]

    def save(self, path: str) -> None:
        """Write the task for `load`."""
        arrays = {name: getattr(self, name) for name in ("inputs", "labels", "indices", "offsets", "cohorts")}
        weights = {f"initial/{name}": value for name, value in self.initial.items()}
        np.savez(path, settings=json.dumps(self.settings), **arrays, **weights)

    @classmethod
    def load(cls, path: str) -> Task:
        """Read what `save` wrote."""
        with np.load(path) as file:
            named = {name: file[name] for name in file.files}
        weights = [name for name in named if name.startswith("initial/")]
        initial = {name.removeprefix("initial/"): named.pop(name) for name in weights}
        return cls(settings=json.loads(str(named.pop("settings"))), initial=initial, **named)


class Contest:
    """One contender's run, as the command line of its process describes it.

    Attributes:
        task: what to train.
        path: the task's file.
        seed: of everything random in this run, such as the order of batches.
        options: which variant of the contender runs.
    """

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("task")
        parser.add_argument("--weights", required=True, help="where the final weights go")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--options", type=json.loads, default={})
        parser.add_argument("--profile", help="where a profile of the turns goes; the times are then worth nothing")
        self._arguments = parser.parse_args()
        self.seed: int = self._arguments.seed
        self.options: dict[str, Any] = self._arguments.options
        # With several processes the first speaks for all: the others cannot leave it behind by more than a round.
        self._speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        # Libraries print what they like; the referee's channel stays clean.
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.path: str = self._arguments.task
        self.task = Task.load(self.path)
        self._turns = self.task.turns
        self._rounds = 0
        self._begun = False
        self._profile = cProfile.Profile() if self._arguments.profile else None
        self._started = 0.0

    def begun(self) -> None:
        """Training has got under way: the first round is over, or for one without rounds its first batch."""
        if not self._begun:
            self._begun = True
            self._say(begun=True)

    def round_over(self) -> None:
        """To be called at the same point of every round; waits here when the turn is over."""
        self.begun()
        self._rounds += 1
        if self._rounds < self._turns.warm_up:
            return
        turn, within = divmod(self._rounds - self._turns.warm_up, 1 + self._turns.rounds)
        if within == 0:
            if turn > 0:
                self._say(seconds=(time.perf_counter() - self._started) / self._turns.rounds)
            if turn < self._turns.number:
                self._wait()
        elif within == 1:
            self._started = time.perf_counter()

    def finish(self, weights: Mapping[str, Any], **notes: Any) -> None:
        """Hand in the trained model, by the torch model's parameter names, and what else is worth telling.

        Raises:
            RuntimeError: if the contender did not train for the task's number of rounds.
        """
        if not self._speaks:
            return
        if self._profile is not None:
            self._profile.disable()
            self._profile.dump_stats(self._arguments.profile)
        if self._rounds != self._turns.total:
            raise RuntimeError(f"{self._rounds} rounds were trained instead of {self._turns.total}")
        np.savez(self._arguments.weights, **{name: np.asarray(value) for name, value in weights.items()})
        self._say(finished=True, **notes)

    def _say(self, **message: Any) -> None:
        if self._speaks:
            self._channel.write(json.dumps(message) + "\n")
            self._channel.flush()

    def _wait(self) -> None:
        if self._speaks:
            self._say(ready=True)
            if sys.stdin.readline() != "go\n":
                sys.exit("the referee has left")
            if self._profile is not None:
                self._profile.enable()
