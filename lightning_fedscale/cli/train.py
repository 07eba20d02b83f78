"""``fedscale train``: a Hydra application over any LightningModule and its data."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_fedscale.cli.errors import INTERRUPTED, exit_after_broken_pipe, is_interruption
from lightning_fedscale.cli.files import made
from lightning_fedscale.core.lightning.handover import starts_by_command
from lightning_fedscale.core.options.trainer_checks import is_user_error
from lightning_fedscale.partitioners.registry import is_file
from lightning_fedscale.types import NAMESPACES
from lightning_fedscale.utils.checks import integer

_FREE = re.compile(r"(model|data|trainer)\.")
_UNIONS = (Union, UnionType)
_CHECKPOINTS = ("last", "hpc")  # Lightning finds these itself
_DIGITS = "lightning_fedscale.cli.digits.Classifier"
_OWN = re.compile(r"(model|data)\._target_=")


class Refused(CompactHydraException):
    """An error that the user can fix: Hydra prints its message without a traceback, and exits with 1."""


def train(arguments: Sequence[str]) -> int:
    """Run ``fedscale train``.

    Args:
        arguments: the arguments after ``fedscale train``, in Hydra's syntax.

    Returns:
        The exit code: 0, 1 if the request cannot be fulfilled, or 130 after Ctrl-C. Invalid flags exit with 2.
    """
    before = sys.argv

    def run(config: DictConfig) -> float | None:
        # Lightning starts the other processes with this command line, so it must be that of one run, not of a sweep.
        sys.argv = [before[0], "train", *HydraConfig.get().overrides.task]
        return _run(config)

    sys.argv = ["fedscale train", *_overrides(arguments)]
    try:
        _check_folders(arguments)
        with _help() if {"-h", "--help"} & set(arguments) else nullcontext():
            hydra.main(config_path="pkg://lightning_fedscale.conf", config_name="train", version_base="1.3")(run)()
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stopped:
        if is_interruption(stopped):
            return _interrupted()
        if hint := _did_you_mean(stopped.__context__):
            print(hint, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    finally:
        sys.argv = before
    return 0


def _interrupted() -> int:
    print("fedscale train: interrupted.", file=sys.stderr)
    return INTERRUPTED


def _check_folders(arguments: Sequence[str]) -> None:
    """Create Hydra's output folders here, since Hydra shows a traceback if it cannot create them."""
    if any(each.startswith("-") and each not in ("-m", "--multirun", "--json") for each in arguments):
        return  # other flags, such as --cfg job, may not run anything
    for name, _, folder in (each.partition("=") for each in arguments):
        if name in ("hydra.run.dir", "hydra.sweep.dir") and "$" not in folder:
            try:
                made(name, folder.strip("'\""))
            except ValueError as error:
                raise Refused(f"fedscale train: {error}") from error


def _did_you_mean(error: BaseException | None) -> str:
    """Suggest an existing key for one that does not exist."""
    cause = None if error is None else error.__cause__ or error
    key, parent = getattr(cause, "key", None), getattr(cause, "parent_node", None)
    close = get_close_matches(str(key), list(map(str, parent)), n=1) if isinstance(parent, DictConfig) else []
    return f"Did you mean {close[0]}?" if close else ""


@contextmanager
def _help() -> Iterator[None]:
    """Hide the groups of ``trainer/strategy`` in the help: they repeat ``strategy``, for other applications."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        print("".join(line for line in text.getvalue().splitlines(True) if not line.startswith("trainer/strategy")))


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Convert arguments to Hydra's syntax; a custom class does not inherit the arguments of the digits.

    Example:
        >>> _overrides(["model._target_=my.Module", "model.depth=2,4", "-m", "strategy.num_clients=3"])
        ['-m', 'model=own', '++model._target_=my.Module', '++model.depth=2,4', 'strategy.num_clients=3']
        >>> _overrides(["--cfg", "job", "model._target_=my.Module"])
        ['--cfg', 'job', 'model=own', '++model._target_=my.Module']
        >>> _overrides(["--json", "seed=1"])
        ['json=true', 'seed=1']
        >>> _overrides(["--partition", "hospitals.json", "seed=1"])
        ["strategy.partitioner='hospitals.json'", 'seed=1']
    """
    arguments = _of_partition(arguments)
    arguments = ["json=true" if each == "--json" else each for each in arguments]
    own = dict.fromkeys(found[1] for each in arguments if (found := _OWN.match(each)))
    chosen = {each.partition("=")[0] for each in arguments}
    groups = [f"{name}=own" for name in own if name not in chosen]
    flags = [each for each in arguments if each in ("-m", "--multirun")]  # argparse accepts no flag between overrides
    others = [f"++{each}" if _FREE.match(each) else each for each in arguments if each not in flags]
    first = next((i for i, each in enumerate(others) if "=" in each and not each.startswith("-")), len(others))
    return [*flags, *others[:first], *groups, *others[first:]]


