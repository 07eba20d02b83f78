"""Messages of `core.lightning`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.lightning import checkpoint, half_batch_gradients
from lightning_fedscale.core.lightning.train_data import TrainData, _with_batch_size
from tests.laws import reference
from tests.wording import Row


def train_data(loader: object, *, need_samples: bool = True) -> TrainData:
    trainer = reference.quiet_trainer()
    trainer.strategy.connect(BoringModel())
    trainer.fit_loop._data_source.instance = loader
    return TrainData(trainer, need_samples=need_samples)


def resumed(**saved: Any) -> None:
    state = {"format": 1, "seed": 0, "num_clients": 4, "partition": "0123456789abcdef", **saved}
    checkpoint.check_resume(state, seed=0, num_clients=4, partition="0123456789abcdef")


def used_twice() -> None:
    strategy = FederatedStrategy(num_clients=2)
    strategy._in_use = (reference.quiet_trainer(), BoringModel())
    reference.quiet_trainer(strategy=strategy)


def own_batches() -> DataLoader[Any]:
    class Own(BatchSampler):
        pass

    loader: DataLoader[Any] = DataLoader(range(4), batch_sampler=Own(SequentialSampler(range(4)), 2, False))  # type: ignore[arg-type]
    return loader


ROWS: list[Row] = [
    Row(
        lambda: checkpoint.AtomicCheckpointIO().save_checkpoint({}, "a.ckpt", storage_options={"codec": 1}),
        TypeError,
        "storage_options={'codec': 1}: AtomicCheckpointIO writes to local folders and takes no such options, leave it"
        " out.",
    ),
    Row(
        lambda: resumed(format=7),
        ValueError,
        "ckpt_path: the checkpoint has format 7 and this version reads up to 1: upgrade lightning-fedscale.",
    ),
    Row(
        lambda: resumed(num_clients=9),
        ValueError,
        "num_clients=4 differs from num_clients=9 in the checkpoint: resume with FederatedStrategy(num_clients=9), or"
        " start a new run without ckpt_path.",
    ),
    Row(
        lambda: resumed(partition="fedcba9876543210"),
        ValueError,
        "partitioner: the data is divided among clients differently (hash 0123456789ab) than in the checkpoint (hash"
        " fedcba987654): use the same dataset and the same partitioner with the same arguments, or start a new run"
        " without ckpt_path.",
    ),
    Row(
        lambda: checkpoint.refuse_other_rules({"local_rule": "scaffold"}, {"local_rule": "fed_dyn"}),
        ValueError,
        "local_rule='fed_dyn' differs from 'scaffold' in the checkpoint: resume with 'scaffold', or start a new run"
        " without ckpt_path.",
    ),
    Row(
        lambda: checkpoint.refuse_other_owners({"personal": []}, {"personal": ["head.*"]}),
        ValueError,
        "buffers, personal: each client keeps ['head.*'] for itself now, but [] in the checkpoint: resume with the"
        " arguments of the saved run, or start a new run without ckpt_path.",
    ),
    Row(
        used_twice,
        RuntimeError,
        "strategy: another Trainer is running with this FederatedStrategy object: wait until it has ended, or create"
        " one FederatedStrategy for each Trainer.",
    ),
    Row(
        lambda: train_data(pl.LightningModule()),
        ValueError,
        "train_dataloaders: MaxBatchProbe needs training data, but found none: pass train_dataloaders or a datamodule"
        " to trainer.fit, or define train_dataloader in the module.",
    ),
    Row(
        lambda: train_data([1, 2]),
        ValueError,
        "train_dataloaders=list: MaxBatchProbe needs a torch.utils.data.DataLoader to take samples from; for other"
        " loaders pass make_batch=, a function of the number of samples.",
    ),
    Row(
        lambda: train_data([1, 2], need_samples=False).keepers("size"),
        ValueError,
        "batch_arg_name='size': neither the data module nor the module has an attribute or a hyperparameter of this"
        " name: pass the name of their batch size.",
    ),
    Row(
        lambda: train_data([1, 2], need_samples=False).set_batch_size(4),
        ValueError,
        "train_dataloaders=list: there is no batch size to set, since this is no DataLoader: keep one as `batch_size`"
        " in the data module or the module and build the loader from it, or pass apply=False to only report.",
    ),
    Row(
        lambda: _with_batch_size(own_batches(), 4),
        ValueError,
        "train_dataloaders=DataLoader: there is no batch size to set, since the loader has batch_size=None and"
        " batch_sampler=Own: keep one as `batch_size` in the data module or the module and build the loader from it,"
        " or pass apply=False to only report.",
    ),
    Row(
        lambda: rank_zero_warn(half_batch_gradients.no_halves(ValueError("odd"))),
        UserWarning,
        "CriticalPhase: the noise of single samples is not measured, since a copy of the module cannot run on half a"
        " batch (ValueError: odd): pass noise_every=None to silence this warning.",
    ),
]
