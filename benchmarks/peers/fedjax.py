"""fedjax's `federated_averaging` with jit-compiled clients, as in its example fed_avg.py.

Its models are pure functions of their parameters, so the task's model is written again in jax; parameters keep their
torch names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import Contest, Task

Params = dict[str, Any]


def mlp(params: Params, inputs: Any) -> Any:
    """Linear layers "0", "2", ... with ReLU between."""
    layers = sorted({int(name.split(".")[0]) for name in params})
    for layer in layers:
        inputs = inputs @ params[f"{layer}.weight"] + params[f"{layer}.bias"]
        if layer != layers[-1]:
            inputs = jax.nn.relu(inputs)
    return inputs


def cnn(params: Params, inputs: Any) -> Any:
    """The CNN of `benchmarks.models`, with the colour last."""
    for layer in ("0", "3"):
        inputs = jax.lax.conv_general_dilated(
            inputs, params[f"{layer}.weight"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        inputs = jax.nn.relu(inputs + params[f"{layer}.bias"])
        inputs = jax.lax.reduce_window(inputs, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    hidden = inputs.reshape(len(inputs), -1) @ params["7.weight"] + params["7.bias"]
    return jax.nn.relu(hidden) @ params["9.weight"] + params["9.bias"]


MODELS: dict[str, Callable[[Params, Any], Any]] = {"mlp": mlp, "cnn": cnn}


def to_jax(weights: Mapping[str, np.ndarray]) -> Params:
    """Torch's layout to jax's: inputs first, colour last."""
    converted = {}
    for name, value in weights.items():
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.shape == (512, 1600):  # Flattened with the colour first there, last here.
            value = value.reshape(512, 64, 5, 5).transpose(2, 3, 1, 0).reshape(1600, 512)
        elif value.ndim == 2:
            value = value.T
        converted[name] = jnp.asarray(value)
    return converted


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """Back again."""
    converted = {}
    for name, array in params.items():
        value = np.asarray(array)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.shape == (1600, 512):
            value = value.reshape(5, 5, 64, 512).transpose(3, 2, 0, 1).reshape(512, 1600)
        elif value.ndim == 2:
            value = value.T
        converted[name] = value
    return converted


def federated_data(task: Task) -> fedjax.InMemoryFederatedData:
    """The clients that take part."""
    inputs = task.inputs.transpose(0, 2, 3, 1) if task.inputs.ndim == 4 else task.inputs
    return fedjax.InMemoryFederatedData(
        {
            client: {"x": inputs[task.client(client)], "y": task.labels[task.client(client)].astype(np.int32)}
            for client in np.unique(task.cohorts).tolist()
        }
    )


def main() -> None:
    contest = Contest()
    task = contest.task
    np.random.seed(contest.seed)
    model = MODELS[task.settings["model"][0]]

    def loss(params: Params, batch: Mapping[str, Any], rng: Any) -> Any:
        scores = jax.nn.log_softmax(model(params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(scores, batch["y"][:, None], axis=1))

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        client_optimizer=fedjax.optimizers.sgd(learning_rate=task.settings["lr"]),
        server_optimizer=fedjax.optimizers.sgd(learning_rate=1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(batch_size=task.settings["batch_size"]),
    )
    data = federated_data(task)
    state = algorithm.init(to_jax(task.initial))
    rng = jax.random.PRNGKey(contest.seed)
    for cohort in task.cohorts.tolist():
        rng, *keys = jax.random.split(rng, len(cohort) + 1)
        clients = [(client, data.get_client(client), key) for client, key in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        contest.round_over()
    contest.finish(to_torch(state.params), fedjax=version("fedjax"), jax=version("jax"))


if __name__ == "__main__":
    main()
