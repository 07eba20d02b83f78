"""Lets contenders take turns on one task and judges what they hand in.

A repeat starts every contender afresh, each in a process of its own with one thread and pinned to one core (one core
for each device); they come to their first wait one after the other, so that start-up is timed too. Then they take
turns, in a new random order each time, until the task is done; a contender's time in a repeat is its median turn. The
seed, and so the order of batches, is another one in every repeat.

Between its turns a contender is a stopped process: what its library does in the background costs the others nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pstats
import queue
import random
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from benchmarks.contenders import Contender
from benchmarks.contest import Turns
from benchmarks.tasks import Prepared

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
PATIENCE = 600  # Seconds that a contender may be silent.


class Failure(Exception):
    """A contender has no result; says why."""


class Result(NamedTuple):
    """What a contender achieved on a task, one entry for every repeat.

    Attributes:
        seconds: per round, for each repeat and each turn in it.
        start_up: seconds from the start of the process to the end of the first round.
        warm_up: seconds from there to the end of the warm-up.
        accuracy: of the final model.
        utilisation: mean share of the time that the GPU was busy during its turns; empty without one.
        notes: versions and whatever else the contender said of itself.
        failure: why there is nothing of the above; empty if there is.
    """

    seconds: list[list[float]]
    start_up: list[float]
    warm_up: list[float]
    accuracy: list[float]
    utilisation: list[float]
    notes: dict[str, Any]
    failure: str = ""

    @property
    def medians(self) -> list[float]:
        """Seconds per round in each repeat."""
        return [statistics.median(turns) for turns in self.seconds]


class Running:
    """A contender's process.

    Raises:
        Failure: from every method, if the contender has died or is silent for too long.
    """

    def __init__(self, contender: Contender, folder: Path, seed: int, profile: Path | None = None) -> None:
        self.name = contender.name
        self.weights = folder / f"{contender.name}.npz"
        self._log = folder / f"{contender.name}.log"
        command = [contender.python, "-m", contender.module, str(folder / "task.npz"), "--weights", str(self.weights)]
        command += ["--seed", str(seed), "--options", json.dumps(contender.options)]
        command += ["--profile", str(profile)] if profile else []
        cores = sorted(os.sched_getaffinity(0))[-contender.cores :]
        if len(cores) < contender.cores:
            raise Failure(f"needs {contender.cores} cores, {len(cores)} there")
        self._started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=one_thread(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )  # fmt: skip
        self._messages: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def begin(self) -> tuple[float, float]:
        """Wait until it is ready for its first turn; seconds to the end of its first round, and of its warm-up."""
        self._expect("begun")
        elapsed = time.perf_counter() - self._started
        self._expect("ready")
        warm_up = time.perf_counter() - self._started - elapsed
        self._signal(signal.SIGSTOP)
        return elapsed, warm_up

    def turn(self) -> float:
        """Let it take a turn; seconds per round."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return float(self._expect("seconds"))

    def between_turns(self) -> None:
        """Wait until it waits, and stop the process: some libraries are busy even then."""
        self._expect("ready")
        self._signal(signal.SIGSTOP)

    def finish(self) -> dict[str, Any]:
        """Wait for its result; what it has to say about itself."""
        message = self._message()
        if not message.pop("finished", False):
            raise Failure(f"said {message} in place of a result")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)  # It may have processes and files of its own to tidy away.
        return message

    def end(self) -> None:
        """Stop the process and all that it has started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        """To it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self._messages.put(line)
        self._messages.put("")

    def _expect(self, key: str) -> Any:
        message = self._message()
        if key not in message:
            raise Failure(f"said {message} in place of {key!r}")
        return message[key]

    def _message(self) -> dict[str, Any]:
        try:
            line = self._messages.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failure(f"no answer within {PATIENCE} seconds") from None
        if not line:
            raise Failure(last_words(self._log))
        message: dict[str, Any] = json.loads(line)
        return message


def prepare_cache() -> None:
    """A folder for environments and logs that git does not see."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other benchmark of this checkout measures at the same time."""
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def utilisation(samples: list[float]) -> Iterator[None]:
    """Meanwhile, append the share of the time that the first GPU is busy, five times a second."""
    over = threading.Event()
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def sample() -> None:
        while not over.wait(0.2):
            done = subprocess.run(query, capture_output=True, text=True)
            if done.returncode == 0:
                samples.append(float(done.stdout) / 100)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        over.set()
        sampler.join()


