"""Client states on several ranks: they move to the rank that needs them, and to rank 0 for a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from lightning_fedscale.core.client_state import ClientStore, Files, Memory, StateStore, placement
from lightning_fedscale.core.client_state.placement import StatePlacement
from lightning_fedscale.core.plan import RoundPlan
from tests.dist import processes
from tests.features.test_resume import equal

CLIENTS, ROUNDS = 7, 6


def state(client: int, round: int) -> dict[str, Any]:
    return {"sum": torch.full((50,), client + 0.1 * round), "step": torch.tensor(round), "options": [{}]}


def cohort(round: int) -> list[int]:
    chosen: list[int] = np.sort(np.random.default_rng(round).permutation(CLIENTS)[:4]).tolist()
    return chosen


def rounds(rank: int, world_size: int, limit: float, first: int, store: ClientStore, mine: StatePlacement) -> None:
    """Rounds in which each client checks what it finds and leaves the next; client 3 forgets in odd ones."""
    for round in range(first, first + ROUNDS):
        clients = cohort(round)
        ranks = np.random.default_rng(100 + round).integers(0, world_size, len(clients))
        plan = RoundPlan(round, np.array(clients), ranks)
        mine.fetch(plan)
        complete = round != first + 2  # the third is given up
        for client in plan.clients_of(rank):
            before = [r for r in range(round) if client in cohort(r) and r % ROUNDS != 2]
            found = store.states.of(client)
            if not before or (client == 3 and before[-1] % 2):
                assert found == {}
            else:
                assert equal(found, {"optimizers": state(client, before[-1]), "other": torch.tensor(before[-1])})
            gone = client == 3 and round % 2
            store.states.stage(client, "optimizers", None if gone else state(client, round))
            store.states.stage(client, "other", None if gone else torch.tensor(round))
        if complete:
            store.commit()
            mine.commit(plan)
        else:
            store.rollback()


def run(rank: int, world_size: int, limit: float, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    placement._PARCEL = 300  # one state and a half
    store = ClientStore(StateStore([Memory(limit), Files()]))
    mine = StatePlacement(store, rank, world_size, torch.device("cpu"))
    for part in range(2):
        rounds(rank, world_size, limit, part * ROUNDS, store, mine)
        saved = mine.state_dict()
        path = folder / f"{part}.pt"
        if rank == 0:
            torch.save(saved, path)
        else:
            assert saved == {}
        if world_size > 1:
            dist.barrier()
        # Every rank goes on from the checkpoint, as after a restart.
        store = ClientStore(StateStore([Memory(limit), Files()]))
        store.load_state_dict(torch.load(path, weights_only=True), torch.device("cpu"))
        mine = StatePlacement(store, rank, world_size, torch.device("cpu"))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "limit"), [(2, 0), (3, 500), (3, math.inf)])
def test_states_on_several_ranks_are_those_of_one(world_size: int, limit: float, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    run(0, 1, math.inf, 0, one)
    start_processes(run, (world_size, limit, processes.free_port(), several), world_size, start_method="fork")
    for part in range(2):
        left, right = (torch.load(folder / f"{part}.pt", weights_only=True) for folder in (one, several))
        assert equal(left, right)
        assert list(left["optimizers"]) == list(right["optimizers"]) == list(right["other"])
        assert len(left["optimizers"]) >= 5
