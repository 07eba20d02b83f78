"""The largest batch under a real memory limit: `MaxBatchProbe`, Lightning's `BatchSizeFinder`, and the truth.

    python -m benchmarks.probe                  six models on the CPU, four minutes
    python -m benchmarks.probe --promise        what the prediction alone promises, for ten published networks as well
                                                (pip install --no-deps pytorchcv)
    python -m benchmarks.probe --device cuda --precisions 32-true bf16-mixed
                                                the same on a GPU, to its own out-of-memory

On a CPU, every real step runs in a child process whose address space is limited to the budget, so that running out of
memory is real and harms nobody. Truth is found by bisection to out-of-memory. Predictions are made in children as well:
what they leave in a process, such as compiled code, is of no help to the steps that judge them.

Every model's rows are stored beside the page as soon as they are measured; `--models` measures these anew.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import batch_size_scaling
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale.callbacks import MaxBatchProbe
from lightning_fedscale.devices import estimate_memory
from lightning_fedscale.devices.profiling.dry_run import DryRun
from lightning_fedscale.devices.profiling.real_step import real_step
from lightning_fedscale.utils.memory import is_out_of_memory
from tests.networks import KINDS, Classifier, images

RESULT = Path(__file__).parent / "results" / "probe.md"
PROMISE = "## The promise of the prediction alone"
CEILING = 2**17  # the finder's own is 8192
MIB = 2**20


# Of pytorchcv: where a network is, what makes it, and the size of its images.
_PUBLISHED = [
    ("mobilenetv2", "mobilenetv2_w1", 64), ("mobilenetv3", "mobilenetv3_small_w1", 64),
    ("densenet_cifar", "densenet40_k12_cifar10", 32), ("resnext_cifar", "resnext20_16x4d_cifar10", 32),
    ("shufflenetv2", "shufflenetv2_wd2", 64), ("efficientnet", "efficientnet_b0", 224),
    ("ghostnet", "ghostnet", 64), ("seresnet_cifar", "seresnet20_cifar10", 32),
    ("nin_cifar", "nin_cifar10", 32), ("regnet", "regnetx002", 64),
]  # fmt: skip


_BUDGETS = {"ghostnet": 2**30, "efficientnet_b0": 2**31}  # of which at most a third is fixed; 512 MiB of the others


def published(file: str, name: str, size: int) -> tuple[Callable[[], nn.Module], Callable[[int], Any]]:
    """As `KINDS` has it."""

    def make() -> nn.Module:
        network: nn.Module = getattr(importlib.import_module(f"pytorchcv.models.{file}"), name)(
            num_classes=10, in_size=(size, size)
        )
        if hasattr(network.features, "final_pool"):  # of a fixed size, for larger images
            network.features.final_pool = nn.AdaptiveAvgPool2d(1)
        return network

    return make, lambda samples: images(samples, size)


ZOO = dict(KINDS)
if importlib.util.find_spec("pytorchcv") is not None:
    ZOO |= {name: published(file, name, size) for file, name, size in _PUBLISHED}


class Setting(NamedTuple):
    """What is to be found: the batch of a model on a device with so many bytes."""

    kind: str
    device: str
    budget: int
    precision: str

    @property
    def model(self) -> str:
        return self.kind if self.precision == "32-true" else f"{self.kind}, {self.precision}"


class Row(NamedTuple):
    """What one way of finding the batch did."""

    model: str
    budget: int
    how: str
    batch: int | None
    trials: int
    out_of_memory: int
    seconds: float


class Project(Classifier):
    """A module with a batch size and more samples than fit anywhere, which take no memory."""

    def __init__(self, kind: str) -> None:
        make, batch_of = ZOO[kind]
        super().__init__(make())
        self.batch_size = 2
        self._sample = [tensor[:1] for tensor in batch_of(1)]

    def train_dataloader(self) -> DataLoader[Any]:
        data = TensorDataset(*(tensor.expand(CEILING, *tensor.shape[1:]) for tensor in self._sample))
        return DataLoader(data, self.batch_size)


def trainer(setting: Setting, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator=setting.device, precision=setting.precision, devices=1, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **options,
    )  # type: ignore[arg-type]  # fmt: skip


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """A function's result, whose traces stay in a child; on CUDA, which cannot be forked, there is none."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return function(*args)
    with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(function, args)


def ours(setting: Setting, verify: bool) -> Row:
    # The run that follows the probe would need the memory: nothing is applied.
    probe = MaxBatchProbe(budget=setting.budget, headroom=0.1 if verify else 0.0, verify=verify, apply=False)
    trainer(setting, probe).fit(Project(setting.kind))
    assert probe.result is not None
    found = probe.result
    how = "MaxBatchProbe, verified, 10 % headroom" if verify else "MaxBatchProbe, predicted, no headroom"
    return Row(
        setting.model, setting.budget, how, found.max_batch, found.real_steps, found.out_of_memory, found.seconds
    )


def dry_run(setting: Setting) -> DryRun:
    """Gives real steps, of a process that has predicted nothing."""
    make, batch_of = ZOO[setting.kind]
    cuda = setting.device == "cuda"
    return DryRun(Classifier(make()).to(setting.device), batch_of(2), precision=setting.precision, cuda=cuda)


