"""What a random training is made of, drawn from one integer, printed in one line, and made smaller where it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tests.fuzz.batches import FORMS
from tests.fuzz.habits import HOOKS, LOGS, LOSSES, READ, STATES, TENSORS_WRITTEN, WRITTEN
from tests.fuzz.layers import BLOCKS, ON_INPUTS, ON_TOKENS

Options = Mapping[str, str]
"""Arguments by name, each an expression in Python."""


@dataclass(frozen=True)
class Recipe:
    """A training; what is not given is the plainest there is.

    Attributes:
        seed: of data, initial weights and the strategy.
        inputs: encoder of the samples' numbers, of `layers.ON_INPUTS`.
        tokens: encoder of the samples' tokens, of `layers.ON_TOKENS`; "" for none.
        blocks: what follows, of `layers.BLOCKS`.
        states: coefficients of the loss, of `habits.STATES`.
        logs: what is logged, of `habits.LOGS`.
        loss: of `habits.LOSSES`.
        hooks: of the LightningModule, of `habits.HOOKS`.
        batch: form of a batch, of `batches.FORMS`; "cut" is a TensorDataset with torch's own collate function.
        noisy: whether samples are augmented at random when they are fetched.
        samples: their number.
        batch_size: of the loader.
        shuffle: of the loader.
        drop_last: of the loader.
        epochs: of the Trainer.
        optimizer: an expression, without the parameters.
        scheduler: an expression, without the optimizer; "" for none.
        trainer: other arguments of the Trainer.
        strategy: arguments of the strategy.
    """

    seed: int = 0
    inputs: str = "linear"
    tokens: str = ""
    blocks: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    loss: str = "entropy"
    hooks: tuple[str, ...] = ()
    batch: str = "tuple"
    noisy: bool = False
    samples: int = 36
    batch_size: int = 4
    shuffle: bool = False
    drop_last: bool = False
    epochs: int = 4
    optimizer: str = "SGD(lr=0.1)"
    scheduler: str = ""
    trainer: Options = field(default_factory=lambda: {"precision": "'64-true'"})
    strategy: Options = field(default_factory=lambda: {"num_clients": "3"})

    def __str__(self) -> str:
        plain = Recipe()
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in given if value != getattr(plain, name))})"

    @property
    def features(self) -> set[str]:
        """Everything in it by name, as ``"blocks:linear"``, ``"strategy:aggregator=..."``."""
        found: set[str] = set()
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                found |= {f"{f.name}:{entry}" for entry in value}
            elif isinstance(value, Mapping):
                found |= {f"{f.name}:{name}={entry}" for name, entry in value.items()}
            elif f.name not in ("seed", "samples", "batch_size", "epochs"):
                found.add(f"{f.name}:{value}")
        return found

    @property
    def precision(self) -> str:
        """Of the Trainer."""
        return self.trainer.get("precision", "'32-true'").strip("'")


OPTIMIZERS = (
    "SGD(lr=0.1)",
    "SGD(lr=0.05, momentum=0.9)",
    "SGD(lr=0.05, momentum=0.5, nesterov=True, weight_decay=0.01)",
    "SGD(lr=0.05, momentum=0.5, dampening=0.1)",
    "Adam(lr=0.02, eps=1e-2)",
    "AdamW(lr=0.02, eps=1e-2, amsgrad=True)",
    "Adagrad(lr=0.05)",
    "RMSprop(lr=0.01, eps=1e-2)",
    "NAdam(lr=0.01, eps=1e-2)",
    "RAdam(lr=0.02, eps=1e-2)",
    "Adamax(lr=0.01, eps=1e-2)",
    "Adadelta(lr=0.5)",
    "ASGD(lr=0.05)",
    "Rprop(lr=0.01)",
    "Adafactor(lr=0.01)",
    "LBFGS(lr=0.1, max_iter=2)",
    "SGD(lr=0.1, foreach=False)",
    "Adam(lr=0.02, eps=1e-2, fused=True)",
    "SGD(lr=0.1, maximize=True)",
)
SCHEDULERS = (
    "StepLR(step_size=2, gamma=0.5)",
    "CosineAnnealingLR(T_max=4)",
    "ExponentialLR(gamma=0.8)",
    "LambdaLR(lr_lambda=lambda epoch: 1.0 / (1 + epoch))",
    "CyclicLR(base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False)",
)
TRAINER: dict[str, Sequence[str]] = {
    "accumulate_grad_batches": ("2", "3"),
    "gradient_clip_val": ("0.5", "0.05"),
    "gradient_clip_algorithm": ("'value'",),
    "max_steps": ("5",),
    "limit_train_batches": ("0.5",),
    "check_val_every_n_epoch": ("2",),
    "detect_anomaly": ("True",),
    "log_every_n_steps": ("1",),
    "callbacks": ("[EMA()]", "[SWA()]"),
}
"""Arguments of the Trainer and values that they may take; precision and epochs are drawn by themselves."""

STRATEGY: dict[str, Sequence[str]] = {
    "clients_per_round": ("2", "3", "0.5"),
    "partitioner": (
        "'dirichlet'",
        "'linear'",
        "'exponential'",
        "partitioners.ShardPartitioner(clients, num_shards_per_partition=2)",
        "Partition.from_lists([range(0, 3), range(3, 11), range(11, 32), range(32, samples)])",
    ),
    "local_epochs": ("2",),
    "local_steps": ("1", "2", "5", "lambda round: 1 + round % 3"),
    "rounds_per_epoch": ("2",),
    "sampler": (
        "'round_robin'",
        "'poisson'",
        "samplers.drop_out(samplers.uniform, 0.3)",
        "samplers.power_of_choice(clients)",
    ),
    "local_rule": (
        "local_rules.fed_prox(0.1)",
        "'scaffold'",
        "local_rules.scaffold('I')",
        "local_rules.fed_dyn(0.1)",
        "'fed_nova'",
    ),
    "aggregator": (
        "'uniform'",
        "'median'",
        "aggregators.trimmed_mean(0.2)",
        "aggregators.krum(0)",
        "aggregators.geometric_median()",
        "aggregators.norm_clipped(0.3)",
        "aggregators.centered_clipping(0.3)",
    ),
    "server_optimizer": (
        "server.fed_avgm(0.5)",
        "server.fed_adam(0.01, tau=0.1)",
        "server.fed_exp()",
        "server.nesterov()",
        "server.fed_avg(0.5)",
        "server.from_torch(torch.optim.SGD, lr=0.7)",
    ),
    "compressor": (
        "compressors.error_feedback(compressors.top_k(0.3))",
        "compressors.qsgd()",
        "compressors.random_k(0.5)",
        "compressors.power_sgd(1)",
        "compressors.error_feedback(compressors.sign())",
    ),
    "downlink_compressor": ("compressors.qsgd()", "compressors.error_feedback(compressors.top_k(0.5))"),
    "privacy": ("privacy.dp_fed_avg(0.5, 1.0, delta=1e-2, accountant='rdp')",),
    "personal": ("['head.*']", "['blocks.*']", "local_rules.Ditto(0.1)"),
    "mode": ("asynchrony.FedBuff(concurrency=2, seconds=[1.0, 2.0, 3.0, 1.5, 2.5, 3.5][:clients])",),
    "client_optimizer": ("'keep'",),
    "clients_per_wave": ("2", "3"),
    "cache_dataset": ("True", "False"),
    "client_log_every_n": ("2",),
}
"""Arguments of the strategy and values that they may take; ``clients`` and ``samples`` are the recipe's."""

