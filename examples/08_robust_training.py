"""Training under attack: a fifth of the clients send their updates with the opposite sign, against six aggregators.

python examples/08_robust_training.py          a few minutes; writes demo_output/robust_training.png
python examples/08_robust_training.py --fast   a few rounds, to see that everything works

Robust aggregators leave out, or bound, unusual updates. Honest clients with unusual data send such updates too, so the
table also has the accuracy of the tenth of the clients served worst. Krum, which follows one client, costs them most.
"""

from common import arguments, console, digit_loaders, figure, perceptron, show, train

from lightning_fedscale.aggregators import geometric_median, krum, mean, median, multi_krum, trimmed_mean
from lightning_fedscale.attacks import attacked, sign_flip
from lightning_fedscale.callbacks import ClientMetrics
from lightning_fedscale.partitioners import DirichletPartitioner

CLIENTS, ATTACKERS, HOSTILE = 20, [1, 6, 11, 16], 4
AGGREGATORS = {
    "mean": mean("uniform"),
    "median": median(),
    "trimmed mean": trimmed_mean(HOSTILE),
    "Multi-Krum": multi_krum(HOSTILE, keep=CLIENTS - HOSTILE),
    "Krum": krum(HOSTILE),
    "geometric median": geometric_median(),
}


def run(aggregator, rounds):
    """Return the accuracy in percent after every round, and the last one on the clients that are served worst."""
    metrics = ClientMetrics(every_n_rounds=rounds)
    watch = train(
        lambda: perceptron(64, lr=0.2), digit_loaders(16, test_size=0.3), metrics, rounds=rounds, local_epochs=2,
        partitioner=DirichletPartitioner(CLIENTS, alpha=5.0), aggregator=aggregator, executor="sequential",
    )  # fmt: skip
    return watch.accuracy, 100 * metrics.last.spread("accuracy").worst10


def main():
    args = arguments(__doc__, "demo_output")
    rounds = 12 if args.fast else 40
    console.print(f"[bold]{CLIENTS} clients, of which {HOSTILE} send five times their update with the opposite sign")
    attack = sign_flip(scale=5.0)
    calm = {label: run(rule, rounds) for label, rule in AGGREGATORS.items()}
    hit = {label: run(attacked(rule, attack, ATTACKERS), rounds) for label, rule in AGGREGATORS.items()}

    rows = []
    for label in AGGREGATORS:
        (before, worst_before), (after, worst_after) = calm[label], hit[label]
        values = before[-1], after[-1], worst_before, worst_after
        rows.append([label, *(f"{value:.1f}%" for value in values)])
    show(["", "accuracy", "under attack", "worst tenth of clients", "under attack"], rows)
    with figure(args.output / "robust_training.png", 2, sharey=True) as axes:
        for panel, title, runs in zip(axes, ("No attack", "A fifth of the clients attack"), (calm, hit), strict=True):
            for label, (accuracy, _) in runs.items():
                panel.plot(range(1, rounds + 1), accuracy, label=label)
            panel.set(xlabel="Round", ylabel="Test accuracy (%)", title=title, ylim=(0, 101))


if __name__ == "__main__":
    main()
