"""Private training: what a privacy budget costs in accuracy, and training that ends before the budget is exceeded.

python examples/09_private_training.py          a few minutes; writes demo_output/private_training.png
python examples/09_private_training.py --fast   fewer rounds and a smaller budget, to see that everything works
"""

from common import Classifier, arguments, console, digit_loaders, figure, show, train
from torch import nn

from lightning_fedscale.privacy import dp_fed_avg

CLIENTS = 400
CLIP, DELTA = 0.5, 1e-3  # A client moves the model by at most CLIP; DELTA is well below 1 / CLIENTS.


def model():
    return Classifier(nn.Linear(64, 10), lr=0.5)  # Noise is added to every parameter: few are better.


def run(privacy, rounds):
    """Train for at most so many rounds; a privacy with a budget may end training earlier."""
    return train(
        model, digit_loaders(4), rounds=rounds, num_clients=CLIENTS, local_epochs=2, privacy=privacy,
        clients_per_round=0.1, sampler="poisson",  # each takes part with this probability, as the accountant assumes
    )  # fmt: skip


def main():
    args = arguments(__doc__, "demo_output")
    rounds, budget = (12, 2.0) if args.fast else (120, 2.5)
    console.print(f"[bold]{CLIENTS} clients; at most {rounds} rounds, and epsilon at most {budget:g}")
    found = {"no privacy": run(None, rounds)}
    for noise in (0.8, 1.5):
        privacy = dp_fed_avg(clip_norm=CLIP, noise_multiplier=noise, delta=DELTA, max_epsilon=budget)
        found[f"noise {noise:g}"] = run(privacy, rounds)

    rows = []
    with figure(args.output / "private_training.png", 2, sharex=True) as (left, right):
        for label, watch in found.items():
            spent = [record.epsilon for record in watch.records]
            epsilon = "none" if spent[-1] is None else f"{spent[-1]:.3f}"
            rows.append([label, f"{len(spent)}", epsilon, f"{watch.accuracy[-1]:.1f}%"])
            left.plot(watch.accuracy, label=label)
            right.plot(spent, label=label)
        right.axhline(budget, color="#444444", lw=1, ls="--", label="budget")
        left.set(xlabel="Round", ylabel="Test accuracy (%)", title="What privacy costs", ylim=(0, 101))
        right.set(xlabel="Round", ylabel=f"Epsilon, at delta = {DELTA:g}", title="Privacy spent")
    show(["", "rounds", "epsilon", "accuracy"], rows)


if __name__ == "__main__":
    main()
