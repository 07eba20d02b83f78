"""Lightning's own demo modules, unmodified: the Boring family, the transformer, the LSTM with its sequence sampler.

The text is the language reference that comes with Python; ten clients hold a tenth of it each, so a few topics. What
cannot work is refused, with the reason. Needs nothing but lightning_fedscale.
"""

import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as pl
import numpy as np
import torch
from comparison import QUIET, compare
from lightning.pytorch.demos import LightningTransformer, WikiText2
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    IterableBoringDataModule,
    ManualOptimBoringModel,
    RandomDataset,
)
from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler
from torch.utils.data import DataLoader, Subset

from lightning_fedscale import FederatedStrategy, Partition

# Where the demos look for their text before they would download one.
folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)
Path("data").mkdir()
Path("data", "wikitext-2.txt").write_text("\n".join(topics.values())[:120_000], encoding="utf8")
text = WikiText2()
blocks = np.arange(len(text) * 9 // 10)
training, held_out = Subset(text, blocks.tolist()), Subset(text, range(len(blocks), len(text)))
by_topic = Partition.from_lists(np.array_split(blocks, 10))


def train(strategy, epochs):
    trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, accelerator="cpu", **QUIET)
    model = LightningTransformer(vocab_size=text.vocab_size)
    before = bits_per_word(model)
    trainer.fit(model, DataLoader(training, batch_size=10, shuffle=True))
    return {"bits per held-out word": bits_per_word(model), "bits before training": before}


def bits_per_word(model):
    model.eval()
    with torch.no_grad():
        losses = [model.training_step(batch, 0) for batch in DataLoader(held_out, batch_size=len(held_out))]
    model.train()
    return torch.stack(losses).mean().item() / np.log(2)


def boring_family():
    """Each as it is: the first four train, the others are refused with a sentence."""
    sequences = DataLoader(training, batch_sampler=SequenceSampler(training, batch_size=20))
    for model, data in (
        (BoringModel(), BoringDataModule()),
        (BoringModel(), None),  # with the module's own loader
        (ManualOptimBoringModel(), BoringDataModule()),
        (DemoModel(), DataLoader(RandomDataset(32, 64))),
        (BoringModel(), BoringDataModuleNoLen()),
        (BoringModel(), IterableBoringDataModule()),
        (LightningLSTM(text.vocab_size), sequences),
    ):
        name = f"{type(model).__name__} with {type(data).__name__}"
        trainer = pl.Trainer(
            strategy=FederatedStrategy(), max_epochs=1, limit_val_batches=0, accelerator="cpu", **QUIET
        )
        try:
            trainer.fit(model, data)
            print(f"  {name}: trained, loss {trainer.callback_metrics['round/loss']:.3g} in the first round")
        except (TypeError, ValueError) as refusal:
            print(f"  {name}: refused, {refusal}")


if __name__ == "__main__":
    compare("lightning", train, FederatedStrategy(partitioner=by_topic), passes=3, rounds=6)
    boring_family()
