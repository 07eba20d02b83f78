"""Messages of `core.round`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_fedscale import FederatedStrategy, Partition, aggregators, devices, local_rules, server
from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.core.round import server_step
from lightning_fedscale.core.round.client_data import ClientData
from lightning_fedscale.core.round.client_states import ClientStates
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.core.round.module_tensors import ModuleTensors
from lightning_fedscale.core.round.notifier import Notifier
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils.flat_view import FlatView
from tests.wording import Row

CPU = torch.device("cpu")
PHONES = devices.Population({"phone": 1.0}, min_clients=1, deadline=9.0)
COHORT = Cohort(3, np.arange(2), 5, 2, 0)


def data(
    module: nn.Module | None = None,
    ranks: int = 1,
    sizes: tuple[int, ...] = (4, 4),
    loader: dict[str, Any] | None = None,
    **options: Any,
) -> ClientData:
    bounds = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    strategy = FederatedStrategy(partitioner=Partition.from_lists(bounds), num_clients=None, **options)
    loaded: DataLoader[Any] = DataLoader(range(sum(sizes)), **({"batch_size": 2} if loader is None else loader))  # type: ignore[arg-type]
    return ClientData(module or nn.Linear(1, 1), loaded, strategy._options, ranks, 1.0, device=CPU, show_progress=False)


class Batches(BatchSampler):
    """Cuts batches as it likes, for all that is known."""


def custom_batches() -> dict[str, Any]:
    return {"batch_sampler": Batches(SequentialSampler(range(8)), 2, False)}


def table(*norms: float, steps: int = 1) -> RoundTable:
    made = RoundTable(RoundPlan(3, np.arange(len(norms)), np.zeros(len(norms), np.int64)), 1)
    for client, norm in enumerate(norms):
        update = ClientUpdate(client, torch.zeros(2), norm, 4, 4, steps, 0.5, 0.1)
        made.clients.add(update, 4.0, (0, 0), (0.0, 0.0))
    return made


def aggregate(found: RoundTable, finish: Any = lambda total, cohort: total[:-1]) -> Tensor:
    strategy = FederatedStrategy(num_clients=2, aggregator=aggregators.mean()._replace(finish=finish))
    model = server_step.GlobalModel(strategy._options.algorithm, server.fed_avg())
    return model.aggregate(FlatView([torch.zeros(2)], []), torch.ones(3), found, COHORT)


def opened_after_unfreezing() -> None:
    strategy = FederatedStrategy(num_clients=2, local_rule=local_rules.scaffold())
    model = server_step.GlobalModel(strategy._options.algorithm, server.fed_avg())
    model.states = model.open_round(FlatView([torch.zeros(2)], []))
    model.open_round(FlatView([torch.zeros(4)], []))


def tensors(**options: Any) -> ModuleTensors:
    return ModuleTensors(SimpleNamespace(), FederatedStrategy(num_clients=2, **options)._options)  # type: ignore[arg-type]


def trained_after_freezing() -> None:
    made = tensors(compressor="qsgd", local_rule="scaffold")
    for names in (["weight", "bias"], ["weight"]):
        made.check_trained(SimpleNamespace(names=names))  # type: ignore[arg-type]


def saved_inside_a_client() -> None:
    options = FederatedStrategy(num_clients=2, client_optimizer="keep")._options
    ClientStates(options, 0, 2, device=CPU, processes=2).state_dict(in_client=True)


def first_round_without_a_loss() -> None:
    made, record = Notifier.__new__(Notifier), table(0.0).record(0.0, 8)
    made._trainer = SimpleNamespace(lightning_module=SimpleNamespace(automatic_optimization=True))  # type: ignore[assignment]
    made._warn_of_no_loss(record.__class__(**{**vars(record), "round": 0, "losses": np.array([math.nan])}))


ROWS: list[Row] = [
    Row(
        lambda: data(ranks=3),
        ValueError,
        "clients_per_round=2: each of the 3 ranks (devices x nodes) needs a client: pass Trainer(devices=2) or more"
        " clients_per_round.",
    ),
    Row(
        lambda: data(sizes=(4, 1), loader={"batch_size": 2, "drop_last": True}),
        ValueError,
        "train_dataloader: drop_last=True with batch_size=2 leaves 1 of 2 clients without a batch (client 1): set"
        " drop_last=False, use a smaller batch_size, or a partitioner with a larger min_partition_size.",
    ),
    Row(
        lambda: data(nn.BatchNorm1d(1), sizes=(4, 1)),
        UserWarning,
        "partitioner: 1 client(s) have only one sample (client 1), and BatchNorm may fail on a batch of one: pass a"
        " partitioner with min_partition_size=2.",
    ),
    Row(
        lambda: data(population=PHONES, loader=custom_batches()),
        ValueError,
        "population: batch_size='largest' has no effect on a loader with a custom batch_sampler: pass Population(...,"
        " batch_size='loader') or a DataLoader with a batch_size.",
    ),
    Row(
        lambda: data(ranks=2, population=PHONES),
        ValueError,
        "population: min_clients=1 may leave some of the 2 ranks (devices x nodes) without a client: pass"
        " Population(..., min_clients=2) or fewer devices.",
    ),
    Row(
        lambda: data(mode="async", clients_per_round=1),
        ValueError,
        "mode='async': the time that each client takes is unknown: pass population=Population(...), or"
        " mode=FedBuff(seconds=[...]) with one number for each client.",
    ),
    Row(
        lambda: data(mode=FedBuff(seconds=[1.0]), clients_per_round=1),
        ValueError,
        "seconds: 1 number(s) were given for 2 clients: pass one for each.",
    ),
    Row(
        lambda: data(mode="async", clients_per_round=1, population=PHONES),
        ValueError,
        "population: deadline and over_selection have no meaning with mode='async', where rounds do not wait for"
        " clients: leave them out.",
    ),
    Row(
        saved_inside_a_client,
        RuntimeError,
        "save_checkpoint: on several ranks, what clients keep (client_optimizer='keep', local_rule, compressor,"
        " personal, buffers) can only be saved between rounds, not while a client trains: save in a callback's"
        " on_train_batch_end.",
    ),
    Row(
        trained_after_freezing,
        ValueError,
        "local_rule='scaffold': its state belongs to the 2 parameters that were trainable in the previous round, but"
        " 'bias' is frozen now: do not freeze or unfreeze layers with this argument.",
    ),
    Row(
        lambda: tensors().warn_of_averages(["queue"]),
        UserWarning,
        "buffers: 'queue' changed while clients trained, and the global model takes the mean over clients. This is"
        " right for a quantity, but wrong for a queue, a table or a flag: choose a policy with"
        " FederatedStrategy(buffers={'queue': ...}): 'mean'; 'largest' for the values of the client with the most"
        " samples; 'server' for values that do not change; 'client' for values that stay with each client. Give"
        " buffers that belong together, such as a queue and its pointer, the same policy.",
    ),
    Row(
        lambda: tensors().add_written(["teacher.weight"], 3),
        UserWarning,
        "frozen parameters: 'teacher.weight' changed while clients trained in round 3, which starts again: from now on"
        " they are exchanged, and the global model takes the mean over clients. Pass"
        " FederatedStrategy(buffers={'teacher.weight': 'mean'}) to exchange them from the start.",
    ),
    Row(
        lambda: tensors()._check_shapes(["queue"]),
        UserWarning,
        "buffers: 'queue' appeared, disappeared or changed shape while a client trained, so there is no mean: the"
        " global model takes the values of the client with the most samples. Pass FederatedStrategy(buffers={'queue':"
        " 'client'}) to keep them with each client.",
    ),
    Row(
        lambda: tensors(personal=local_rules.Ditto(0.1))._check_shapes(["queue"]),
        ValueError,
        "buffers: 'queue' appeared, disappeared or changed shape while a client trained, which mode='async' and"
        " local_rules.Ditto do not support: pass FederatedStrategy(buffers={'queue': 'server'}) or 'client', or keep"
        " one shape.",
    ),
    Row(
        first_round_without_a_loss,
        UserWarning,
        "training_step returned None for every batch of the first round, so no client has learnt anything: return the"
        " loss, or set automatic_optimization=False to step optimizers yourself.",
    ),
    Row(
        opened_after_unfreezing,
        ValueError,
        "local_rule='scaffold': its state belongs to other parameters than the 4 trainable elements of this round: do"
        " not freeze or unfreeze layers with this argument.",
    ),
    Row(
        lambda: aggregate(table(math.nan, math.nan)),
        server_step.Diverged,
        "round 3: the updates of all 2 clients have NaN or infinite values, so the global model stays as it was before"
        " this round: lower the learning rate, clip gradients (Trainer(gradient_clip_val=1.0)) or look for bad"
        " samples.",
    ),
    Row(
        lambda: aggregate(table(1.0, math.nan)),
        UserWarning,
        "round 3: left out 1 client(s) because the update has NaN or infinite values: 1.",
    ),
    Row(
        lambda: aggregate(table(math.nan, math.nan, steps=0)),
        UserWarning,
        "round 3: left out 2 client(s) because the collate function returned None for every batch: 0, 1.",
    ),
    Row(
        lambda: aggregate(table(1.0), finish=lambda total, cohort: total),
        ValueError,
        "aggregator: finish returned a tensor of shape (3,), but must return one of the clients' deltas' shape, (2,).",
    ),
    Row(
        lambda: server_step._copied([np.ones(2)]),
        TypeError,
        "aggregator: its state contains a ndarray, which checkpoints cannot contain: use tensors, numbers and strings,"
        " in dicts, lists and tuples.",
    ),
    Row(
        lambda: server_step._checked(1, {}),
        TypeError,
        "server_optimizer: update must return (step, state), and step must have one tensor for each parameter, with the"
        " names and shapes of delta.",
    ),
]
