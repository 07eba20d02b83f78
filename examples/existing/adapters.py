"""transformers and peft: a language model of which adapters are trained, unmodified; clients hold different topics.

The model is made from its configuration and the tokenizer from the text, which is the language reference that comes
with Python: nothing is downloaded. Batches are what transformers' own collator makes of sentences of unequal length.
`make existing` installs what this needs and runs it.
"""

from pydoc_data.topics import topics

import lightning.pytorch as pl
import numpy as np
import torch
from checks import check
from comparison import QUIET, compare
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_fedscale import FederatedStrategy, Partition

WORDS, LENGTH, CLIENTS = 500, 32, 10

paragraphs = [paragraph for topic in topics.values() for paragraph in topic.split("\n\n") if len(paragraph) > 80]
words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.train_from_iterator(paragraphs, trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[UNK]", "[PAD]"]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
text = [tokenizer(paragraph, truncation=True, max_length=LENGTH) for paragraph in paragraphs]
training, held_out = [each for i, each in enumerate(text) if i % 10], text[::10]
by_topic = Partition.from_lists(np.array_split(np.arange(len(training)), CLIENTS))
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)


class Adapted(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=WORDS, pad_token_id=1, bos_token_id=None, eos_token_id=None, **sizes)
        )
        adapters = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", fan_in_fan_out=True)
        self.model = get_peft_model(base, adapters)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("bits", self.model(**batch).loss / np.log(2))

    def predict_step(self, batch, batch_idx):
        return self.model.generate(input_ids=batch["input_ids"][:, :8], max_new_tokens=4, do_sample=False)

    def configure_optimizers(self):
        return torch.optim.AdamW((each for each in self.parameters() if each.requires_grad), lr=0.01)


def loaders():
    shuffled = DataLoader(training, batch_size=32, shuffle=True, collate_fn=collate)
    return shuffled, DataLoader(held_out, batch_size=64, collate_fn=collate)


def federated(**options):
    return FederatedStrategy(partitioner=by_topic, **options)


def train(strategy, epochs):
    trainer = pl.Trainer(strategy=strategy, max_epochs=epochs, accelerator="cpu", **QUIET)
    model = Adapted()
    before = trainer.validate(model, loaders()[1], verbose=False)[0]["bits"]
    trainer.fit(model, loaders()[0])
    after = trainer.validate(model, loaders()[1], verbose=False)[0]["bits"]
    return {"bits per held-out word": after, "bits before training": before}


def use(trainer):
    """What peft and transformers do with a trained model."""
    model = trainer.lightning_module
    written = torch.cat([rows[:, -4:] for rows in trainer.predict(model, loaders()[1])])
    batch = next(iter(loaders()[1]))
    with torch.no_grad():
        adapted = model.model.eval()(**batch).logits
        merged = model.model.merge_and_unload()(**batch).logits
    print(f"  words written: {written.numel():,}, such as {tokenizer.decode(written[0])!r}")
    print(f"  adapters merged into the model: logits differ by {(adapted - merged).abs().max().item():.2g}")


if __name__ == "__main__":
    compare("peft", train, federated(), passes=5, rounds=15)
    use(check(Adapted, loaders, federated))
