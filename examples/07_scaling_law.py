"""A scaling law of your own: a sweep of sizes and client counts, a fit, and the best size for the next run.

python examples/07_scaling_law.py                 Fashion-MNIST; some minutes; writes to scaling_law/
python examples/07_scaling_law.py --data digits   the same for scikit-learn's digits
python examples/07_scaling_law.py --fast          a small sweep of digits, to see that everything works
"""

from functools import partial
from pathlib import Path

from common import Classifier, Images, arguments, console, fashion_mnist, show, shuffled_digits
from torch import nn

from lightning_fedscale.scaling import LAW_FILE, fit, plan, write_report
from lightning_fedscale.study import sweep


class Perceptron(Classifier):
    def __init__(self, size, pixels):
        super().__init__(nn.Linear(pixels, size), nn.ReLU(), nn.Linear(size, 10), lr=0.1)


def main():
    folder = {"type": Path, "default": Path("/usr/share/datasets/fashion-mnist"), "help": "folder of Fashion-MNIST"}
    choice = {"choices": ["fashion-mnist", "digits"], "default": "fashion-mnist"}
    args = arguments(__doc__, "scaling_law", ("--data", choice), ("--images", folder))
    small = args.fast or args.data == "digits"
    images, labels, held_out = shuffled_digits() if small else fashion_mnist(args.images)
    data, module = partial(Images, images, labels, held_out), partial(Perceptron, pixels=images.shape[1])
    task, flops = "digits" if small else "Fashion-MNIST", 1.5e7 if args.fast else 3e8 if small else 1e9
    console.print(f"[bold]{task}: five sizes, three amounts of compute, one client and four")

    def report(row):
        run = f"  size {row['size']:>2}, clients {row['clients']}, {row['share']:4.0%} of the compute"
        console.print(f"{run}: loss {row['loss']:.3f} at {row['learning_rate']:g} times the learning rate")

    # The learning rate is tuned for every size and number of clients: with a single rate, rho would be meaningless.
    rates = [1.0] if args.fast else [0.5, 1.0, 2.0]
    sweep(module, data, [4, 8, 16, 32, 64], flops, [1, 4], rates=rates, folder=args.output, each=report)
    found = fit(args.output, task=task)
    found.save(law := args.output / LAW_FILE)
    constants = {**found.intervals, "rho": found.rho}.items()
    rows = [(name, f"{each.value:.3g}", f"{each.low:.3g} to {each.high:.3g}") for name, each in constants]
    show(["", "Value", "95 % interval"], rows, title=f"{found.law.name}, fitted to {found.runs} runs")
    console.print(f"Error of the loss: {found.error:.0%}; of held-out runs: {found.held_out:.0%}")
    for note in found.notes:
        console.print(f"Note: {note}")
    if found.problems:
        console.print(f"No best size from these runs: {'; '.join(found.problems)}")
    else:
        for clients in (1, 4, 16):
            best = plan(flops=flops, clients=clients, law=law)
            interval = f"{best.params_low:,.0f} to {best.params_high:,.0f}"
            size = f"best size {best.params:,.0f} parameters ({interval}), loss {best.loss:.3f}"
            console.print(f"{flops:.1e} FLOPs, clients {clients}: {size}")
    console.print(f"Law: {law}, for ComputeAccounting(law=...); report: {write_report(found, args.output)}")


if __name__ == "__main__":
    main()
