"""Darts: its N-BEATS and temporal convolutions over many series, data set and `predict`, unmodified.

The series are drawn here; every series is a client. `make existing` installs what this needs and runs it.
"""

from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
from comparison import QUIET, compare
from darts import TimeSeries
from darts.metrics import mae
from darts.models import NBEATSModel, TCNModel
from own_trainers import check

from lightning_fedscale.partitioners import IidPartitioner
from lightning_fedscale.pytorch_lightning import FederatedStrategy

SILENT = {key: value for key, value in QUIET.items() if key != "enable_checkpointing"}
SERIES, LENGTH, INPUT, AHEAD = 20, 200, 24, 12

# A wave of every length from 6 to 15.5 steps, under noise.
steps, noise = np.arange(LENGTH), np.random.default_rng(0).normal(0.0, 0.1, (SERIES, LENGTH))
waves = [
    TimeSeries.from_values((np.sin(2 * np.pi * steps / (6 + number / 2)) + noise[number]).astype(np.float32))
    for number in range(SERIES)
]
known, future = [wave[:-AHEAD] for wave in waves], [wave[-AHEAD:] for wave in waves]
last = [wave[-INPUT - AHEAD :] for wave in waves]  # one sample each

# As many samples of each, one series after the other, is how Darts lays them out: parts as they lie are the series.
one_each = IidPartitioner(SERIES, shuffle=False)
MODELS = {
    "N-BEATS": (NBEATSModel, {"num_stacks": 4, "num_blocks": 1, "layer_widths": 32}),
    "TCN": (TCNModel, {"num_filters": 8, "kernel_size": 3, "dropout": 0.0}),
}


def federated(**options):
    return FederatedStrategy(partitioner=one_each, clients_per_round=10, **options)


def fit(name, strategy, epochs, callbacks=(), saved=None, **trainer):
    kind, size = MODELS[name]
    given = {"strategy": strategy, "accelerator": "cpu", "callbacks": [*callbacks], **SILENT, **trainer}
    size = {**size, **(saved or {})}
    model = kind(INPUT, AHEAD, batch_size=64, n_epochs=epochs, random_state=0, pl_trainer_kwargs=given, **size)
    return model.fit(known, val_series=last)


def resume(name, strategy, epochs, callbacks):
    """As Darts does it: it saves the Trainer's arguments with the model, strategy and callbacks included."""
    with TemporaryDirectory() as folder:
        saved = {"save_checkpoints": True, "model_name": "half", "work_dir": folder}
        fit(name, strategy(), epochs // 2, callbacks(), saved)
        half = MODELS[name][0].load_from_checkpoint("half", folder, best=False, trusted=True)
        return half.fit(known, val_series=last, epochs=epochs)


def error(forecasts):
    return np.mean(mae(future, forecasts))


def train(strategy, epochs):
    results = {}
    for name in MODELS:
        forecasts = fit(name, strategy, epochs).predict(AHEAD, known)
        results[f"MAE of the forecasts, {name}"] = error(forecasts)
    results["MAE of repeating the last value"] = np.mean(
        [np.abs(wave.values() - part.last_value()).mean() for wave, part in zip(future, known, strict=True)]
    )
    return results


if __name__ == "__main__":
    compare("darts", train, federated(), passes=10, rounds=40)
    for name in MODELS:
        print(name)
        one, two = check(partial(fit, name), partial(resume, name), federated)
        alone = pl.Trainer(accelerator="cpu", devices=1, **QUIET)  # Darts would predict with as many processes
        errors = error(one.predict(AHEAD, known)), error(two.predict(AHEAD, known, trainer=alone))
        print("  predict: MAE of {:.4g} after one process, {:.4g} after two".format(*errors))