def _of_partition(arguments: Sequence[str]) -> list[str]:
    """Convert the flag ``--partition`` of the other commands to an override."""
    found: list[str] = []
    rest = iter(arguments)
    for each in rest:
        name, _, value = each.partition("=")
        if name == "--partition" and (value := value or next(rest, "")):
            each = f"strategy.partitioner='{value}'"
        found.append(each)
    return found


def _run(config: DictConfig) -> float | None:
    """Train, test if requested, and print the metrics.

    Returns:
        The value of ``optimized_metric`` for a sweeper; None without one.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise Refused(f"fedscale train: {missing[0]} has no default here: pass {missing[0]}=...")
    path = config.ckpt_path
    if path is not None and path not in _CHECKPOINTS and "://" not in path and not Path(path).exists():
        raise Refused(f"fedscale train: ckpt_path={path!r}: there is no such file.")
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        trainer, metrics = _fit(config)
    if trainer.is_global_zero:
        try:
            (_print if config.json else _show)(metrics, HydraConfig.get().runtime.output_dir)
        except BrokenPipeError:
            sys.exit(exit_after_broken_pipe())  # without this, Hydra would show a traceback
    return _optimized(metrics, config.optimized_metric)


def _fit(config: DictConfig) -> tuple[pl.Trainer, dict[str, float]]:
    if config.seed is not None:
        with _short_errors():
            pl.seed_everything(integer("seed", config.seed, 0, 2**32 - 1), workers=True, verbose=False)
    unnamed = _unnamed_data(config)
    data = None if unnamed else _make(config, "data", pl.LightningDataModule)
    model = _make(config, "model", pl.LightningModule)
    if unnamed and not is_overridden("train_dataloader", model):
        raise Refused(
            f"fedscale train: model._target_={config.model._target_} needs its data: pass data._target_=..., or"
            " data=digits to take the digits."
        )
    trainer = _trainer(config)
    hyperparameters = OmegaConf.to_container(config, resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(hyperparameters)  # type: ignore[arg-type]
    with _short_errors():
        trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
        metrics = _numbers(trainer)
        if config.test:
            trainer.test(model, datamodule=data, verbose=False)
            metrics |= _numbers(trainer)
    return trainer, metrics


def _unnamed_data(config: DictConfig) -> bool:
    """Return whether the model is custom but the data is the default, which is for the model of the digits."""
    choices, overrides = HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task
    default = choices.get("data") == "digits" and "data=digits" not in overrides
    return default and OmegaConf.select(config, "model._target_") not in (None, _DIGITS)


def _trainer(config: DictConfig) -> pl.Trainer:
    if _names_a_file(config):
        config.strategy.num_clients = None  # drop the default, since the file has its own number
    if (clients := OmegaConf.select(config, "strategy.num_clients")) is not None:
        with _short_errors():  # checked here, since the partitioner's argument has another name
            integer("strategy.num_clients", clients)
    strategy = _make(config, "strategy", pl.strategies.Strategy)
    # Objects are passed directly, since the configuration would copy them.
    objects: dict[str, Any] = {} if strategy is None else {"strategy": strategy}
    objects["callbacks"] = [_make(config, f"callbacks.{name}", pl.Callback) for name in config.get("callbacks") or ()]
    loggers = [_make(config, f"logger.{name}", pl.loggers.Logger) for name in config.get("logger") or ()]
    _check_trainer(config.trainer)
    with _short_errors("trainer: "):
        trainer: pl.Trainer = instantiate(config.trainer, _partial_=True)(**objects, logger=loggers or False)
    _check_processes(trainer)
    return trainer


def _names_a_file(config: DictConfig) -> bool:
    """Return whether the partitioner is a file and no number of clients is passed."""
    partitioner = OmegaConf.select(config, "strategy.partitioner")
    if OmegaConf.is_dict(partitioner):
        partitioner = partitioner.get("path")
    asked = any(each.lstrip("+").startswith("strategy.num_clients=") for each in HydraConfig.get().overrides.task)
    return isinstance(partitioner, str) and is_file(partitioner) and not asked


def _check_trainer(config: DictConfig) -> None:
    """Check the types of the Trainer's arguments, since Lightning checks few of them early."""
    hints = get_type_hints(pl.Trainer.__init__)
    for name, value in ((str(name), value) for name, value in config.items()):
        admitted = _classes(hints.get(name))
        if admitted and isinstance(value, (str, bool, int, float)) and not isinstance(value, admitted):
            wanted = " or ".join(sorted({each.__name__ for each in admitted if each is not type(None)}))
            raise Refused(f"fedscale train: trainer.{name}={value!r}: pass {wanted}.")


