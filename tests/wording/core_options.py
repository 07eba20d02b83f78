"""Messages of `core.options`: what `FederatedStrategy(...)`, a Trainer and a module are told before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ThroughputMonitor
from torch import nn
from torchmetrics import SumMetric

from lightning_fedscale import FederatedStrategy, aggregators, compressors, local_rules, partitioners, privacy, server
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.executors.shared_tensors import shared_tensors_of
from lightning_fedscale.core.options import compatibility, trainer_checks
from lightning_fedscale.core.options.lightning_cli import made_by_path
from tests.wording import Row

PRIVATE = privacy.dp_fed_avg(clip_norm=1.0, noise_multiplier=1.0, delta=1e-5)


class Net(pl.LightningModule):
    """A layer, an Embedding and a BatchNorm, of which a test may take away what it likes."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch: Any, batch_idx: int) -> None: ...


class Iter(Net):
    def training_step(self, dataloader_iter: Any) -> None: ...  # type: ignore[override]


def made(**arguments: Any) -> Callable[[], object]:
    return lambda: FederatedStrategy(**arguments)


def trained(
    module: Net | None = None, *, device: str = "cpu", processes: int = 1, layer_sync: bool = False, **trainer: Any
) -> Callable[[], object]:
    """What is checked when ``fit`` begins."""

    def check() -> None:
        run = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **trainer)
        run.strategy._lightning_module = Net() if module is None else module
        trainer_checks.check_fit(
            run, device=torch.device(device), processes=processes, layer_sync=layer_sync, rounds_per_epoch=1
        )

    return check


def with_model(module: nn.Module, **arguments: Any) -> Callable[[], object]:
    """What is checked when the module is known."""

    def check() -> None:
        options = FederatedStrategy(num_clients=4, **arguments)._options
        algorithm = options.algorithm
        exchange = shared_tensors_of(module, algorithm.personal, algorithm.buffer_policies, [])
        compatibility.check_model(options, module, exchange)

    return check


def with_optimizer(rule: str | local_rules.LocalRule, module: nn.Module, **sgd: Any) -> Callable[[], object]:
    """What is checked when the optimizers are known."""
    options = FederatedStrategy(num_clients=4, local_rule=rule)._options
    kind = sgd.pop("kind", torch.optim.SGD)
    return lambda: compatibility.check_optimizers(options, module, [kind(module.parameters(), lr=0.1, **sgd)])


