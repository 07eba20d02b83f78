"""Old module names from before 0.1.0: for one release, each is an alias of the module at its new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "lightning_fedscale."

MOVED = {
    "callbacks.client_metrics_data": "callbacks.client_metrics.data",
    "callbacks.client_metrics_ranks": "callbacks.client_metrics.table",
    "callbacks.client_metrics_report": "callbacks.client_metrics.report",
    "callbacks.client_metrics_twin": "callbacks.client_metrics.module_copy",
    "callbacks.compute_advice": "callbacks.compute_accounting.advice",
    "callbacks.compute_counting": "callbacks.compute_accounting.counting",
    "callbacks.compute_report": "callbacks.compute_accounting.report",
    "callbacks.compute_run": "callbacks.compute_accounting.run_facts",
    "callbacks.compute_study": "callbacks.compute_accounting.study",
    "callbacks.compute_task": "callbacks.compute_accounting.task", "energy": "callbacks.compute_accounting.energy",
    "metering": "callbacks.compute_accounting.flop_meter",
    "model_size": "callbacks.compute_accounting.parameter_counts",
    "callbacks.phase_client_steps": "callbacks.critical_phase.client_steps",
    "callbacks.phase_gradients": "callbacks.critical_phase.gradients",
    "callbacks.phase_optimizers": "callbacks.critical_phase.optimizers",
    "callbacks.phase_record": "callbacks.critical_phase.history",
    "callbacks.phase_rounds": "callbacks.critical_phase.rounds",
    "callbacks.phase_steps": "callbacks.critical_phase.steps",
    "update_scaling": "callbacks.critical_phase.update_scaling",
    "cli.reports": "cli.run_page", "cli.told": "cli.errors", "report": "cli.run_page",
    "report.charts": "cli.run_page.charts", "report.facts": "cli.run_page.facts", "report.page": "cli.run_page.page",
    "report.run": "cli.run_page.run", "report.sections": "cli.run_page.sections",
    "cli.reports.charts": "cli.run_page.charts", "cli.reports.facts": "cli.run_page.facts",
    "cli.reports.page": "cli.run_page.page", "cli.reports.run": "cli.run_page.run",
    "cli.reports.sections": "cli.run_page.sections",
    "clients": "core.client_state", "executors": "core.executors", "rounds": "core.plan",
    "clients.optimizers": "core.client_state.optimizers", "clients.states": "core.client_state.states",
    "clients.store": "core.client_state.store", "custody": "core.client_state.placement",
    "executors.cache": "core.executors.device_cache", "executors.choice": "core.executors.auto",
    "executors.correction": "core.executors.correction", "executors.exchange": "core.executors.shared_tensors",
    "executors.lean": "core.executors.fast_step", "executors.loader": "core.executors.loader",
    "executors.loops": "core.executors.local_step", "executors.meter": "core.executors.meter",
    "executors.sequential": "core.executors.sequential", "executors.transfer": "core.executors.transfer",
    "executors.capture": "core.executors.vectorized.graph_capture",
    "executors.clipping": "core.executors.vectorized.clipping", "executors.draws": "core.executors.vectorized.rng",
    "executors.obstacles": "core.executors.vectorized.eligibility",
    "executors.proof": "core.executors.vectorized.proof",
    "executors.recordings": "core.executors.vectorized.captured_steps",
    "executors.rows": "core.executors.vectorized.rows",
    "executors.side_by_side": "core.executors.vectorized.batched_step",
    "executors.stacked_optimizer": "core.executors.vectorized.optimizer",
    "executors.stacking": "core.executors.vectorized.stacking",
    "executors.vectorized": "core.executors.vectorized", "executors.wave": "core.executors.vectorized.wave",
    "checkpointing": "core.lightning.checkpoint", "executors.client_log": "core.lightning.client_log",
    "executors.hooks": "core.lightning.hooks", "executors.log_ranks": "core.lightning.log_ranks",
    "executors.snapshots": "core.lightning.snapshots", "half_batches": "core.lightning.half_batch_gradients",
    "handover": "core.lightning.handover", "loggers": "core.lightning.loggers",
    "module_flags": "core.lightning.module_flags", "monitors": "core.lightning.monitors",
    "progress": "core.lightning.progress", "requeue": "core.lightning.slurm",
    "side_effects": "core.lightning.side_effects", "train_data": "core.lightning.train_data",
    "arguments": "core.options.options", "class_paths": "core.options.lightning_cli",
    "combinations": "core.options.compatibility", "refusals": "core.options.trainer_checks",
    "core.client_state.ownership": "core.client_state.placement",
    "core.lightning.half_batches": "core.lightning.half_batch_gradients",
    "core.round.run_settings": "core.round.run_settings_logger", "core.round.sums": "core.round.accumulator",
    "core.options.rules": "core.options.algorithm_options", "rules": "core.options.algorithm_options",
    "settings": "core.options.settings",
    "federation": "core.round.federation", "global_model": "core.round.server_step",
    "older_models": "core.round.stale_models", "records": "core.round.merge",
    "run_board": "core.round.run_settings_logger",
    "sums": "core.round.accumulator", "uplink": "core.round.client_pipeline", "workload": "core.round.client_data",
    "executors.guards": "core.user_code.guards", "executors.outside": "core.user_code.outside",
    "executors.python_objects": "core.user_code.objects", "executors.python_state": "core.user_code.state",
    "devices.batches": "devices.profiling.batches", "devices.costs": "devices.profiling.costs",
    "devices.libraries": "devices.profiling.libraries", "devices.operators": "devices.profiling.operator_counter",
    "devices.rehearsal": "devices.profiling.dry_run", "devices.samples": "devices.profiling.samples",
    "devices.scratch": "devices.profiling.scratch", "devices.search": "devices.profiling.search",
    "devices.stubs": "devices.profiling.stubs", "devices.tracker": "devices.profiling.memory_tracker",
    "devices.verify": "devices.profiling.real_step", "devices.workspaces": "devices.profiling.workspaces",
    "aggregators.names": "aggregators.registry", "partitioners.names": "partitioners.registry",
    "scaling.catalogue": "scaling.registry", "scaling.report": "scaling.fit_page",
    "schedules": "local_rules.schedules",
    "noise": "phases.noise", "phase_keeper": "phases.tracker", "phases.checks": "utils.checks",
    "asynchrony": "server.asynchrony",
    "study.told": "study.answer_page", "sweep": "study.sweeping",
    "buffers": "utils.buffers", "calls": "utils.factory_repr", "checks": "utils.checks",
    "collectives": "utils.collectives", "fairness": "utils.fairness", "foreign": "utils.foreign",
    "memory": "utils.memory", "randomness": "utils.randomness", "tree": "utils.flat_view",
}  # fmt: skip
"""New names by old ones, both below the package."""


def install() -> None:
    """Make old names importable, which also lets files that were pickled under them be read."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        # It must come first: for a moved package, other finders would load its modules a second time.
        sys.meta_path.insert(0, _Finder())


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds renamed functions and classes by their old names, with a warning.

    Args:
        module: name of the module.
        names: new names by old ones; with the name of its module if that is another one.
    """

    def find(name: str) -> Any:
        if (new := names.get(name)) is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is called {new} now: the old name goes after one release.",
            DeprecationWarning,
            stacklevel=2,
        )
        home, _, name = new.rpartition(".")
        return getattr(import_module(home or module), name)

    return find


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = MOVED.get(fullname.removeprefix(_PACKAGE)) if fullname.startswith(_PACKAGE) else None
        return None if new is None else ModuleSpec(fullname, _Moved(_PACKAGE + new))


class _Moved(Loader):
    """Load the module at the new name itself, so that its classes exist only once."""

    def __init__(self, new: str) -> None:
        self._new = new

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(
            f"{module.__name__} is {self._new} now: import that; the old name goes after one release.",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[module.__name__] = import_module(self._new)
