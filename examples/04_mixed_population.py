"""Clients on unequal hardware: three kinds of devices, three batch sizes, with and without a deadline.

python examples/04_mixed_population.py          half a minute; writes mixed_population.png
python examples/04_mixed_population.py --fast   a few rounds, to see that everything works
"""

from dataclasses import replace

import numpy as np
import torch
from common import Classifier, arguments, console, digit_loaders, figure, show, train
from torch import nn

from lightning_fedscale.devices import Population, device_class
from lightning_fedscale.partitioners import DirichletPartitioner

# Measured speeds, but only the memory and the network that a background task may use unnoticed.
PHONE = replace(device_class("phone"), memory=4_000_000, flops=2e9, up=2e6, down=4e6)
OLD = replace(device_class("old-phone"), memory=500_000, flops=5e8, up=2e5, down=1e6)
SENSOR = replace(device_class("raspberry-pi-5"), name="sensor", memory=300_000, flops=1e8, up=5e4, down=1e5)
SHARES = {PHONE: 0.5, OLD: 0.3, SENSOR: 0.2}


def model():
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    layers = [nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten()]
    return Classifier(*layers, nn.Linear(512, 10), lr=0.1, optimizer=lambda *args: torch.optim.SGD(*args, momentum=0.9))


def run(deadline, rounds):
    return train(
        model, digit_loaders(8), rounds=rounds, clients_per_round=15, local_epochs=2,
        partitioner=DirichletPartitioner(60, alpha=0.5, min_partition_size=10),
        population=Population(SHARES, batch_size="largest", headroom=0.0, deadline=deadline),
    )  # fmt: skip


def main():
    args = arguments(__doc__, "mixed_population.png")
    console.print("[bold]60 clients on three kinds of devices, 15 of them in every round")
    waiting = run(None, rounds := 4 if args.fast else 80)
    table = waiting.strategy.population_table()
    columns = (table[name].map("{:,.0f}".format) for name in ("clients", "batch_size", "peak_bytes"))
    show(["Device", "Clients", "Batch", "Peak bytes"], zip(table.index, *columns, strict=True))

    # Three quarters of the clients meet the deadline; the slowest devices rarely do.
    deadline = float(np.quantile([record.simulated.client_seconds for record in waiting.records], 0.75))
    runs = {"waits for all": waiting, f"deadline of {deadline:.1f} s": run(deadline, rounds)}
    with figure(args.output) as axes:
        for label, watch in runs.items():
            clock = [record.simulated.total for record in watch.records]
            dropped = np.mean([len(record.simulated.dropped) for record in watch.records])
            reached = f"accuracy {watch.accuracy[-1]:.1f}% after {clock[-1]:.0f} simulated seconds"
            console.print(f"{label:<20} {reached}, {dropped:.1f} of 15 clients dropped per round")
            axes.plot(clock, watch.accuracy, label=label)
        axes.set(xlabel="Simulated time (s)", ylabel="Test accuracy (%)", title="The same rounds on clients' hardware")


if __name__ == "__main__":
    main()
