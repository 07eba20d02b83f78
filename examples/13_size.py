"""Which size, batch, local steps and method are best for eight dissimilar hospitals? Measured, in two minutes.

python examples/13_size.py          two minutes of studies; writes to size_study/
python examples/13_size.py --fast   a few seconds, to see that everything works
"""

import warnings

from common import Classifier, Images, arguments, console, show, shuffled_digits
from torch import nn

from lightning_fedscale.partitioners import DirichletPartitioner
from lightning_fedscale.study import sentences, size, write
from lightning_fedscale.study.answer_page import rows_of


class Perceptron(Classifier):
    def __init__(self, width=256, lr=0.1):
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10), lr=lr)


class Digits(Images):
    def __init__(self, batch_size=16):
        super().__init__(*shuffled_digits(), batch_size)


def main():
    args = arguments(__doc__, "size_study")
    warnings.filterwarnings("ignore")
    small = {"sizes": [64, 256], "methods": ["fed_avg", "scaffold"], "rates": [1.0], "local_steps": [5]}
    answer = size(
        Perceptron,
        Digits,
        argument="width",  # of Perceptron: this is the size that is asked for
        flops=2e8 if args.fast else 2e9,
        partition=DirichletPartitioner(num_partitions=8, alpha=0.3, seed=1),
        study_minutes=0.05 if args.fast else 2.0,
        seeds=2 if args.fast else 3,
        folder=args.output / ("fast" if args.fast else "runs"),
        trainer={"accelerator": "cpu"},
        say=print,
        **small if args.fast else {},
    )
    page = write(answer, args.output)
    rows = rows_of(answer)
    show(rows[0], [row.values() for row in rows], title=f"{answer.flops:.3g} FLOPs, {answer.clients} hospitals")
    for line in sentences(answer):
        console.print(line)
    console.print(f"Page: {page}")


if __name__ == "__main__":
    main()
