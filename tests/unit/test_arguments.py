"""What `FederatedStrategy(...)` refuses or accepts before it has seen a Trainer, and that it pickles."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_fedscale import FederatedStrategy, Partition, partitioners, samplers, server
from lightning_fedscale.core.options.options import Options
from tests.ids import stable
from tests.laws import reference

WHOLE = "pass an integer of at least 1"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_clients": 0}, ValueError, f"num_clients=0: {WHOLE}"),
        ({"num_clients": -3}, ValueError, f"num_clients=-3: {WHOLE}"),
        ({"num_clients": True}, TypeError, f"num_clients=True: {WHOLE}, not bool"),
        ({"num_clients": 2.5}, TypeError, f"num_clients=2.5: {WHOLE}, not float"),
        ({"num_clients": "4"}, TypeError, f"num_clients='4': {WHOLE}, not str"),
        ({"clients_per_round": 0}, ValueError, f"clients_per_round=0: {WHOLE}"),
        ({"clients_per_round": -1}, ValueError, f"clients_per_round=-1: {WHOLE}"),
        ({"clients_per_round": True}, TypeError, "clients_per_round=True: "),
        ({"clients_per_round": "half"}, TypeError, "clients_per_round='half': "),
        ({"clients_per_round": 11}, ValueError, "clients_per_round=11 is more than num_clients=10"),
        ({"clients_per_round": np.int64(11)}, ValueError, "clients_per_round=11 is more than num_clients=10"),
        ({"num_clients": 4, "clients_per_round": 5}, ValueError, "clients_per_round=5 is more than num_clients=4"),
        ({"clients_per_round": 0.0}, ValueError, r"clients_per_round=0.0: .* \(0, 1\]"),
        ({"clients_per_round": -0.1}, ValueError, r"clients_per_round=-0.1: .* \(0, 1\]"),
        ({"clients_per_round": 1.5}, ValueError, r"clients_per_round=1.5: .* \(0, 1\]"),
        ({"clients_per_round": 2.0}, ValueError, r"clients_per_round=2.0: .* int"),
        ({"clients_per_round": float("nan")}, ValueError, r"clients_per_round=nan: .* \(0, 1\]"),
        ({"partitioner": "dirichlt"}, ValueError, "partitioner='dirichlt' is not known. Did you mean 'dirichlet'"),
        ({"partitioner": "zzz"}, ValueError, "partitioner='zzz' is not known. Known: 'iid', 'dirichlet'"),
        ({"partitioner": "size"}, ValueError, r"partitioner='size' needs partition_sizes: pass .*SizePartitioner\("),
        ({"partitioner": None}, TypeError, "partitioner=None: "),
        ({"partitioner": {0: [1]}}, TypeError, r"partitioner=\{0: \[1\]\}: .*Partition.from_lists"),
        ({"start_method": "thread"}, ValueError, "start_method='thread': "),
        ({"process_group_backend": "x"}, ValueError, r"process_group_backend='x': choose one of .*'gloo'.*, or None"),
        ({"process_group_backend": 3}, ValueError, "process_group_backend=3: choose one of"),
        ({"process_group_backend": "cpu:gloo,cuda:x"}, ValueError, "process_group_backend='cpu:gloo,cuda:x': choose"),
        ({"timeout": 30}, TypeError, "timeout=30: .*timedelta"),
        (
            {"partitioner": partitioners.IidPartitioner},
            TypeError,
            "partitioner=IidPartitioner is a class: make an object",
        ),
        ({"partitioner": [[0, 1], [2]]}, TypeError, r"partitioner=\[\[0, 1\], \[2\]\]: pass a name .* or a Partition"),
        (
            {"partitioner": partitioners.DirichletPartitioner(4, alpha=1.0, seed=None)},
            ValueError,
            r"partitioner=Dirichlet.*: seed=None ",
        ),
        (
            {"num_clients": 5, "partitioner": partitioners.IidPartitioner(4)},
            ValueError,
            "num_clients=5 but .* 4 clients",
        ),
        (
            {"num_clients": 5, "partitioner": reference.unequal_clients()},
            ValueError,
            "num_clients=5 but .* 7 clients",
        ),
        (
            {"clients_per_round": 8, "partitioner": reference.unequal_clients()},
            ValueError,
            "clients_per_round=8 is more than num_clients=7",
        ),
        ({"local_epochs": None}, ValueError, "local_epochs=None and local_steps=None: "),
        ({"local_epochs": 1, "local_steps": 5}, ValueError, "local_epochs=1 and local_steps=5: "),
        ({"local_epochs": 0}, ValueError, f"local_epochs=0: {WHOLE}"),
        ({"local_epochs": True}, TypeError, f"local_epochs=True: {WHOLE}"),
        ({"local_epochs": 1.5}, TypeError, f"local_epochs=1.5: {WHOLE}"),
        ({"local_epochs": "all"}, TypeError, f"local_epochs='all': {WHOLE}"),
        ({"local_steps": 0}, ValueError, f"local_steps=0: {WHOLE}"),
        ({"local_steps": -5}, ValueError, f"local_steps=-5: {WHOLE}"),
        ({"local_steps": 2.5}, TypeError, f"local_steps=2.5: {WHOLE}"),
        ({"local_steps": lambda: 3}, TypeError, "local_steps=<function .*too many positional arguments; pass a number"),
        ({"rounds_per_epoch": 0}, ValueError, f"rounds_per_epoch=0: {WHOLE}"),
        ({"rounds_per_epoch": 1.5}, TypeError, f"rounds_per_epoch=1.5: {WHOLE}"),
        ({"sampler": "unifrm"}, ValueError, r"sampler='unifrm' is not known\. Did you mean 'uniform'"),
        ({"sampler": lambda seed, round: [1]}, TypeError, "unexpected keyword argument 'num_clients'; pass a function"),
        ({"aggregator": "men"}, ValueError, "aggregator='men' is not known. Did you mean 'mean'"),
        ({"aggregator": 3}, TypeError, "aggregator=3: pass one of 'mean', 'median'"),
        ({"server_optimizer": "sgd"}, ValueError, r"server_optimizer='sgd' is not known\. .*'from_torch'"),
        ({"server_optimizer": torch.optim.SGD}, TypeError, r"server_optimizer=<class .*server.from_torch\("),
        (
            {"server_optimizer": server.fed_avg},
            TypeError,
            r"=fed_avg is a function.*server.fed_avg\(\)",
        ),
        ({"client_optimizer": "kept"}, ValueError, "client_optimizer='kept': .*'reset'.*'keep'"),
        ({"executor": "parallel"}, ValueError, "executor='parallel': .*'vectorized'"),
        ({"clients_per_wave": 0}, ValueError, "clients_per_wave=0"),
        ({"clients_per_wave": 2.5}, TypeError, "clients_per_wave=2.5"),
        ({"verify_executor": "no"}, TypeError, "verify_executor='no': "),
        ({"cache_dataset": "yes"}, ValueError, "cache_dataset='yes': "),
        ({"client_log_every_n": 0}, ValueError, "client_log_every_n=0"),
        ({"client_state_memory": "4 apples"}, ValueError, "client_state_memory='4 apples': pass a number of bytes"),
        ({"client_state_memory": "4iB"}, ValueError, "client_state_memory='4iB': pass a number of bytes"),
        ({"client_state_memory": -1}, ValueError, "client_state_memory=-1: pass a number of bytes"),
        ({"client_state_memory": True}, ValueError, "client_state_memory=True: pass a number of bytes"),
        ({"client_optimizer": torch.optim.SGD}, ValueError, "client_optimizer=<class .*: choose 'reset'"),
        ({"seed": -1}, ValueError, "seed=-1: pass an integer of at least 0"),
        ({"seed": 1.5}, TypeError, "seed=1.5: pass an integer of at least 0"),
        ({"seed": None}, TypeError, "seed=None: pass an integer of at least 0"),
        ({"seed": True}, TypeError, "seed=True: pass an integer of at least 0"),
        ({"num_client": 3}, TypeError, "unexpected keyword argument 'num_client'"),
    ],
    ids=stable,
)
def test_refuses(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FederatedStrategy(**arguments)


def test_options_are_the_arguments_of_the_strategy_without_those_of_ddp() -> None:
    given, of_ddp = inspect.signature(FederatedStrategy).parameters, inspect.signature(DDPStrategy).parameters
    assert [each.name for each in fields(Options)] == [name for name in given if name not in of_ddp]


@pytest.mark.parametrize(
    ("arguments", "epochs", "steps"),
    [
        ({}, 1, None),
        ({"local_epochs": 2}, 2, None),
        ({"local_steps": 5}, None, 5),
        ({"local_epochs": None, "local_steps": 5}, None, 5),
        ({"local_epochs": np.int64(3)}, 3, None),
    ],
    ids=stable,
)
def test_local_work(arguments: dict[str, Any], epochs: int | None, steps: int | None) -> None:
    options = FederatedStrategy(**arguments)._options
    assert (options.local_epochs, options.local_steps) == (epochs, steps)


@pytest.mark.parametrize(
    ("wanted", "num_clients", "expected"),
    [(None, 7, 7), (3, 7, 3), (np.int32(3), 7, 3), (0.5, 7, 4), (np.float32(0.5), 4, 2), (1.0, 7, 7), (0.01, 7, 1)],
)
def test_cohort_size(wanted: Any, num_clients: int, expected: int) -> None:
    options = FederatedStrategy(num_clients, clients_per_round=wanted)._options
    assert options.cohort_size(num_clients) == expected


def test_num_clients_comes_from_the_partitioner() -> None:
    assert FederatedStrategy().num_clients == 10
    assert FederatedStrategy(partitioner=partitioners.IidPartitioner(4)).num_clients == 4
    assert FederatedStrategy(partitioner=reference.unequal_clients()).num_clients == 7
    assert FederatedStrategy(partitioner=partitioners.NaturalIdPartitioner("user")).num_clients is None


def test_too_many_per_round_for_natural_clients_shows_once_they_are_counted() -> None:
    options = FederatedStrategy(clients_per_round=4, partitioner=partitioners.NaturalIdPartitioner("who"))._options
    partition = options.partition([{"who": name} for name in ("eve", "bob", "eve", "ann")])
    with pytest.raises(ValueError, match="clients_per_round=4 is more than num_clients=3"):
        options.cohort_size(partition.num_clients)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            Partition(np.array([-1, 2]), np.array([0, 1, 2])),
            r"partitioner=Partition\(.*sample -1 is not in the dataset",
        ),
        (Partition(np.array([2, 2]), np.array([0, 1, 2])), r"partitioner=Partition\(.*sample 2 appears more than once"),
        (
            Partition.from_lists([[0], [20]]),
            r"partitioner=Partition\(.*sample 20 is not in the dataset.*the dataset that was partitioned",
        ),
        (
            Partition.from_lists([[0, 1], [], [2]]),
            r"partitioner=Partition\(.*1 of 3 clients have no samples \(client 1\): use fewer clients",
        ),
        (Partition.from_lists([[0], [], []]), r"2 of 3 clients have no samples \(clients 1, 2\)"),
    ],
)
def test_partition_that_does_not_fit_the_data(partition: Partition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(partitioner=partition)._options.partition(list(range(20)))


def test_a_partition_may_leave_samples_out() -> None:
    partition = Partition.from_lists([[0, 5], [7]])
    assert FederatedStrategy(partitioner=partition)._options.partition(list(range(20))) is partition


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: server.fed_avg(0), ValueError, "lr=0: pass a finite number above 0"),
        (lambda: server.fed_avg(float("inf")), ValueError, "lr=inf: pass a finite number above 0"),
        (lambda: server.fed_avg("1"), TypeError, "lr='1': pass a finite number above 0"),  # type: ignore[arg-type]
        (
            lambda: server.from_torch("sgd"),  # type: ignore[arg-type]
            TypeError,
            r"from_torch\(str\) .*pass a class such as torch.optim.SGD",
        ),
        (lambda: server.from_torch(torch.optim.Adam, rate=1.0), TypeError, r"from_torch\(Adam, rate=1.0\) .*'rate'"),
        (lambda: server.from_torch(torch.optim.SGD, lr=-1), ValueError, r"from_torch\(SGD, lr=-1\) .*learning rate"),
        (lambda: server.from_torch(torch.optim.LBFGS), TypeError, r"from_torch\(LBFGS\) .*closure"),
    ],
)
def test_server_optimizers_refuse_before_training(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_clients": 3, "clients_per_round": 0.5, "partitioner": "dirichlet", "rounds_per_epoch": 2},
        {"partitioner": partitioners.DirichletPartitioner(3, alpha=0.5), "aggregator": "uniform"},
        {"partitioner": reference.unequal_clients(), "clients_per_round": 2, "sampler": samplers.uniform},
        {"local_steps": 3, "server_optimizer": server.from_torch(torch.optim.Adam, lr=0.1), "seed": 2**70},
        {"server_optimizer": server.fed_avg(0.5), "client_optimizer": "keep", "start_method": "spawn"},
        {"process_group_backend": "cpu:gloo,cuda:nccl"},
    ],
    ids=stable,
)
def test_pickles_as_spawn_needs(arguments: dict[str, Any]) -> None:
    strategy = FederatedStrategy(**arguments)
    again: FederatedStrategy = pickle.loads(pickle.dumps(strategy))
    old, new = strategy._options, again._options
    data = reference.dataset()
    assert new.partition(data) == old.partition(data)
    params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    steps = [o.server_optimizer.update(params, o.server_optimizer.init(params), params)[0] for o in (old, new)]
    assert torch.equal(steps[0]["w"], steps[1]["w"])

    def plain(options: Options) -> Options:
        return replace(options, partitioner=None, aggregator=None, server_optimizer=None)  # type: ignore[arg-type]

    assert plain(new) == plain(old)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", None), (0, 0), (7, 7), ("7", 7), ("7B", 7), ("2kB", 2000), ("2KB", 2000), ("1.5MiB", 3 * 2**19),
        (" 4 GiB ", 2**32), ("1TB", 10**12),
    ],
)  # fmt: skip
def test_bytes(given: Any, expected: int | None) -> None:
    assert FederatedStrategy(client_state_memory=given)._options.client_state_memory == expected
