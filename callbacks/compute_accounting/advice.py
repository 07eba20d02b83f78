"""Commands to print at the end of a run without a study or a law: a study of this project, or a sweep.

They can be run as printed, and name the run's own arguments, clients, partition and compute.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import nn

from lightning_fedscale.core.user_code.objects import is_installed
from lightning_fedscale.partitioners import FilePartitioner, Partitioner
from lightning_fedscale.partitioners.registry import name_of
from lightning_fedscale.scaling.project import LEVELS, sweep_command
from lightning_fedscale.scaling.tuning import RATES
from lightning_fedscale.strategy import FederatedStrategy

_SIZES = ("size", "width", "hidden_size", "hidden_dim", "d_model", "n_embd", "dim", "channels", "depth", "num_layers")
"""Usual names of the argument that sets a module's size."""
_LARGER = re.compile(r"width|hidden|depth|size|dim|channels|features|units|embd|d_model|layers")
_FIXED = re.compile(r"(^|_)(in|out|input|output|num|n|vocab|image|img|batch|kernel|patch|seq|target)(_|$)|classes")
_FOLDER = "fedscale_sweep"
_SCRIPTS = ("__main__", "__mp_main__")  # a script's module in its own process, and in those that it spawns


def sweep_advice(trainer: pl.Trainer, module: pl.LightningModule, flops: float) -> str:
    """Return how to get a study of these clients, or a law of this task, in words and as commands.

    Args:
        trainer: Trainer of the run.
        module: module of the run.
        flops: FLOPs of the run, which are also those of the study and of the sweep's largest runs.
    """
    arguments = inspect.signature(type(module)).parameters
    argument = next((name for name in _SIZES if name in arguments), None)
    given = _missing(arguments, argument)
    if (argument is None or given) and (command := _multirun(trainer, module, flops)) is not None:
        return f"This trains a sweep that can identify a law, and fits it:\n    {command}"
    data: Any = getattr(trainer, "datamodule", None)
    path, data_path = _path(module), _path(data)
    stands: list[str] = []
    if given or not arguments:
        argument, path = "size", _function(module, "make", " of size", _missing(arguments, None), stands)
    else:
        if argument is None:
            stands.append("NAME is the module's argument that makes it larger")
        if path is None:
            stands.append("my_package.MyModule is the module's class, in a file that can be imported")
    if data_path is None:
        stands.append("my_package.MyDataModule is a LightningDataModule with a validation loader")
    else:
        takes = inspect.signature(type(data)).parameters
        # A data module of an installed package was given the data, so all its arguments are needed.
        if needed := list(takes) if is_installed(type(data).__module__) else _missing(takes, None):
            data_path = _function(data, "make_data", "", needed, stands)
    current = _value(module, argument)
    of_run = [*_flags("module", module, path, argument), *_flags("data", data, data_path)]
    clients = _clients(trainer, stands)
    named = f", where {'; '.join(stands)}" if stands else ""
    sweep = sweep_command(
        path, data_path, flops, argument or "NAME", sizes=_around(current), more=[*clients.sweep, *of_run]
    )
    law = f"This trains the smallest sweep that can identify a law, and fits it{named}:\n    {sweep}"
    if not clients.size:
        return law
    size = " ".join([
        f"fedscale size --module {path or 'my_package.MyModule'} --data {data_path or 'my_package.MyDataModule'}",
        f"--argument {argument or 'NAME'}", *([] if current is None else [f"--current {current}"]),
        f"--flops {flops:.2g}", *clients.size, *of_run,
    ])  # fmt: skip
    return f"This measures the best size, method and batch for these clients{named}:\n    {size}\n{law}"


class _Clients(NamedTuple):
    """Command-line flags that describe the run's clients: for a study, and for a sweep."""

    size: list[str]
    sweep: list[str]


def _clients(trainer: pl.Trainer, stands: list[str]) -> _Clients:
    strategy = trainer.strategy
    if not isinstance(strategy, FederatedStrategy) or strategy.partition is None:
        return _Clients([], ["--clients '[1,4]'"])
    number, cohort, given = strategy.partition.num_clients, strategy.cohort_size, strategy.partitioner
    in_round = [] if cohort == number else [f"--clients_per_round {cohort}"]
    if isinstance(given, FilePartitioner):
        flag = f"--partition {shlex.quote(given.path)}"
        return _Clients([flag, *in_round], [flag])
    name = name_of(given) if isinstance(given, Partitioner) else None
    if name is not None:
        division = [] if name == "iid" else [f"--partition {name}"]
        several = f"--clients '[1,{cohort}]'" if cohort != 1 else "--clients '[1,4]'"
        return _Clients([*division, f"--clients {number}", *in_round], [several, *division])
    stands.append(f"{_SAVED} is what trainer.strategy.partition.save('{_SAVED}') writes")
    return _Clients([f"--partition {_SAVED}", *in_round], [f"--partition {_SAVED}"])


_SAVED = "clients.json"


def _value(module: pl.LightningModule, argument: str | None) -> int | None:
    """Return the size of this module, if it is an attribute or hyperparameter."""
    if argument is None:
        return None
    found = module.hparams.get(argument, getattr(module, argument, None))
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _around(current: int | None) -> list[int]:
    """Return five sizes that span at least a decade in parameters."""
    if current is None:
        return [8, 16, 32, 64, 128]
    return sorted({max(1, round(current * factor)) for factor in (0.125, 0.25, 0.5, 1, 2)})