def one_thread() -> dict[str, str]:
    """This process's environment, with one thread for every library that asks it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    quiet = {"PYTHONWARNINGS": "ignore", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    places = {"PYTHONPATH": str(ROOT), "FLWR_HOME": str(CACHE / "flwr")}
    return {**os.environ, **dict.fromkeys(names, "1"), **flags, **quiet, **places}


def last_words(log: Path) -> str:
    """The error that a process died of, as far as its log tells: the last line that names one, or the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or ["ended without a word"])[-1][:200]


def compete(
    prepared: Prepared, contenders: Iterable[Contender], repeats: int, tell: Callable[[str], None]
) -> dict[str, Result]:
    """Run all contenders on a task, ``repeats`` times; those that fail once are not asked again."""
    contenders, name = list(contenders), prepared.task.settings["name"]
    results = {contender.name: Result([], [], [], [], [], {}, contender.missing()) for contender in contenders}
    prepare_cache()
    logs = CACHE / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        prepared.task.save(str(folder / "task.npz"))
        for repeat in range(repeats):
            able = [contender for contender in contenders if not results[contender.name].failure]
            tell(f"{name}, repeat {repeat + 1} of {repeats}: {', '.join(contender.name for contender in able)}")
            for one, outcome in together(able, folder, repeat, prepared).items():
                results[one] = extend(results[one], outcome)
        for log in folder.glob("*.log"):
            shutil.copy(log, logs)
    return results


def profile(prepared: Prepared, contender: Contender) -> Path:
    """Profile a contender's turns; where the functions that take most time are listed.

    Raises:
        Failure: if the contender fails.
    """
    prepare_cache()
    name = f"{prepared.task.settings['name']}-{contender.name}"
    (CACHE / "profiles").mkdir(parents=True, exist_ok=True)
    listing = CACHE / "profiles" / f"{name}.txt"
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        prepared.task.save(str(folder / "task.npz"))
        running = Running(contender, folder, 0, folder / "profile")
        try:
            running.begin()
            for turn in range(prepared.task.turns.number):
                running.turn()
                if turn + 1 < prepared.task.turns.number:
                    running.between_turns()
            running.finish()
        finally:
            running.end()
        with listing.open("w") as file:
            pstats.Stats(str(folder / "profile"), stream=file).strip_dirs().sort_stats("tottime").print_stats(40)
    return listing


def together(contenders: list[Contender], folder: Path, repeat: int, prepared: Prepared) -> dict[str, Result]:
    """One repeat: a result with one entry for each contender."""
    turns: Turns = prepared.task.turns
    running: dict[str, Running] = {}
    outcomes: dict[str, Result] = {}
    order = random.Random(repeat)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        """What ``action`` returns; a contender that fails is out of the game."""
        try:
            return action()
        except Failure as failure:
            outcomes[name] = Result([], [], [], [], [], {}, str(failure))
            if name in running:
                running.pop(name).end()
            return None

    gpu = prepared.task.settings["device"] == "cuda"
    busy: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    begun: dict[str, tuple[float, float]] = {}
    try:
        for contender in order.sample(contenders, len(contenders)):
            name = contender.name
            with alone():
                process = attempt(name, partial(Running, contender, folder, repeat))
                if process is not None:
                    running[name] = process
                    begun[name] = attempt(name, process.begin)
        for turn in range(turns.number):
            for name in order.sample(sorted(running), len(running)):
                with alone(), utilisation(busy.setdefault(name, [])) if gpu else contextlib.nullcontext():
                    seconds.setdefault(name, []).append(attempt(name, running[name].turn))
                    if turn + 1 < turns.number and name in running:
                        attempt(name, running[name].between_turns)
        for name in list(running):
            notes = attempt(name, running[name].finish)
            if name in running:
                with np.load(running[name].weights) as weights:
                    accuracy = prepared.accuracy(weights)
                share = [statistics.mean(busy[name])] if busy.get(name) else []
                outcomes[name] = Result([seconds[name]], [begun[name][0]], [begun[name][1]], [accuracy], share, notes)
    finally:
        for process in running.values():
            process.end()
    return outcomes


def extend(result: Result, outcome: Result) -> Result:
    """One more repeat; a failure leaves nothing of the earlier ones."""
    if outcome.failure:
        return outcome
    return Result(
        result.seconds + outcome.seconds,
        result.start_up + outcome.start_up,
        result.warm_up + outcome.warm_up,
        result.accuracy + outcome.accuracy,
        result.utilisation + outcome.utilisation,
        outcome.notes,
    )
