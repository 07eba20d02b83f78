"""The clients' simulated hardware, once model and data are known."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.lightning.side_effects import undone
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.round.client_data import ClientData
from lightning_fedscale.core.round.costs import compressed_bytes, model_bytes, update_bytes
from lightning_fedscale.devices import ON_CLIENT, Population, estimate_memory
from lightning_fedscale.devices.fleet import Fleet
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.memory import format_bytes


def simulated_fleet(
    population: Population,
    trainer: pl.Trainer,
    options: Options,
    data: ClientData,
    shared: SharedTensors,
    *,
    accumulation: int,
) -> Fleet:
    """Return the batch sizes and times of the clients' devices for this model, and print a line for each class.

    Args:
        population: the clients' device classes.
        trainer: the Trainer, which has the model.
        options: the strategy's checked arguments.
        data: what clients train on.
        shared: the module's tensors.
        accumulation: batches per optimizer step of a client.

    Raises:
        ValueError: if the model does not fit on a device class.
    """
    with randomness.untouched(), undone(trainer):
        model = estimate_memory(
            trainer.lightning_module,
            data.loader.example(),
            precision=str(trainer.precision),
            accumulate=accumulation,
            device="other",
            extras={**ON_CLIENT, **options.algorithm.kept_on_device},
            trainer=trainer,
        )
        down = model_bytes(options.algorithm, shared)
        if (downlink := options.downlink_compressor) is not None:
            down += compressed_bytes(downlink, shared) - shared.trainable_bytes
        workload = data.workload(down, update_bytes(options.algorithm, shared))
        fleet = Fleet(population, model, data.partition.num_clients, workload)
    for name, row in fleet.table().iterrows():
        rank_zero_info(
            f"Federated: {row['clients']:,.0f} clients on {name} train with batches of {row['batch_size']:,.0f}"
            f" ({format_bytes(row['peak_bytes'])} of {format_bytes(row['memory'])},"
            f" {row['samples_per_second']:,.0f} samples/s)."
        )
    return fleet
