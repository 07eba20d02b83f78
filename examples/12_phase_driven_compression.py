"""Phases of training drive compression and local steps, with the library's own compressors and error feedback.

python examples/12_phase_driven_compression.py          a few minutes; writes demo_output/phase_driven_compression.png
python examples/12_phase_driven_compression.py --fast   a few rounds, to see that everything works

In critical phases clients send often and much; otherwise they train for longer between rounds and send little.
"""

import numpy as np
from common import arguments, console, digit_loaders, figure, perceptron, shade, show, train

from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.compressors import error_feedback, phase_driven, top_k
from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.phases import relative_change

MUCH, LITTLE = (5, top_k(0.2)), (10, top_k(0.01))  # local steps, and a compressor
RUNS = {"much": (MUCH, MUCH), "by phase": (MUCH, LITTLE), "little": (LITTLE, LITTLE)}


def run(critical, otherwise, rounds):
    """Train with one number of local steps and compressor in critical phases, and with others elsewhere."""
    phase = CriticalPhase(relative_change(threshold=0.15, window=10), action="observe")
    return train(
        lambda: perceptron(128, lr=0.1), digit_loaders(8), phase, rounds=rounds, clients_per_round=10,
        partitioner=DirichletPartitioner(40, alpha=0.5, min_partition_size=10),
        local_steps=lambda round: critical[0] if phase.critical else otherwise[0],
        compressor=error_feedback(phase_driven(phase, critical=critical[1], otherwise=otherwise[1])),
    )  # fmt: skip


def main():
    args = arguments(__doc__, "demo_output")
    rounds = 30 if args.fast else 120
    console.print(f"[bold]40 clients, 10 of them in every round, {rounds} rounds")
    rows = []
    with figure(args.output / "phase_driven_compression.png", 2, sharey=True) as (left, right):
        for label, (critical, otherwise) in RUNS.items():
            watch = run(critical, otherwise, rounds)
            steps = np.array([record.local_steps.max() for record in watch.records])
            sent = np.array([record.upload_bytes / len(record.clients) for record in watch.records])
            much = steps == MUCH[0]
            updates = [f"{part.mean():.0f} B" if len(part) else "none" for part in (sent[much], sent[~much])]
            total, reached = f"{watch.megabytes[-1]:.3f} MB", f"{watch.accuracy[-1]:.1f}%"
            rows.append([label, f"{much.sum()} of {rounds}", f"{steps.sum()}", *updates, total, reached])
            left.plot(watch.megabytes, watch.accuracy, label=label)
            right.plot(watch.accuracy)
            if label == "by phase":
                shade(right, [(round, round) for round in np.flatnonzero(much)])
        left.set(xlabel="Sent by clients (MB)", ylabel="Test accuracy (%)", title="By bytes", xscale="log")
        right.set(xlabel="Round", title="By rounds; shaded: critical in the run by phase")
    show(["", "rounds with much", "local steps", "update, much", "update, little", "sent", "accuracy"], rows)


if __name__ == "__main__":
    main()