PRECISIONS = ("64-true",) * 6 + ("32-true", "32-true", "bf16-mixed", "bf16-true")


UNSIZED = ("object", "object_in_dict", "namespace", "slots", "mapping", "packed_sequence")
"""Batches of which Lightning cannot tell how many samples they have."""


NOT_VECTORIZABLE = frozenset(
    (
        "inputs:rnn",
        "inputs:gru",
        "inputs:lstm",
        "inputs:lstm_with_dropout",
        "tokens:sparse_embedding",
        "tokens:sparse_bag",
        "blocks:batch_norm_cumulative",
        "blocks:rrelu",
        "blocks:permutation",
        "blocks:gru_block",
        "blocks:lstm_cell",
        "blocks:transformer",
        "blocks:codebook",
        "blocks:queue",
        "blocks:spectral_norm",
        "blocks:old_spectral_norm",
        "blocks:old_weight_norm",
        "blocks:added_in_place",
        "blocks:written_into_new",
        "blocks:checkpointed",
        "blocks:checkpointed_reentrant",
        "blocks:own_function",
        "blocks:second_reference",
        "blocks:teacher",
        "blocks:teacher_data",
        "blocks:mixed",
        "blocks:if_positive",
        "blocks:as_often_as_needed",
        "blocks:through_numpy",
        "blocks:kept_rows",
        "blocks:mean_data",
        "blocks:counter_read",
        "blocks:first_batch",
        "blocks:hidden_hook",
        "blocks:backward_hook",
        "blocks:parameter_hook",
        "states:in_dropout",
        "states:python_random",
        "states:numpy_random",
        "states:torch_random_read",
        *(f"states:{name}" for name in (*WRITTEN, *TENSORS_WRITTEN)),
        *(f"hooks:{name}" for name in HOOKS),
        "logs:item",
        "logs:by_class",
        "loss:binary",
        "loss:squares",
        "loss:selected",
        "loss:none_by_data",
        "loss:branch",
        "optimizer:ASGD(lr=0.05)",
        "optimizer:Adafactor(lr=0.01)",
        "optimizer:LBFGS(lr=0.1, max_iter=2)",
        "batch:object",
        "batch:object_in_dict",
        "batch:namespace",
        "batch:slots",
        "batch:mapping",
        "batch:packed_sequence",
        "batch:sparse",
        "batch:with_function",
        "batch:with_array",
        "batch:with_float",
        "batch:with_strings",
        "batch:list_of_samples",
    )
)
"""What clients cannot be vectorized with; most recipes are drawn without, or too few would be vectorized."""


