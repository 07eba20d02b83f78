"""Phases of training drive compression: clients send much while training is critical, and little afterwards.

python examples/05_critical_phases.py          half a minute; writes critical_phases.png
python examples/05_critical_phases.py --fast   a few rounds, to see that everything works
"""

import torch
from common import arguments, console, digit_loaders, figure, perceptron, shade, train

from lightning_fedscale.aggregators import mean
from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.phases import relative_change

# For each run, the fraction of an update's values that is sent in critical phases, and elsewhere.
RUNS = {"always 10%": (0.1, 0.1), "10% in critical phases": (0.1, 0.002), "always 0.2%": (0.002, 0.002)}


def run(critical, otherwise, rounds):
    """Train with one fraction in critical rounds, else another. An aggregator compresses: 12 has real compressors."""
    phase = CriticalPhase(relative_change(threshold=0.15, window=10), action="observe")
    kept, megabytes = {}, [0.0]  # `kept`: what each client has not sent yet; all clients train in one process here

    def top_k(total, update, weight, cohort):
        delta = update.delta + kept.get(update.client, 0)
        number = int((critical if phase.critical else otherwise) * delta.numel())
        largest = delta.abs().topk(number).indices
        sent = torch.zeros_like(delta).index_copy(0, largest, delta[largest])
        kept[update.client] = delta - sent
        megabytes[0] += 8e-6 * number  # a number and its place
        return mean().accumulate(total, update._replace(delta=sent), weight, cohort)

    watch = train(
        lambda: perceptron(128, lr=0.1), digit_loaders(8), phase, rounds=rounds, clients_per_round=10, local_epochs=2,
        partitioner=DirichletPartitioner(40, alpha=0.5, min_partition_size=10),
        aggregator=mean()._replace(accumulate=top_k),
    )  # fmt: skip
    return watch, phase.record, megabytes[0]


def main():
    args = arguments(__doc__, "critical_phases.png")
    rounds, early = (10, 10) if args.fast else (80, 20)
    console.print("[bold]40 clients, 10 of them in every round, send the largest changes of their update")
    with figure(args.output, 2) as (left, right):
        for label, (critical, otherwise) in RUNS.items():
            watch, record, sent = run(critical, otherwise, rounds)
            reached = f"{watch.accuracy[early - 1]:.1f}% after {early} rounds, {watch.accuracy[-1]:.1f}% in the end"
            console.print(f"{label:<23} accuracy {reached} with {sent:.2f} MB; {record.summary('round')}")
            left.plot(watch.accuracy, label=f"{label}: {sent:.2f} MB")
            if critical != otherwise:
                right.plot([row[0] for row in record.rows], [row[1] for row in record.rows])
                shade(right, record.spans)
        left.set(xlabel="Round", ylabel="Test accuracy (%)", title="Sent: the largest changes", ylim=(0, 101))
        right.set(xlabel="Round", ylabel="Update norm", title="Critical rounds, shaded", yscale="log")


if __name__ == "__main__":
    main()
