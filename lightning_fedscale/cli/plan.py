"""``fedscale plan``: plan a run for a compute budget and a number of clients."""

from __future__ import annotations

import json as json_format
import warnings
from typing import Literal

from lightning_fedscale.cli.files import written
from lightning_fedscale.devices import device_class


def plan(
    flops: float,
    clients: int | list[int] | None = None,
    law: str = "auto",
    rho: float | list[float] | Literal["auto"] = "auto",
    device: str | list[str] | None = None,
    tokens: float | None = None,
    local_steps: int | None = None,
    utilization: float = 0.3,
    activation_bytes: float | None = None,
    batch_size: int | None = None,
    method: str | None = None,
    partition: str | None = None,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Plan how large a model to train, on how much data, for a compute budget and a number of clients.

    Args:
        flops: training compute of all clients together, such as 1e20.
        clients: number of clients that train in a round; several in a list, '[1, 10, 100]'; by default those of
            the partition, or of the law's runs.
        law: a scaling law by name, or a file of fedscale fit; by default fedscale_law.json of this folder if there is
            one, else Chinchilla's, which holds for text.
        rho: cost of dividing the compute among clients: 1 counts the average client's compute, 0 that of all clients;
            the two ends of an interval in a list; by default the value measured with the law, else 0 to 1, and the plan
            is for 1.
        device: device class of the clients, such as 'phone', for memory and time; several in a list, '[phone, jetson]'.
        tokens: tokens that each client has, if these are few.
        local_steps: batches between exchanges; by default those of the law's runs, else 30.
        utilization: fraction of the devices' peak speed that training reaches.
        activation_bytes: bytes per token in the batch, to limit the batch by memory; fedscale probe finds them per
            sample.
        batch_size: a client's batch size, in samples; by default that of the law's runs.
        method: method of the clients, such as 'scaffold', to be compared with the law's runs.
        partition: how the data will be divided, to be compared with the law's runs: a partitioner's name, or the file
            of a saved partition.
        plot: file for a figure of size and loss over the number of clients.
        json: print one JSON object instead of a table.
    """
    from lightning_fedscale.cli.plan_table import show  # only after the arguments are checked
    from lightning_fedscale.scaling import plan as make_plan
    from lightning_fedscale.scaling import plot_plans

    kinds = [device_class(name) for name in ([device] if isinstance(device, str) else device or [])]
    numbers = clients if isinstance(clients, list) else [clients]
    if not numbers:
        raise ValueError("clients=[]: pass at least one number of clients.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="plan: ")  # printed as notes instead
        plans = [
            make_plan(
                flops, number, law, rho, kinds, tokens, local_steps, utilization, activation_bytes,
                batch_size=batch_size, method=method, partition=partition,
            )
            for number in numbers
        ]  # fmt: skip
    if plot is not None:
        written("plot", plot, lambda: plot_plans(plans).savefig(plot, dpi=150))
    if json:
        print(json_format.dumps({str(found.clients): found.as_dict() for found in plans}))
        return
    show(plans)
