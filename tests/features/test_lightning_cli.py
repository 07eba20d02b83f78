"""LightningCLI with all of the strategy's parts and the callbacks, from YAML and from the command line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_fedscale import (
    FederatedStrategy,
    aggregators,
    compressors,
    local_rules,
    phases,
    samplers,
    schedules,
    server,
)
from lightning_fedscale.core.options import lightning_cli as class_paths
from lightning_fedscale.scaling import Kaplan
from tests.laws import reference
from tests.unit.test_cli_typing import NAME, TRAINER, Labelled, Model, cli, strategy_of, weights, yaml_file

ROOMS = "lightning_fedscale."


def part(path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": ROOMS + path, "init_args": init_args}


# As in a file, and as in Python.
PARTS: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
    ({"local_rule": part("local_rules.fed_prox", mu=0.5)}, lambda: {"local_rule": local_rules.fed_prox(mu=0.5)}),
    (
        {"local_rule": "scaffold", "aggregator": "uniform"},
        lambda: {"local_rule": local_rules.scaffold(), "aggregator": aggregators.mean("uniform")},
    ),
    (
        {"aggregator": part("aggregators.norm_clipped", max_norm=0.1, inner=part("aggregators.trimmed_mean", trim=1))},
        lambda: {"aggregator": aggregators.norm_clipped(0.1, aggregators.trimmed_mean(1))},
    ),
    (
        {"server_optimizer": part("server.fed_adam", lr=0.3, tau=0.01)},
        lambda: {"server_optimizer": server.fed_adam(lr=0.3, tau=0.01)},
    ),
    (
        {
            "server_optimizer": {
                **part("server.from_torch", optimizer="torch.optim.SGD"),
                "dict_kwargs": {"lr": 0.7, "momentum": 0.9, "nesterov": True},
            }
        },
        lambda: {"server_optimizer": server.from_torch(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ),
    (
        {
            "server_optimizer": part(
                "server.chain", rules=[part("server.trace", momentum=0.5), part("server.scale", factor=0.1)]
            )
        },
        lambda: {"server_optimizer": server.chain(server.trace(0.5), server.scale(0.1))},
    ),
    (
        {"compressor": part("compressors.error_feedback", compressor=part("compressors.top_k", ratio=0.25))},
        lambda: {"compressor": compressors.error_feedback(compressors.top_k(0.25))},
    ),
    ({"downlink_compressor": part("compressors.qsgd", levels=7)}, lambda: {"downlink_compressor": compressors.qsgd(7)}),
    ({"personal": ["layer.bias"]}, lambda: {"personal": ["layer.bias"]}),
    ({"personal": part("local_rules.Ditto", strength=0.2)}, lambda: {"personal": local_rules.Ditto(0.2)}),
    (
        {"local_steps": part("schedules.post_local", until=1, steps=3)},
        lambda: {"local_steps": schedules.post_local(until=1, steps=3)},
    ),
    (
        {
            "sampler": part("samplers.drop_out", sampler="lightning_fedscale.samplers.round_robin", probability=0.5),
            "clients_per_round": 3,
        },
        lambda: {"sampler": samplers.drop_out(samplers.round_robin, 0.5), "clients_per_round": 3},
    ),
    (
        {
            "aggregator": part(
                "attacks.attacked",
                aggregator=part("aggregators.median"),
                attack=part("attacks.sign_flip", scale=3.0),
                attackers=[1],
            )
        },
        lambda: {"aggregator": attacked()},
    ),
]


def attacked() -> Any:
    from lightning_fedscale import attacks

    return attacks.attacked(aggregators.median(), attacks.sign_flip(3.0), [1])


@pytest.mark.parametrize(("written", "made"), PARTS, ids=lambda each: "" if callable(each) else "+".join(each))
def test_parts_from_a_file_train_as_those_made_in_python(
    written: dict[str, Any], made: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    ran = cli(
        ["fit", f"--config={yaml_file(tmp_path / 'run.yaml', num_clients=4, **written)}"], save_config_callback=None
    )
    strategy = FederatedStrategy(num_clients=4, executor="sequential", **made())
    torch.manual_seed(0)
    module = Model()
    trainer = reference.quiet_trainer(**{**TRAINER, "strategy": strategy})
    trainer.fit(module, datamodule=Labelled())
    by_hand = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.equal(weights(ran), by_hand)


def test_privacy_and_buffered_rounds_from_a_file(tmp_path: Path) -> None:
    private = yaml_file(
        tmp_path / "private.yaml", num_clients=4, clients_per_round=2, sampler="poisson",
        privacy=part("privacy.dp_fed_avg", clip_norm=1.0, noise_multiplier=1.0, delta=1e-5,
                     adaptive={"quantile": 0.7, "count_noise": 1.0}),
    )  # fmt: skip
    ran = cli(["fit", f"--config={private}"], save_config_callback=None)
    adaptive = strategy_of(ran)._options.algorithm.privacy.adaptive  # type: ignore[union-attr]
    assert adaptive is not None
    assert adaptive.quantile == 0.7
    buffered = yaml_file(
        tmp_path / "buffered.yaml", num_clients=4, clients_per_round=2,
        mode=part("FedBuff", concurrency=3, seconds=[1.0, 2.0, 3.0, 4.0]),
    )  # fmt: skip
    record = strategy_of(cli(["fit", f"--config={buffered}"], save_config_callback=None)).last_round
    assert record is not None
    assert "round/staleness" in record.metrics()


def test_buffers_from_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = yaml_file(tmp_path / "run.yaml", num_clients=4, buffers={"bank": "client", "queue*": "largest"})
    ran = cli([f"--config={file}"], save_config_callback=None, run=False)
    assert strategy_of(ran)._options.algorithm.buffers == (("bank", "client"), ("queue*", "largest"))
    with pytest.raises(SystemExit):
        cli([f"--config={file}", "--trainer.strategy.buffers.bank=avg"], save_config_callback=None, run=False)


def test_configurations_with_parts_are_saved_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {
        "server_optimizer": part("server.fed_adam", lr=0.3),
        "compressor": part("compressors.error_feedback", compressor=part("compressors.sign")),
    }
    file = yaml_file(tmp_path / "run.yaml", num_clients=4, **written)
    first = cli(["fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}"])
    saved = tmp_path / "config.yaml"
    shown = yaml.safe_load(saved.read_text())["trainer"]["strategy"]["init_args"]
    assert {name: shown[name] for name in written} == written
    second = cli(["fit", f"--config={saved}"], save_config_kwargs={"overwrite": True})
    assert torch.equal(weights(first), weights(second))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli(["fit", f"--config={file}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert {name: printed[name] for name in written} == written


def test_parts_on_the_command_line() -> None:
    ran = cli(
        [
            f"--trainer.strategy={NAME}",
            "--trainer.strategy.local_rule=fed_nova",
            "--trainer.strategy.server_optimizer="
            "{class_path: lightning_fedscale.server.fed_avgm, init_args: {momentum: 0.5}}",
        ],
        run=False,
    )
    options = strategy_of(ran)._options
    assert options.algorithm.local_rule is not None
    assert options.algorithm.local_rule.name == "fed_nova"
    delta = {"w": torch.ones(1, dtype=torch.float64)}
    state = options.server_optimizer.init(delta)
    _, state = options.server_optimizer.update(delta, state, delta)
    step, _ = options.server_optimizer.update(delta, state, delta)
    assert step["w"].item() == 1.5


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"server_optimizer": part("server.fed_adma")},
            "class_path='lightning_fedscale.server.fed_adma'",
        ),
        ({"server_optimizer": part("server.fed_adam", rate=0.1)}, "init_args of lightning_fedscale.server.fed_adam"),
        ({"server_optimizer": part("server.fed_adam", lr="fast")}, 'Parser key "lr"'),
        ({"server_optimizer": part("server.fed_adam", lr=-1.0)}, "lr=-1.0: pass a finite number above 0"),
        (
            {"server_optimizer": part("compressors.sign")},
            "class_path='lightning_fedscale.compressors.sign' returns a Compressor",
        ),
        ({"aggregator": {"max_norm": 1.0}}, "{'max_norm': 1.0}: pass the class_path"),
        ({"local_rule": part("local_rules.fed_prox")}, "mu"),
    ],
)
def test_mistakes_reach_the_user(
    written: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli([f"--config={yaml_file(tmp_path / 'run.yaml', **written)}"], run=False)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_callbacks_from_a_file(tmp_path: Path) -> None:
    callbacks = [
        part("callbacks.CriticalPhase", detector=part("phases.page_hinkley", false_alarms=0.5),
             scale=part("phases.capped", rule=part("phases.linear_ramp", factor=3.0), limit=1.5)),
        part("callbacks.ComputeAccounting", law=part("scaling.Kaplan"), rho=0.5, max_flops=1e12),
        part("callbacks.ServerEMA", decay=0.9),
        part("callbacks.MaxBatchProbe", budget="1MiB", apply=False),
    ]  # fmt: skip
    strategy = {"class_path": NAME, "init_args": {"num_clients": 4, "executor": "sequential"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"trainer": {**TRAINER, "strategy": strategy, "callbacks": callbacks}}))
    ran = cli(["fit", f"--config={file}"], save_config_callback=None)
    made = {type(each).__name__: each for each in ran.trainer.callbacks}  # type: ignore[attr-defined]
    assert {"CriticalPhase", "ComputeAccounting", "ServerEMA", "MaxBatchProbe"} <= set(made)
    assert made["ComputeAccounting"].law == Kaplan()
    assert "fitted on" in made["ComputeAccounting"].no_position  # a model this small is none of Kaplan's
    assert isinstance(made["CriticalPhase"].detector, phases.Detector)
    assert made["MaxBatchProbe"].result.budget == 2**20


HELP = {
    f"strategy.help={NAME}": [
        "--trainer.strategy.server_optimizer SERVER_OPTIMIZER how the global model moves, see"
        " `lightning_fedscale.server`; None is plain FedAvg.",
        "(type: Union[str, ServerOptimizer, null], default: null)",
        "--trainer.strategy.client_optimizer {reset,keep}",
        "--trainer.strategy.privacy.help",
    ],
    "callbacks.help=lightning_fedscale.callbacks.ComputeAccounting": [
        "--trainer.callbacks.max_flops MAX_FLOPS stop training at the end of the step, or round,",
        "null, default: null)",
    ],
    "callbacks.help=lightning_fedscale.callbacks.CriticalPhase": ["--trainer.callbacks.level {round,step}"],
    "callbacks.help=lightning_fedscale.callbacks.MaxBatchProbe": ["--trainer.callbacks.headroom HEADROOM"],
    "callbacks.help=lightning_fedscale.callbacks.ServerEMA": ["--trainer.callbacks.decay DECAY"],
}


@pytest.mark.parametrize("asked", HELP)
def test_help_shows_arguments_with_types_and_meaning(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(["fit", f"--trainer.{asked}"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in HELP[asked]:
        assert words in text


def test_every_rule_that_is_a_tuple_of_functions_is_known() -> None:
    kinds = {
        server.ServerOptimizer,
        aggregators.Aggregator,
        compressors.Compressor,
        local_rules.LocalRule,
        phases.Detector,
    }
    assert set(class_paths.KINDS) == kinds


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_parts_remember_how_they_were_given_in_other_processes_too(again: Callable[[Any], Any]) -> None:
    given = part("compressors.top_k", ratio=0.5)
    made = again(class_paths.made_by_path(compressors.Compressor, given))
    assert made.given == given
    assert made.name == "top_k(0.5)"
