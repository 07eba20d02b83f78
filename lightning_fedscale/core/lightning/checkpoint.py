"""Atomic writing of checkpoints, and checks for resuming from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

_FORMAT = 1


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file next to the target, flushes it to disk, and renames it to the target.

    Lightning's own writer uses the temporary folder, which may be on another file system. Moving from there is a copy,
    and a process killed during the copy leaves a broken checkpoint in place of the last good one. Remote targets (with
    ``://``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` atomically."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r}: AtomicCheckpointIO writes to local folders and takes no such"
                " options, leave it out."
            )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Always the same name, so that files left by killed processes are overwritten and do not accumulate.
        part = target.with_name(target.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def federated_state(
    *,
    round: int,
    settings: dict[str, Any],
    seed: int,
    num_clients: int | None,
    partition: str | None,
    server: Any,
    clients: dict[str, Any],
    local_batches: int,
    executor: str | None,
    gave_up: bool,
    clients_per_wave: int | None,
    simulated: float,
    losses: torch.Tensor,
    versions: dict[int, torch.Tensor],
    accumulation: list[int],
    flags: dict[str, Any],
    trained: list[str] | None,
    frozen: dict[str, Any],
    monitored: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Return ``checkpoint["federated"]``: tensors and primitives, loadable with ``weights_only=True``."""
    return {
        "format": _FORMAT,
        "round": round,
        "settings": settings,
        "seed": seed,
        "num_clients": num_clients,
        "partition": partition,
        "server": server,
        "clients": clients,
        "local_batches": local_batches,
        "executor": executor,
        "gave_up": gave_up,
        "clients_per_wave": clients_per_wave,
        "simulated": simulated,
        "losses": losses,
        "versions": versions,
        "accumulation": accumulation,
        "flags": flags,
        "trained": trained,
        "frozen": frozen,
        "monitored": monitored,
    }


IDENTITY = ("format", "seed", "num_clients", "partition")
"""The entries of a checkpoint's state that `check_resume` compares."""


def check_resume(state: dict[str, Any], *, seed: int, num_clients: int, partition: str) -> None:
    """Check that the resumed run is the one that was saved.

    Raises:
        ValueError: if an argument differs; names it, the saved and the present value.
    """
    if state["format"] > _FORMAT:
        raise ValueError(
            f"ckpt_path: the checkpoint has format {state['format']} and this version reads up to {_FORMAT}:"
            " upgrade lightning-fedscale."
        )
    for name, now in (("seed", seed), ("num_clients", num_clients)):
        if state[name] != now:
            raise ValueError(
                f"{name}={now} differs from {name}={state[name]} in the checkpoint: resume with"
                f" FederatedStrategy({name}={state[name]}), or start a new run without ckpt_path."
            )
    if state["partition"] != partition:
        raise ValueError(
            f"partitioner: the data is divided among clients differently (hash {partition[:12]}) than in the"
            f" checkpoint (hash {state['partition'][:12]}): use the same dataset and the same partitioner with the same"
            " arguments, or start a new run without ckpt_path."
        )


def refuse_other_rules(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with rules for which what clients and server keep means something else.

    Raises:
        ValueError: if a rule differs; names the argument, the saved and the present value.

    Example:
        >>> refuse_other_rules({"local_rule": "scaffold"}, {"local_rule": "fed_dyn"})
        Traceback (most recent call last):
        ...
        ValueError: local_rule='fed_dyn' differs from 'scaffold' in the checkpoint: resume with 'scaffold', or start a
        new run without ckpt_path.
    """
    # An aggregator's state is of use to the same rule with other arguments; whoever keeps none may take over.
    kept = [(each.get("aggregator") or "").partition("(")[0] for each in (saved, now)]
    others = ["aggregator"] if all(kept) and kept[0] != kept[1] else []
    for name in ("local_rule", "compressor", *others):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"{name}={now.get(name)!r} differs from {saved.get(name)!r} in the checkpoint: resume with"
                f" {saved.get(name)!r}, or start a new run without ckpt_path."
            )


def refuse_other_owners(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that the same parts stay with each client as in the saved models of clients or earlier rounds.

    Raises:
        ValueError: if they differ; names the arguments, the saved and the present patterns.

    Example:
        >>> refuse_other_owners({"personal": []}, {"personal": [], "buffers": {"queue": "client"}})
        Traceback (most recent call last):
        ...
        ValueError: buffers, personal: each client keeps ['queue'] for itself now, but [] in the checkpoint: resume with
        the arguments of the saved run, or start a new run without ckpt_path.
    """
    before, after = _owned(saved), _owned(now)
    if before != after:
        raise ValueError(
            f"buffers, personal: each client keeps {after} for itself now, but {before} in the checkpoint: resume with"
            " the arguments of the saved run, or start a new run without ckpt_path."
        )


def _owned(settings: dict[str, Any]) -> list[str]:
    """Return the patterns of tensors that stay with each client."""
    layers, buffers = settings.get("personal"), settings.get("buffers") or {}
    kept = layers if isinstance(layers, list) else []
    return [*kept, *(pattern for pattern, policy in buffers.items() if policy == "client")]


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return a warning for a user who resumes with other settings; None if they are the same.

    Example:
        >>> changed_settings({"local_epochs": 1, "threads": 2}, {"local_epochs": 3, "threads": 2})
        'local_epochs=3 differs from 1 in the checkpoint: the run continues with the new value.'
        >>> changed_settings({"threads": 2}, {"threads": 1})
        'torch uses 1 thread(s), and 2 in the saved run: call torch.set_num_threads(2) for bit-identical results.'
    """
    others = [
        f"{name}={now[name]} differs from {saved.get(name)}"
        for name in now
        if name != "threads" and saved.get(name) != now[name]
    ]
    if others:
        return f"{', '.join(others)} in the checkpoint: the run continues with the new value{'s' * (len(others) > 1)}."
    if saved["threads"] != now["threads"]:
        return (
            f"torch uses {now['threads']} thread(s), and {saved['threads']} in the saved run: call"
            f" torch.set_num_threads({saved['threads']}) for bit-identical results."
        )
    return None
