"""Clients with very different data: SCAFFOLD and top-k compression, by accuracy and by bytes.

python examples/10_heterogeneous_clients.py          a few minutes; writes demo_output/heterogeneous_clients.png
python examples/10_heterogeneous_clients.py --fast   a few rounds, to see that everything works

Compression applies to updates. SCAFFOLD's clients also send the change of their control variate, uncompressed: the last
method therefore sends more than half of SCAFFOLD's bytes.
"""

from common import arguments, console, digit_loaders, figure, perceptron, show, train

from lightning_fedscale.compressors import error_feedback, top_k
from lightning_fedscale.partitioners import DirichletPartitioner

SENT = 0.05  # fraction of an update's values that top-k sends
METHODS = {
    "FedAvg": {},
    "SCAFFOLD": {"local_rule": "scaffold"},
    "FedAvg, top-k": {"compressor": error_feedback(top_k(SENT))},
    "SCAFFOLD, top-k": {"local_rule": "scaffold", "compressor": error_feedback(top_k(SENT))},
}


def run(method, rounds):
    return train(
        lambda: perceptron(64, lr=0.1), digit_loaders(16), rounds=rounds, clients_per_round=10, local_steps=20,
        partitioner=DirichletPartitioner(20, alpha=0.1, min_partition_size=5), aggregator="uniform", **method,
    )  # fmt: skip


def main():
    args = arguments(__doc__, "demo_output")
    rounds = 10 if args.fast else 100
    last = rounds // 10
    console.print("[bold]20 clients with one or two kinds of digits each, 10 of them in every round")
    rows = []
    with figure(args.output / "heterogeneous_clients.png", 2, sharey=True) as (left, right):
        for label, method in METHODS.items():
            watch = run(method, rounds)
            mean = sum(watch.accuracy[-last:]) / last  # The accuracy fluctuates from round to round.
            rows.append([label, f"{watch.megabytes[-1]:.3f} MB", f"{watch.accuracy[-1]:.1f}%", f"{mean:.1f}%"])
            left.plot(range(1, rounds + 1), watch.accuracy, label=label)
            right.plot(watch.megabytes, watch.accuracy)
        left.set(xlabel="Round", ylabel="Test accuracy (%)", title="By rounds", ylim=(0, 101))
        right.set(xlabel="Sent by clients (MB)", title="By bytes", xscale="log")
    show(["", "sent", "accuracy", f"mean of the last {last}"], rows)


if __name__ == "__main__":
    main()