def _classes(hint: Any) -> tuple[type, ...]:
    """Return the classes that a type hint admits; none if it contains anything but classes.

    Example:
        >>> _classes(int | None), _classes(Any)
        ((<class 'int'>, <class 'NoneType'>), ())
    """
    parts = [get_origin(each) or each for each in (get_args(hint) if get_origin(hint) in _UNIONS else (hint,))]
    if Any in parts or not all(isinstance(each, type) for each in parts):
        return ()
    return (*parts, int) if float in parts else tuple(parts)


def _check_processes(trainer: pl.Trainer) -> None:
    strategy: Any = trainer.strategy
    if (
        HydraConfig.get().mode == RunMode.MULTIRUN
        and starts_by_command(strategy)
        and not strategy.cluster_environment.creates_processes_externally
    ):
        raise Refused(
            f"fedscale train: {trainer.world_size} devices with --multirun: processes that Lightning starts by command"
            " live as long as this one. Pass strategy.start_method=fork, or spawn where there are GPUs."
        )


def _make(config: DictConfig, name: str, kind: type[Any]) -> Any:
    """Instantiate a part of the configuration; None if it is missing."""
    node = OmegaConf.select(config, name)
    if node is None:
        return None
    with _short_errors(f"{name}: "):
        found = instantiate(node)
    if not isinstance(found, kind):
        what = type(found).__name__
        raise Refused(
            f"fedscale train: {name}._target_={node.get('_target_')}: this is a {what}. Pass a {kind.__name__}."
        )
    return found


@contextmanager
def _short_errors(what: str = "") -> Iterator[None]:
    """Report errors of arguments by their message only; errors of the module and its data keep a traceback."""
    try:
        yield
    except CompactHydraException as error:
        cause = error.__cause__ or error
        raise Refused(f"fedscale train: {what}{cause}") from error
    except (TypeError, ValueError, MisconfigurationException) as error:
        if not what and not is_user_error(error):
            raise
        raise Refused(f"fedscale train: {what}{error}") from error


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _optimized(metrics: dict[str, float], name: str | None) -> float | None:
    if name is not None and name not in metrics:
        raise Refused(
            f"fedscale train: optimized_metric={name!r} was not logged; there are {', '.join(sorted(metrics))}."
        )
    return None if name is None else metrics[name]


def _print(metrics: dict[str, float], folder: str) -> None:
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    print(json.dumps({"run": folder, "metrics": known}), flush=True)


def _show(metrics: dict[str, float], folder: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("Metric", "Last value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        if name.partition("/")[0] not in NAMESPACES:  # metrics of rounds and callbacks were shown during training
            table.add_row(name, f"{value:.4g}")
    if table.rows:
        console.print(table)
    console.print(f"Run: {folder}")