def draw(seed: int, without: Collection[str] = ()) -> Recipe:
    """The recipe of a seed.

    Args:
        seed: any integer.
        without: `Recipe.features` that are left out; all else stays as it was drawn.
    """
    rng = random.Random(seed)
    vectorizable = rng.random() < 0.7
    rarely: Collection[str] = NOT_VECTORIZABLE if vectorizable else ()

    def some(field: str, names: Collection[str], most: int) -> tuple[str, ...]:
        names = [name for name in names if f"{field}:{name}" not in rarely]
        return tuple(rng.sample(names, min(len(names), rng.randint(0, most))))

    def one(field: str, names: Collection[str]) -> str:
        return rng.choice([name for name in names if f"{field}:{name}" not in rarely])

    def perhaps(options: Mapping[str, Sequence[str]], share: float) -> dict[str, str]:
        taken = [name for name in options if rng.random() < share]
        return {name: rng.choice(options[name]) for name in taken}

    states = some("states", READ, 2) if rng.random() < 0.6 else ()
    if not vectorizable:
        states += some("states", WRITTEN, 1) if rng.random() < 0.5 else ()
        states += some("states", TENSORS_WRITTEN, 1) if rng.random() < 0.3 else ()
    precision = rng.choice(PRECISIONS)
    strategy = {"num_clients": str(rng.choice((3, 4, 5))), **perhaps(STRATEGY, 0.12)}
    if "partitioner" in strategy and "from_lists" in strategy["partitioner"]:
        del strategy["num_clients"]
    drawn = sensible(
        Recipe(
            seed=seed,
            inputs=one("inputs", ON_INPUTS),
            tokens=one("tokens", ON_TOKENS) if rng.random() < 0.5 else "",
            blocks=some("blocks", BLOCKS, 2),
            states=states,
            logs=some("logs", LOGS, 3),
            loss=one("loss", LOSSES) if rng.random() < 0.5 else "entropy",
            hooks=() if vectorizable else some("hooks", HOOKS, 2),
            batch=one("batch", FORMS) if rng.random() < 0.6 else rng.choice(("tuple", "cut", "cut")),
            noisy=rng.random() < 0.15,
            samples=rng.choice((36, 41, 50)),
            batch_size=rng.choice((3, 4, 5)),
            shuffle=rng.random() < 0.5,
            drop_last=rng.random() < 0.2,
            epochs=rng.choice((3, 4, 6)),
            optimizer=one("optimizer", OPTIMIZERS) if rng.random() < 0.6 else "SGD(lr=0.1)",
            scheduler=one("scheduler", SCHEDULERS) if rng.random() < 0.2 else "",
            trainer={"precision": repr(precision), **perhaps(TRAINER, 0.1)},
            strategy=strategy,
        )
    )
    return sensible(left_out(drawn, without))


def left_out(recipe: Recipe, without: Collection[str]) -> Recipe:
    """The recipe without these features, which become the plainest ones."""
    changed: dict[str, Any] = {}
    for f in fields(recipe):
        value, usual = getattr(recipe, f.name), getattr(Recipe(), f.name)
        if isinstance(value, tuple):
            changed[f.name] = tuple(entry for entry in value if f"{f.name}:{entry}" not in without)
        elif isinstance(value, Mapping):
            changed[f.name] = {k: v for k, v in value.items() if f"{f.name}:{k}={v}" not in without}
        elif f"{f.name}:{value}" in without:
            changed[f.name] = usual
    return replace(recipe, **changed)


