"""What a checkpoint holds of a federation, and how a run resumes from it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fedscale.core.lightning.checkpoint import (
    IDENTITY,
    changed_settings,
    check_resume,
    federated_state,
    refuse_other_owners,
    refuse_other_rules,
)
from lightning_fedscale.core.lightning.module_flags import restore_flags, restore_groups, restore_pruning
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.round.client_pipeline import DITTO
from lightning_fedscale.core.round.fit import Fit


class FederationCheckpoint:
    """Reads and writes ``checkpoint["federated"]``.

    Args:
        fit: the parts whose state it is.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._resumed: dict[str, Any] | None = None  # of the checkpoint, only what identifies the run

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state from which a run resumes exactly on rank 0, None on others; call it on all ranks."""
        fit, in_client = self._fit, self._fit.scope.in_client
        clients = fit.clients.state_dict(in_client=in_client)
        monitored = fit.notifier.monitors.state_dict(in_client=in_client)
        if fit.rank != 0:
            return None
        partition = None if fit.data is None else fit.data.partition
        return federated_state(
            round=fit.trainer.global_step,
            settings=_settings(fit.options),
            seed=fit.options.seed,
            num_clients=None if partition is None else partition.num_clients,
            partition=None if partition is None else partition.fingerprint,
            server=fit.server.states,
            clients=clients,
            local_batches=fit.log.points.local_batches,
            executor=fit.executor.kind if fit.options.executor == "auto" else None,
            gave_up=fit.executor.gave_up,
            clients_per_wave=fit.executor.kept_width,
            simulated=fit.totals.simulated,
            versions=fit.stale.state_dict(),
            accumulation=[fit.scope.accumulation_of_trainer, fit.scope.accumulation],
            flags=fit.scope.flags(),
            trained=fit.tensors.trained,
            frozen=fit.tensors.state_of_frozen(),
            losses=torch.tensor(sorted(fit.totals.losses.items()), dtype=torch.float64).reshape(-1, 2),
            monitored=monitored,
        )

    def write_into(self, checkpoint: dict[str, Any]) -> None:
        """Add the state on rank 0, of the start of the round if a client trains; call it on all ranks."""
        if (state := self.state_dict()) is not None:
            checkpoint["federated"] = state
        if self._fit.scope.in_client:
            self._fit.executor.rewind_checkpoint(checkpoint)
        # The loader of rounds has no state; with this entry, a plain Trainer would refuse to resume.
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def load_groups(self, state: dict[str, Any]) -> None:
        """Restore pruning and parameter groups that callbacks added; call it before optimizers are loaded."""
        if (flags := state.get("flags")) is not None:
            restore_pruning(flags, self._fit.trainer.lightning_module)
            restore_groups(flags, self._fit.trainer.lightning_module, self._fit.trainer.optimizers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint, on any number of ranks.

        Raises:
            ValueError: if the saved run is not this one.
        """
        fit, settings = self._fit, _settings(self._fit.options)
        self._resumed = {name: state[name] for name in IDENTITY}
        refuse_other_rules(state["settings"], settings)
        if has_vectors := bool(state["versions"]) or DITTO in state["clients"]:
            refuse_other_owners(state["settings"], settings)
        if changed := changed_settings(state["settings"], settings):
            rank_zero_warn(f"ckpt_path: {changed}")
        self.check_resumed()
        fit.executor.resume(
            state.get("executor"), gave_up=state.get("gave_up", False), width=state.get("clients_per_wave")
        )
        fit.clients.load_state_dict(state["clients"])
        fit.server.load_states(state["server"], fit.device)
        fit.log.points.local_batches = state.get("local_batches", 0)
        fit.totals.simulated = state.get("simulated", 0.0)
        fit.stale.load_state_dict(state["versions"], fit.device)
        fit.totals.losses = {int(client): loss for client, loss in state["losses"].tolist()}
        fit.notifier.monitors.load_state_dict(state.get("monitored", {}))
        fit.tensors.load_frozen(state.get("frozen"), has_vectors=has_vectors)
        self._load_flags(state)

    def _load_flags(self, state: dict[str, Any]) -> None:
        fit = self._fit
        if (flags := state.get("flags")) is None:
            return  # written by an earlier version
        fit.tensors.trained = state.get("trained")
        of_trainer, last = state["accumulation"]
        if of_trainer == fit.scope.accumulation_of_trainer:  # else the Trainer has a new value
            fit.scope.accumulation = last
        if changed := restore_flags(flags, fit.trainer.lightning_module):
            rank_zero_info(
                f"Federated: {len(changed)} parameters are frozen or trainable as in the checkpoint, unlike in the new"
                f" module: {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}."
            )

    def check_resumed(self) -> None:
        """Refuse a checkpoint of other clients or data, as soon as both are known.

        Raises:
            ValueError: if the saved run is not this one.
        """
        # A checkpoint from before the data was seen (a learning-rate search writes one) has nothing to compare.
        if self._resumed is None or self._resumed["partition"] is None or self._fit.data is None:
            return
        partition = self._fit.data.partition
        check_resume(
            self._resumed,
            seed=self._fit.options.seed,
            num_clients=partition.num_clients,
            partition=partition.fingerprint,
        )


def _settings(options: Options) -> dict[str, Any]:
    """Return the settings that may be changed on resume; a run with other settings is another run."""
    compressor = options.algorithm.compressor
    return {
        "clients_per_round": options.clients_per_round,
        "local_epochs": options.local_epochs,
        # Functions have no value that a checkpoint could hold.
        "local_steps": "a function" if callable(options.local_steps) else options.local_steps,
        "rounds_per_epoch": options.rounds_per_epoch,
        "client_optimizer": "keep" if options.keep_optimizers else "reset",
        "population": None if options.population is None else options.population.description(),
        "local_rule": None if options.algorithm.local_rule is None else options.algorithm.local_rule.name,
        "aggregator": options.algorithm.aggregator.kept,
        "compressor": compressor.name if compressor is not None and compressor.stateful else None,
        "mode": "sync" if options.asynchrony is None else options.asynchrony.description(),
        "buffers": dict(options.algorithm.buffers) or None,
        "personal": repr(options.algorithm.ditto) if options.algorithm.ditto else list(options.algorithm.personal),
        "threads": torch.get_num_threads(),
    }