ROWS: list[Row] = [
    # ---- single arguments
    Row(
        made(partitioner=partitioners.IidPartitioner),
        TypeError,
        "partitioner=IidPartitioner is a class: make an object of it, IidPartitioner(...).",
    ),
    Row(
        made(partitioner=3),
        TypeError,
        "partitioner=3: pass a name such as 'iid' or 'dirichlet', a file, a Partitioner or a Partition"
        " (Partition.from_lists builds one from lists of indices).",
    ),
    Row(
        made(partitioner=partitioners.IidPartitioner(3), num_clients=5),
        ValueError,
        "num_clients=5 but the partitioner has 3 clients: pass the same number to both, or leave num_clients out"
        " (None).",
    ),
    Row(
        made(clients_per_round="half"),
        TypeError,
        "clients_per_round='half': pass a number of clients, a fraction in (0, 1], or None for all of them.",
    ),
    Row(
        made(clients_per_round=1.5),
        ValueError,
        "clients_per_round=1.5: pass a fraction in (0, 1], such as 0.1 for a tenth of the clients, or a number of"
        " clients as an int.",
    ),
    Row(
        made(clients_per_round=11),
        ValueError,
        "clients_per_round=11 is more than num_clients=10: lower it, or leave it out to take all.",
    ),
    Row(
        made(local_epochs=1, local_steps=5),
        ValueError,
        "local_epochs=1 and local_steps=5: give exactly one of them, the passes over its data or the number of batches"
        " that a client trains for in a round; set the other to None.",
    ),
    Row(
        made(sampler=3),
        TypeError,
        "sampler=3: pass a function sampler(*, seed, round, num_clients, clients_per_round) such as"
        " lightning_fedscale.samplers.uniform.",
    ),
    Row(
        made(local_rule=3),
        TypeError,
        "local_rule=3: pass a local_rules.LocalRule such as local_rules.fed_prox(0.1), its name, or None.",
    ),
    Row(
        made(server_optimizer=3),
        TypeError,
        "server_optimizer=3: pass a server.ServerOptimizer such as server.fed_avg(), or wrap a torch optimizer,"
        " server.from_torch(torch.optim.SGD, lr=0.7).",
    ),
    Row(
        made(compressor=0.1),
        TypeError,
        "compressor=0.1: pass a compressor such as compressors.top_k(0.01), its name, or None.",
    ),
    Row(made(privacy=1.0), TypeError, "privacy=1.0: pass the result of privacy.dp_fed_avg(...), or None."),
    Row(
        made(personal="head"),
        TypeError,
        "personal='head': pass a list of patterns of names, such as ['head.*'], or local_rules.Ditto(0.1).",
    ),
    Row(made(mode="asink"), ValueError, "mode='asink': choose 'sync', 'async' or an asynchrony.FedBuff(...)."),
    Row(
        made(client_optimizer="kept"),
        ValueError,
        "client_optimizer='kept': choose 'reset', a fresh optimizer in every round, or 'keep', the optimizer's state"
        " stays with the client.",
    ),
    Row(made(executor="all"), ValueError, "executor='all': choose 'auto', 'sequential' or 'vectorized'."),
    Row(made(cache_dataset="yes"), ValueError, "cache_dataset='yes': choose 'auto', True or False."),
    Row(
        made(population=3),
        TypeError,
        "population=3: pass a devices.Population such as Population({'phone': 0.7, 'jetson': 0.3}).",
    ),
    Row(made(timeout=30), TypeError, "timeout=30: pass a datetime.timedelta, such as timedelta(minutes=30)."),
    Row(
        made(start_method="thread"),
        ValueError,
        "start_method='thread': choose one of 'popen', 'fork', 'spawn', 'forkserver'.",
    ),
    # ---- arguments that do not go together
    Row(
        made(personal=local_rules.Ditto(0.1), client_optimizer="keep"),
        ValueError,
        "personal=Ditto(0.1) with client_optimizer='keep': a client trains two models, and one optimizer state cannot"
        " serve both. Use client_optimizer='reset'.",
    ),
    Row(
        made(buffers={"queue": "largest"}, aggregator=privacy.secure_mean(clip=1.0)),
        ValueError,
        "buffers={'queue': 'largest'} with aggregator=secure_mean(clip=1, bits=16, threshold=0.666667): the server"
        " would see the buffer of a single client. Use 'client', by which each client keeps its own value, or 'server',"
        " by which the initial value stays.",
    ),
    Row(
        made(local_rule="scaffold", aggregator="median"),
        UserWarning,
        "local_rule='scaffold' with aggregator=median(): clients also send a vector of the local rule, which is summed"
        " without protection from hostile clients. Use local_rules.fed_prox(...) if there may be any.",
    ),
    Row(
        made(privacy=PRIVATE, aggregator=aggregators.median()),
        ValueError,
        "aggregator=median() with privacy: the noise is calibrated for a sum of clipped updates. Leave aggregator out;"
        " privacy has its own weights.",
    ),
    Row(
        made(privacy=PRIVATE, local_rule="scaffold"),
        ValueError,
        "privacy with local_rule='scaffold': clients would send values besides their update without clipping and noise."
        " Use local_rules.fed_prox(...) or no local rule.",
    ),
    Row(
        made(privacy=PRIVATE, mode="async"),
        ValueError,
        "privacy with mode='async': the clients that arrive are not a Poisson sample, so their privacy loss is unknown."
        " Use mode='sync'.",
    ),
    Row(
        made(privacy=PRIVATE, clients_per_round=3),
        ValueError,
        "privacy with sampler=uniform and clients_per_round=3: the privacy loss is known if each client takes part"
        " independently of the others. Use sampler='poisson', or clients_per_round=None.",
    ),
    Row(
        made(mode="async", local_rule="scaffold"),
        ValueError,
        "local_rule='scaffold' with mode='async': a client's correction uses the server's state at its start, which is"
        " outdated when its update arrives. Use fed_prox, fed_nova or no local rule, or mode='sync'.",
    ),
    Row(
        made(mode="async", local_steps=local_rules.schedules.post_local(2, 4)),
        ValueError,
        "local_steps=in_stages({0: 1, 2: 4}) is a function of the round, so that with mode='async' the times at which"
        " clients arrive would depend on later rounds. Pass a number of local steps.",
    ),
    Row(
        made(mode="async", sampler="poisson"),
        ValueError,
        "sampler=poisson with mode='async': it would never be called, since a client that is done is replaced by one"
        " drawn uniformly. Leave sampler out.",
    ),
    # ---- Trainer and module
    Row(
        trained(layer_sync=True),
        ValueError,
        "Trainer(sync_batchnorm=True): clients train independently, so they must not share batch statistics. Remove it;"
        " FederatedStrategy averages the buffers of BatchNorm after every round.",
    ),
    Row(
        trained(device="mps"),
        ValueError,
        "accelerator: FederatedStrategy runs on CPU and CUDA, not on 'mps': use Trainer(accelerator='cpu').",
    ),
    Row(
        trained(Net(layer=nn.LazyLinear(3))),
        ValueError,
        "the model has lazy layers whose parameters have no shape yet: run a forward pass on one batch in"
        " LightningModule.configure_model, so that all clients start from the same weights.",
    ),
    Row(
        trained(Net(layer=nn.ReLU(), norm=nn.ReLU())),
        ValueError,
        "the model has 0 parameters, so clients have nothing to train: assign its layers as attributes of the"
        " LightningModule.",
    ),
    Row(
        trained(Iter()),
        ValueError,
        "training_step(self, dataloader_iter) is not supported, since the strategy gives each client its batches: use"
        " training_step(self, batch, batch_idx).",
    ),
    Row(
        trained(Net(total=SumMetric(dist_sync_on_step=True)), processes=2),
        ValueError,
        "metric 'total' has dist_sync_on_step=True, but clients train independently and may take different numbers of"
        " steps: set it to False; it is still reduced over ranks at the epoch's end.",
    ),
    Row(
        trained(Net(layer=nn.Embedding(2, 2, sparse=True)), gradient_clip_val=1.0),
        ValueError,
        "Trainer(gradient_clip_val=1.0): the gradient of 'layer' is sparse, and torch cannot clip sparse gradients:"
        " pass sparse=False to this layer, or override configure_gradient_clipping.",
    ),
    Row(
        trained(val_check_interval=5),
        ValueError,
        "Trainer(val_check_interval=5) counts rounds within an epoch, and an epoch has 1: use"
        " FederatedStrategy(rounds_per_epoch=5), or Trainer(check_val_every_n_epoch=5) without it.",
    ),
    Row(
        trained(accumulate_grad_batches=2, callbacks=[GradientAccumulationScheduler({0: 2})]),
        ValueError,
        "Trainer(accumulate_grad_batches=2) and the callback GradientAccumulationScheduler, which sets it in every"
        " epoch: remove one of them.",
    ),
    Row(
        trained(callbacks=[ThroughputMonitor(len)]),
        ValueError,
        "callbacks: ThroughputMonitor counts one batch per step, but a step is a round here. Remove it; round/samples,"
        " round/local_steps and round/seconds are logged every round.",
    ),
    Row(
        lambda: trainer_checks.check_trainable(Net().requires_grad_(False)),
        ValueError,
        "the model has 4 parameter tensors and none of them is trainable: set requires_grad=True for those that clients"
        " should train, before the round begins.",
    ),
    Row(
        lambda: trainer_checks.check_optimizers(Net(), []),
        ValueError,
        "configure_optimizers returned no optimizer, so clients cannot train: return at least one, such as"
        " torch.optim.SGD(self.parameters(), lr=0.1).",
    ),
    Row(
        lambda: trainer_checks.check_optimizers(Net(), [torch.optim.SGD([nn.Parameter(torch.zeros(3, 5))], lr=0.1)]),
        ValueError,
        "configure_optimizers: an optimizer has a parameter of shape (3, 5) that is not part of the model, so all"
        " clients would share it: assign its layer as an attribute of the LightningModule, or remove it from the"
        " optimizer.",
    ),
    # ---- arguments and the module
    Row(
        with_model(Net(), personal=["haed.*"]),
        ValueError,
        "personal=['haed.*'] matches no parameter or buffer: correct the patterns; some of the names are"
        " 'layer.weight', 'layer.bias', 'norm.weight'.",
    ),
    Row(
        with_model(Net(), personal=["*"]),
        ValueError,
        "personal=['*'] matches all parameters, so clients share none: pass fewer patterns.",
    ),
    Row(
        with_model(Net(), buffers={"norm.runing_mean": "server"}),
        ValueError,
        "buffers={'norm.runing_mean': 'server'} matches no buffer. Did you mean 'norm.running_mean'? The names are"
        " 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked': correct the pattern or leave it out.",
    ),
    Row(
        with_model(Net(), privacy=PRIVATE),
        ValueError,
        "privacy: clients would send the running statistics of 'norm' without clipping. Keep them on the clients by"
        " personal=['norm.*'], or use GroupNorm or LayerNorm.",
    ),
    Row(
        with_optimizer("scaffold", Net(), kind=torch.optim.Adam),
        ValueError,
        "local_rule='scaffold' computes a client's mean gradient from its steps, but steps of Adam are not multiples of"
        " gradients: use local_rules.scaffold(option='I'), which takes any optimizer for one more pass over the data,"
        " or torch.optim.SGD (plain SGD) with one learning rate.",
    ),
    Row(
        with_optimizer("fed_nova", Net(), momentum=0.9, nesterov=True),
        ValueError,
        "local_rule='fed_nova' computes a client's mean gradient from its steps, but it does not support dampening and"
        " Nesterov momentum: use the same local_steps for all clients without it, or local_rules.fed_prox(mu=0.01), or"
        " torch.optim.SGD (SGD, with or without momentum) with one learning rate.",
    ),
    Row(
        with_optimizer("scaffold", Net(automatic_optimization=False)),
        ValueError,
        "local_rule='scaffold' needs the gradients and steps of automatic optimization, and this module has"
        " automatic_optimization=False: use automatic optimization, or local_rules.fed_prox(mu=0.01).",
    ),
    Row(
        lambda: compatibility.warn_of_lost_errors(
            FederatedStrategy(compressor=compressors.error_feedback(compressors.top_k(0.1)))._options, 100, 10, 5
        ),
        UserWarning,
        "compressor=error_feedback(top_k(0.1)): a client adds its compression error to its next update, but with 10 of"
        " 100 clients in each of 5 rounds most clients take part only once, and their errors are lost. Use an unbiased"
        " compressor (qsgd, random_k), which needs no error feedback.",
    ),
    # ---- configuration files
    Row(
        lambda: made_by_path(Compressor, {"ratio": 0.1}),
        ValueError,
        "{'ratio': 0.1}: pass the class_path of a function that returns a Compressor, and its init_args.",
    ),
    Row(
        lambda: made_by_path(Compressor, {"class_path": f"{server.__name__}.fed_avg"}),
        ValueError,
        "class_path='lightning_fedscale.server.fed_avg' returns a ServerOptimizer: pass a function that returns a"
        " Compressor.",
    ),
    Row(
        lambda: made_by_path(Compressor, {"class_path": "os.sep"}),
        ValueError,
        "class_path='os.sep' is not a function: pass package.module.name of one.",
    ),
]