def sensible(recipe: Recipe) -> Recipe:
    """Without what plain Trainers refuse too, or what makes no difference between right and wrong."""
    trainer, strategy = dict(recipe.trainer), dict(recipe.strategy)
    if "gradient_clip_algorithm" in trainer:
        trainer.setdefault("gradient_clip_val", "0.05")
    if "manual" in recipe.hooks:
        for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
            trainer.pop(name, None)
    blocks = recipe.blocks
    if recipe.noisy and recipe.batch == "cut":
        recipe = replace(recipe, batch="tuple")
    if recipe.batch != "cut":
        strategy.pop("cache_dataset", None)
    if "sparse" in recipe.tokens:
        # Sparse gradients: only plain SGD knows them, and nothing clips them.
        for name in ("gradient_clip_val", "gradient_clip_algorithm"):
            trainer.pop(name, None)
        recipe = replace(recipe, optimizer="SGD(lr=0.1)", hooks=tuple(h for h in recipe.hooks if h != "clipping"))
    if "CyclicLR" in recipe.scheduler and "SGD" not in recipe.optimizer:
        recipe = replace(recipe, scheduler="")
    if recipe.precision == "64-true":
        # Complex parameters stay in single precision there, and comparisons would be as coarse.
        blocks = tuple(block for block in blocks if block != "fft")
    excluded = {
        "privacy": ("mode", "local_rule", "sampler", "aggregator"),
        "local_steps": ("local_epochs",),
        "mode": ("sampler", "local_rule", "local_steps"),
    }
    for name, others in excluded.items():
        for other in others if name in strategy else ():
            strategy.pop(other, None)
    if "mode" in strategy:
        strategy["clients_per_round"] = "2"
    if strategy.get("sampler", "").startswith(("'round_robin'", "samplers.power_of_choice")):
        strategy.setdefault("clients_per_round", "2")  # of all clients there is nothing to choose
    if strategy.get("personal") == "['blocks.*']" and not recipe.blocks:
        del strategy["personal"]
    if recipe.batch in UNSIZED:
        # Nobody can tell their size, which these ways to log do not say.
        recipe = replace(recipe, logs=tuple(log for log in recipe.logs if log not in ("epoch", "both")))
    if "privacy" in strategy:
        strategy["sampler"] = "'poisson'"
    if "'scaffold'" in strategy.values() or "'fed_nova'" in strategy.values():
        recipe = replace(recipe, optimizer="SGD(lr=0.1)")
    if "Ditto" in strategy.get("personal", ""):
        strategy.pop("client_optimizer", None)
    if "Rprop" in recipe.optimizer and {"attention", "transformer"} & set(blocks):
        # The keys' bias has no gradient but rounding errors, and Rprop goes by their signs.
        recipe = replace(recipe, optimizer="SGD(lr=0.1)")
    if "LBFGS" in recipe.optimizer:
        trainer.pop("accumulate_grad_batches", None)
        # It takes several steps with a batch, and of the first batch Lightning forgets what hooks logged in turns.
        recipe = replace(recipe, hooks=tuple(hook for hook in recipe.hooks if hook != "before_step"))
    return replace(recipe, blocks=blocks, trainer=trainer, strategy=strategy)


def altered(recipe: Recipe, name: str, value: Any) -> Recipe:
    return replace(recipe, **{name: value})


def simpler(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes that have one thing less each, the largest steps first."""
    plain = Recipe()
    for f in fields(recipe):
        value, usual = getattr(recipe, f.name), getattr(plain, f.name)
        if value == usual or f.name == "seed" or (f.name, value) == ("epochs", 2):
            continue
        yield altered(recipe, f.name, usual)
        if isinstance(value, tuple) and len(value) > 1:
            yield from (altered(recipe, f.name, value[:i] + value[i + 1 :]) for i in range(len(value)))
        elif isinstance(value, Mapping):
            for name in value:
                rest = {key: entry for key, entry in value.items() if key != name}
                yield altered(recipe, f.name, rest)
                if name in usual and value[name] != usual[name]:
                    yield altered(recipe, f.name, {**value, name: usual[name]})
    if recipe.epochs > 2:
        yield replace(recipe, epochs=2)


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The simplest recipe within reach that still fails."""
    found = True
    while found:
        found = False
        for candidate in simpler(recipe):
            if fails(candidate):
                recipe, found = candidate, True
                break
    return recipe


def read(text: str) -> Recipe:
    """The recipe that was printed."""
    recipe: Any = eval(text, {"Recipe": Recipe})
    assert isinstance(recipe, Recipe)
    unknown = set(recipe.states) - set(STATES)
    assert not unknown, unknown
    return recipe