def _flags(what: str, made: Any, path: str | None, but: str | None = None) -> list[str]:
    """Return the hyperparameters that were passed to a class, as flags."""
    arguments = getattr(made, "hparams", None)
    if path is None or path != _path(made) or not arguments:
        return []
    takes = inspect.signature(type(made)).parameters
    given = {
        name: value for name, value in arguments.items()
        if name != but and name in takes and isinstance(value, (bool, int, float, str))
        and repr(value) != repr(takes[name].default)  # by repr, since comparing an array gives no single boolean
    }  # fmt: skip
    return [f"--{what}.{name}={shlex.quote(str(value))}" for name, value in given.items()]


def _function(what: object, name: str, of: str, given: list[str], stands: list[str]) -> str:
    """Return the path of a function that the user is to add, and explain it; it is never in an installed package."""
    path, module = _path(what), type(what).__module__
    function = f"{'my_package' if path is None or is_installed(module) else module}.{name}"
    makes = f"makes {'the module' if path is None else path}" + (f" with its {', '.join(given)}" if given else "")
    stands.append(f"{function} is a function{of} that you add, which {makes}")
    return function


def _missing(arguments: Mapping[str, inspect.Parameter], known: str | None) -> list[str]:
    """Return the required arguments except ``known``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name for name, each in arguments.items() if each.kind in kinds and each.default is each.empty and name != known
    ]


def _path(what: object) -> str | None:
    """Return the import path of an object's class; None if it cannot be imported."""
    of = type(what)
    is_elsewhere = what is not None and of.__module__ not in _SCRIPTS and "<" not in of.__qualname__
    return f"{of.__module__}.{of.__qualname__}" if is_elsewhere else None


# ---- projects that Hydra configures


def _multirun(trainer: pl.Trainer, module: pl.LightningModule, flops: float) -> str | None:
    """Return a sweep of the project's own script over sizes, compute, clients, learning rates; None without Hydra."""
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return None
    hydra: Any = HydraConfig.get()
    folder = OmegaConf.select(hydra, "runtime.output_dir")  # missing if a configuration is composed outside of a run
    file = Path(folder or "", hydra.output_subdir or "", "config.yaml")
    if folder is None or not file.is_file():
        return None
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    nodes = dict(_nodes(config, ""))
    size = _size(nodes, module)
    counts = next((key for key, node in nodes.items() if node["_target_"].endswith("ComputeAccounting")), None)
    if size is None or counts is None:
        return None
    swept = {**size, f"++{counts}.max_flops": ",".join(f"{flops * level:.2g}" for level in LEVELS)}
    rate = next(
        ((f"{key}.{name}", node[name]) for key, node in nodes.items() for name in RATES if name in node),
        None,
    )
    if rate is not None and isinstance(rate[1], (int, float)):
        swept[rate[0]] = ",".join(f"{rate[1] * factor:g}" for factor in (0.5, 1.0, 2.0))
    if (strategy := next((key for key, node in nodes.items() if "num_clients" in node), None)) is not None:
        swept |= {f"{strategy}.num_clients": "1,4", f"++{strategy}.clients_per_round": "null"}
    swept["++trainer.max_epochs" if "trainer" in nodes else "++max_epochs"] = "-1"
    if isinstance(config, dict) and "logger" in config and not trainer.loggers:
        swept["logger"] = "csv"
    swept["hydra.sweep.dir"] = _FOLDER
    names = {name.lstrip("+") for name in swept}
    kept = [
        each for each in (*hydra.overrides.hydra, *hydra.overrides.task)
        if each.split("=")[0].lstrip("+") not in {*names, "hydra.mode", "hydra.run.dir"}
    ]  # fmt: skip
    line = [*_script(hydra.runtime.cwd), "-m", *kept, *(f"{name}={value}" for name, value in swept.items())]
    loss = next((name for name in trainer.callback_metrics if re.search(r"val.*loss|loss.*val", name)), None)
    law = f"fedscale fit {_FOLDER}" + ("" if loss is None else f" --loss={loss}")
    return f"{shlex.join(line)} && {law}"


def _script(folder: str) -> list[str]:
    script = Path(sys.argv[0])
    if script.name == "fedscale":
        return ["fedscale", "train"]
    at = script.resolve()
    return ["python", str(at.relative_to(folder) if at.is_relative_to(folder) else at)]


def _nodes(config: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all nodes with a ``_target_``, with their paths."""
    if not isinstance(config, dict):
        return
    if "_target_" in config:
        yield path, config
    for name, part in config.items():
        yield from _nodes(part, f"{path}.{name}" if path else str(name))


def _size(nodes: Mapping[str, dict[str, Any]], module: pl.LightningModule) -> dict[str, str] | None:
    """Return the argument that sets the model's size, with five values; other widths of the network follow it."""
    from hydra.utils import get_class

    parts = [type(part) for part in module.modules() if isinstance(part, nn.Module)]
    for key, node in nodes.items():
        try:
            is_part = get_class(node["_target_"]) in parts
        except Exception:
            continue  # a function
        names = [
            name for name, value in node.items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1
            and _LARGER.search(name) and not _FIXED.search(name)
        ]  # fmt: skip
        if is_part and names:
            first, *others = sorted(names, key=lambda name: _SIZES.index(name) if name in _SIZES else len(_SIZES))
            widths = [name for name in others if "layers" not in name and "depth" not in name]
            values = sorted({max(1, round(node[first] * factor)) for factor in (0.25, 0.5, 1, 2, 4)})
            follow = {f"{key}.{name}": f"${{{key}.{first}}}" for name in widths}
            return {f"{key}.{first}": ",".join(map(str, values)), **follow}
    return None