def finder(setting: Setting, mode: str) -> Row:
    """Lightning's own, in a child with the same limit (on CUDA: here)."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "found.json"
        started = time.perf_counter()
        step = _finder_step(setting, mode, note)
        if setting.device == "cpu":
            done = real_step(step, setting.budget, timeout=900)
            reason = done.reason
        else:
            step()
            reason = ""
        seconds = time.perf_counter() - started
        found = json.loads(note.read_text()) if note.exists() else {}
    how = f"BatchSizeFinder, {mode}" + (f" ({reason[:60]})" if reason else "")
    counts = found.get("batch"), found.get("trials", 0), found.get("out_of_memory", 0)
    return Row(setting.model, setting.budget, how, *counts, seconds)


def _finder_step(setting: Setting, mode: str, note: Path) -> Callable[[], None]:
    def step() -> None:
        counts = {"trials": 0, "out_of_memory": 0}
        is_oom, run = batch_size_scaling.is_oom_error, batch_size_scaling._try_loop_run

        def watch_errors(error: BaseException) -> bool:
            counts["out_of_memory"] += is_out_of_memory(error)  # also those that Lightning does not know
            note.write_text(json.dumps(counts))
            return is_oom(error)

        def watch_runs(*arguments: Any) -> None:
            counts["trials"] += 1
            note.write_text(json.dumps(counts))
            run(*arguments)

        batch_size_scaling.is_oom_error, batch_size_scaling._try_loop_run = watch_errors, watch_runs
        try:
            search = BatchSizeFinder(mode=mode, max_val=CEILING)
            search.optimal_batch_size = None  # until it has found one; it says 2 from the start
            # One step of training follows the search, which is not to decide what is reported.
            try:
                trainer(setting, search, default_root_dir=note.parent).fit(Project(setting.kind))
            except RuntimeError as error:
                if search.optimal_batch_size is None or not is_out_of_memory(error):
                    raise
            note.write_text(json.dumps({**counts, "batch": search.optimal_batch_size}))
        finally:
            batch_size_scaling.is_oom_error, batch_size_scaling._try_loop_run = is_oom, run

    return step


def truth(setting: Setting, start: int, step_of: Callable[[int], Callable[[], None]], *, exact: float = 0.0) -> Row:
    """The largest batch that fits, to a share of it."""
    if setting.device == "cpu":

        def fits(batch: int) -> bool:
            return real_step(step_of(batch), setting.budget).fits
    else:

        def fits(batch: int) -> bool:
            try:
                step_of(batch)()
            except torch.OutOfMemoryError:
                return False
            finally:
                torch.cuda.empty_cache()
            return True

    started, trials, low, high = time.perf_counter(), 0, 1, max(2, start)
    while fits(high) and high < 16 * CEILING:
        low, high, trials = high, high + max(1, high // 4), trials + 1
    while not fits(low):
        low, high, trials = low // 2, low, trials + 1
    while high - low > max(1, exact * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Row(setting.model, setting.budget, "truth, by bisection", low, 0, 0, time.perf_counter() - started)


def measure(setting: Setting) -> list[Row]:
    predicted, verified = (in_child(ours, setting, verify) for verify in (False, True))
    # The probe is not limited: the module itself stays in memory beside the copy that it measures.
    with limited(setting):
        rows = [predicted, verified, *(finder(setting, mode) for mode in ("power", "binsearch"))]
    step_of = dry_run(setting).real_step
    with limited(setting):
        return [*rows, truth(setting, verified.batch or 2, step_of)]


class Kept(NamedTuple):
    """How the batch that was only predicted to fit with 10 % headroom went in truth.

    Attributes:
        budget: bytes.
        fixed: share of the budget that a step takes before its first sample, as predicted.
        batch: that batch.
        needed: of the budget, by a real step.
        true: largest batch with which real steps fit the budget.
        seconds: of the prediction.
    """

    model: str
    budget: int
    fixed: float
    batch: int
    needed: float
    true: int
    seconds: float


def kept(setting: Setting) -> Kept:
    fixed, batch, seconds = in_child(_predicted, setting)
    step_of = dry_run(setting).real_step
    taken = real_step(step_of(batch), 2 * setting.budget).peak_bytes
    true = truth(setting, batch, step_of, exact=0.01).batch
    assert taken is not None
    assert true is not None
    return Kept(setting.model, setting.budget, fixed / setting.budget, batch, taken / setting.budget, true, seconds)


def _predicted(setting: Setting) -> tuple[int, int, float]:
    make, batch_of = ZOO[setting.kind]
    started = time.perf_counter()
    model = estimate_memory(Classifier(make()), batch_of(2), precision=setting.precision)
    batch = model.max_batch(setting.budget, headroom=0.1)
    seconds = time.perf_counter() - started
    parts = model.breakdown(batch)
    of_samples = sum(parts[part] for part in ("activations", "temporaries", "batch"))
    return sum(parts.values()) - of_samples, batch, seconds


def promise(rows: list[Kept]) -> str:
    lines = [
        PROMISE,
        f"\ncpu, AdamW, torch {torch.__version__}; made by `python -m benchmarks.probe --promise`. No real step takes"
        " part in the choice (`verify=False`, `headroom=0.1`). What the chosen batch needs is measured afterwards, and"
        " the largest batch that fits the whole budget is found by bisection, to 1 %, in processes that have run"
        " nothing else. What a step takes before its first sample (parameters, gradients, optimizer state, code that"
        " oneDNN compiles) is fixed: ten percent of the budget left free are more of what is left for samples, so 0.85"
        " of the true maximum can be promised where at most a third of the budget is fixed, and where tens of samples"
        " fit. Memory is address space, of which each kernel takes 256 KiB and touches few, so that a limit on"
        " resident memory leaves more. Buffers of up to 9 MiB, in which MKL packs the factors of products, are left"
        " to the headroom: budgets below 100 MiB need more of it. Seconds are those of a busy machine.\n",
        "| model | budget, MiB | of it fixed | predicted largest batch | needed of the budget | true largest batch |"
        " of the true one | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.model} | {row.budget / MIB:.0f} | {row.fixed:.2f} | {row.batch} | {row.needed:.2f} | {row.true} |"
        f" {row.batch / row.true:.2f} | {row.seconds:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    true = {row.model: row.batch for row in rows if row.how.startswith("truth")}
    lines = [
        "| model | found by | largest batch | of the truth | real trials | out of memory | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = f"{row.batch / true[row.model]:.2f}" if row.batch and true[row.model] else ""
        trials = "" if row.how.startswith("truth") else f"{row.trials} | {row.out_of_memory}"
        lines.append(
            f"| {row.model} | {row.how} | {row.batch if row.batch else 'none'} | {share} |"
            f" {trials or ' | '} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--budget", type=int, help="bytes; if not given, some that hold tens of samples; on CUDA, what is free"
    )
    parser.add_argument("--precisions", nargs="+", default=["32-true"], help="as of a Trainer: 32-true bf16-mixed")
    parser.add_argument("--models", nargs="+", choices=ZOO)
    parser.add_argument("--promise", action="store_true", help="only what the prediction alone promises, on the CPU")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here.")
    else:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    part = "promise" if args.promise else f"found, {args.device}"
    names = args.models or list(ZOO if args.promise else KINDS)
    for precision in args.precisions:
        for kind in names:
            setting = Setting(kind, args.device, _budget(args.budget, args.device, kind), precision)
            rows = [kept(setting)] if args.promise else measure(setting)
            store(args.output, part, setting.model, [list(row) for row in rows])
            for row in rows:
                print(*row, sep="\t", flush=True)
    print(f"Written: {args.output}")


def _budget(given: int | None, device: str, kind: str) -> int:
    if device == "cpu":
        return given or (2**28 if kind in KINDS else _BUDGETS.get(kind, 2**29))
    return given or torch.cuda.mem_get_info()[0]


@contextmanager
def limited(setting: Setting) -> Iterator[None]:
    """Make the budget a limit of this process's memory on a CUDA device, besides what is there already."""
    if setting.device == "cpu":  # there, children are limited
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = setting.budget + torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def store(page: Path, part: str, model: str, rows: list[Any]) -> None:
    """Put a model's rows beside the page, and write the page anew."""
    beside = page.with_suffix(".json")
    stored = json.loads(beside.read_text()) if beside.exists() else {"older": {}}
    stored.setdefault(part, {})[model] = rows
    stored["older"] = {each: [m for m in of if (each, m) != (part, model)] for each, of in stored["older"].items()}
    beside.write_text(json.dumps(stored, indent=1) + "\n")
    texts = ["# The largest batch that fits\n"]
    for device in ("cpu", "cuda"):
        if of_models := stored.get(f"found, {device}"):
            texts.append(found(device, [Row(*row) for rows in of_models.values() for row in rows]))
            texts += _older(stored, f"found, {device}")
    if "found, cuda" not in stored:
        texts.append("The same table of a GPU: not run.\n")
    if of_models := stored.get("promise"):
        texts.append(promise([Kept(*row) for name in sorted(of_models, key=_place) for row in of_models[name]]))
        texts += _older(stored, "promise")
    page.write_text("\n".join(texts))


def _older(stored: dict[str, Any], part: str) -> list[str]:
    models = stored["older"].get(part)
    return [f"Rows of an older version, not measured again since: {', '.join(models)}.\n"] if models else []


def _place(model: str) -> int:
    return [model.partition(",")[0] == kind for kind in ZOO].index(True)


def found(device: str, rows: list[Row]) -> str:
    return (
        f"{device}, budget {rows[0].budget / MIB:.0f} MiB, AdamW, torch {torch.__version__}; made by `python -m"
        " benchmarks.probe`. Real trials of MaxBatchProbe are single steps (with optimizer state: two), those of"
        " BatchSizeFinder three steps each. 'Of the truth' above 1 means that training would run out of memory.\n\n"
        f"{table(rows)}\n"
    )


if __name__ == "__main__":
    main()
