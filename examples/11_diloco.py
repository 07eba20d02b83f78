"""DiLoCo on two processes: clients keep their AdamW between rounds, and the server uses Nesterov momentum.

python examples/11_diloco.py          a few minutes; writes demo_output/diloco.png
python examples/11_diloco.py --fast   a few rounds, to see that everything works

As with every strategy of Lightning on several devices, the Trainer starts this script again for the other process.
"""

import lightning.pytorch as pl
import torch
from common import QUIET, Watch, arguments, console, digit_loaders, figure, perceptron, show
from lightning.pytorch.strategies import DDPStrategy

from lightning_fedscale import FederatedStrategy, server


def diloco(steps):
    return FederatedStrategy(
        num_clients=2, local_steps=steps, client_optimizer="keep", process_group_backend="gloo",
        server_optimizer=server.nesterov(lr=0.7, momentum=0.9),
    )  # fmt: skip


def run(strategy, exchanges, every):
    """Train for so many exchanges, which are steps of data parallelism or rounds; validate after every so many."""
    pl.seed_everything(0, verbose=False)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=strategy, devices=2, max_steps=exchanges, max_epochs=-1, val_check_interval=every,
        check_val_every_n_epoch=None, callbacks=[watch], **QUIET,
    )  # fmt: skip
    trainer.fit(perceptron(128, lr=1e-3, optimizer=torch.optim.AdamW), *digit_loaders(16))
    return watch, trainer


def main():
    args = arguments(__doc__, "demo_output")
    total, few, many = (40, 5, 20) if args.fast else (1000, 10, 50)
    runs = {"data parallel": (DDPStrategy(process_group_backend="gloo"), total, few)}
    runs |= {f"DiLoCo, {steps} local steps": (diloco(steps), total // steps, 1) for steps in (few, many)}
    found = {label: run(*each) for label, each in runs.items()}
    if not found["data parallel"][1].is_global_zero:
        return  # Both processes come here; one of them reports.

    console.print(f"[bold]2 processes, {total} local steps each, AdamW")
    rows = []
    with figure(args.output / "diloco.png") as axes:
        for label, (watch, trainer) in found.items():
            ranks = watch.records[-1].ranks if watch.records else range(trainer.world_size)
            cells = " and ".join(map(str, ranks)), f"{watch.values('val_loss')[-1]:.3f}", f"{watch.accuracy[-1]:.1f}%"
            rows.append([label, f"{trainer.global_step}", *cells])
            axes.plot(watch.steps, watch.values("val_loss"), marker=".", label=label)
        axes.set(xlabel="Exchanges between the processes", ylabel="Test loss", xscale="log", yscale="log")
        axes.set_title("The same number of local steps, fewer exchanges")
    show(["", "exchanges", "ranks", "loss", "accuracy"], rows)


if __name__ == "__main__":
    main()
