"""Why a test of Lightning's may fail under rounds, and the table of those that do."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

SUBSETS = {
    "hooks": "models/test_hooks.py",
    "models": "models",
    "loops": "loops",
    "callbacks": "callbacks",
    "logging": "trainer/logging_",
    "optimization": "trainer/optimization",
    "flags": "trainer/flags trainer/properties trainer/dynamic_args",
    "connectors": "trainer/connectors",
    "trainer": "trainer/test_trainer.py trainer/test_dataloaders.py trainer/test_states.py"
    " trainer/test_config_validator.py",
    "checkpointing": "checkpointing plugins/test_checkpoint_io_plugin.py",
    "loggers": "loggers",
    "core": "core",
    "tuner": "tuner",
}
"""Parts of Lightning's tests, by where they lie; a test belongs to the first that fits."""


class Outcome(NamedTuple):
    """How a test ended.

    Attributes:
        outcome: pytest's word.
        trainers: number of Trainers that were given the strategy.
        said: the exception that ended it.
    """

    outcome: str
    trainers: int = 1
    said: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"


class Reason(NamedTuple):
    """Why tests fail that are no defect.

    Attributes:
        why: what the documentation says, or why it does not concern the strategy.
        tests: pattern of their names.
        said: pattern of what ends them.
    """

    why: str
    tests: str = ""
    said: str = ""


class Result(NamedTuple):
    """A test that uses the strategy and passes without it; with it, it passes, or there is a reason, or a defect."""

    subset: str
    test: str
    outcome: Outcome
    reason: Reason | None

    @property
    def is_defect(self) -> bool:
        return self.outcome.failed and self.reason is None


def read(lines: str) -> dict[str, Outcome]:
    """Outcomes by test, as the plugin wrote them: of a repeated test the last, and a failure if its teardown fails."""
    found: dict[str, Outcome] = {}
    for line in map(json.loads, lines.splitlines()):
        outcome = Outcome(line["outcome"], line["trainers"], line["said"])
        if line["test"] not in found or not found[line["test"]].failed:
            found[line["test"]] = outcome
    return found


BY_DESIGN = Reason("passes without what rounds add: metrics, hyperparameters, batch_idx from 0 in every client's round")

REFUSED = (
    Reason("data that cannot be divided by index", said="is an IterableDataset or has no length"),
    Reason("train data that no DataLoader loads", said="pass a torch.utils.data.DataLoader, whose dataset"),
    Reason("several train loaders", said="divides one dataset among clients"),
    Reason("a sampler of one's own", said="cannot be applied to each client's own samples"),
    Reason("training_step(dataloader_iter)", said=r"training_step\(self, dataloader_iter\) is not supported"),
    Reason("no optimizer", said="configure_optimizers returned no optimizer"),
    Reason("ThroughputMonitor", said="ThroughputMonitor counts"),
    Reason(
        "BatchSizeFinder, which Lightning itself refuses for what it knows as several processes",
        tests="tuner|scale_batch_size",
        said="[Bb]atch size (finder )?is (currently )?not supported",
    ),
)
"""What docs/limits.md names as not supported; raised before training."""

DIFFERS = (
    Reason(
        "a round of one batch has nothing to accumulate: accumulation is the client's",
        tests="test_trainer_accumulate|with_accumulated|gradient_accumulation|grad_accumulation|accumulation_and_early"
        r"|test_swa_(callback\[|callback_scheduler|resume)|test_ema(\[|_resume|_configure_model)"
        r"|test_train_loop_system|test_backward_count_with_closure|exceed_data_length_correct\[2"
        r"|test_loop_state_on_exception\[.-.-[23]\]",
    ),
    Reason(
        "manual optimization: a step of the Trainer is a round, whatever the client steps in it",
        tests="test_multiple_optimizers_manual_call_counts|closure_with_different_frequencies|multi_lrs",
    ),
    Reason("on_train_batch_start that returns -1 ends the client's round, not the epoch", tests="return_minus_one"),
    Reason("workers that are not persistent start anew in every round", tests=r"test_workers_are_shutdown\[False"),
    Reason(
        "trainer.train_dataloader is the loader of rounds",
        tests=r"test_train_dataloader_passed_to_fit|limit_percent_batches\[0.2",
    ),
    Reason(
        "the loop's state names the loader of rounds, whose own is empty and not saved",
        tests=r"test_loop_state_on_exception\[.-.-1\]",
    ),
    Reason(
        "batches of a round that are all None are made once more, which a stateful collate function notices",
        tests="test_training_step_none_batches",
    ),
    Reason("callbacks of rounds are among the Trainer's while it fits", tests="test_callbacks_state_fit_ckpt_path"),
    Reason("a checkpoint has an entry for the federation", tests="hook_system_fit_no_val_and_resume"),
    Reason(
        "a round resumes exactly, so that a checkpoint within an epoch needs no warning",
        tests="test_restarting_mid_epoch_raises_warning",
    ),
    Reason(
        "the test looks at the class of the strategy or of what writes checkpoints, or sets what only others let set",
        tests="test_trainer_config_strategy|calls_strategy_on_exception|training_step_not_allowed|storage_options",
    ),
    Reason(
        "the test takes the strategy for one of several processes",
        tests="test_trainer_predict_cpu|test_overfit_batch_limits_eval",
    ),
)
"""What is no defect, and asks for no refusal."""


def classify(name: str, outcome: Outcome, bare: Outcome | None) -> Reason | None:
    """Why a test failed, None if that is a defect.

    Args:
        name: the test.
        outcome: its failure.
        bare: how it ends without what rounds add by design.
    """
    for reason in (*REFUSED, *DIFFERS):
        if re.search(reason.tests, name) and re.search(reason.said, outcome.said):
            return reason
    return BY_DESIGN if bare is not None and bare.passed else None


def judge(federated: dict[str, Outcome], plain: dict[str, Outcome], bare: dict[str, Outcome]) -> list[Result]:
    """What is to be said of each test that uses the strategy, and passes without it.

    Args:
        federated: how all tests end with the strategy.
        plain: how those that failed end without.
        bare: how those that failed end without what rounds add by design.
    """
    return [
        Result(_subset(name), name, outcome, classify(name, outcome, bare.get(name)) if outcome.failed else None)
        for name, outcome in federated.items()
        if (plain[name].passed if outcome.failed else outcome.passed and outcome.trainers)
    ]


def _subset(test: str) -> str:
    return next((name for name, places in SUBSETS.items() for place in places.split() if f"/{place}" in test), "others")


def table(results: Iterable[Result]) -> str:
    """The outcomes by subset, the reasons by number of tests, and the defects by name."""
    found = list(results)
    lines = [
        "| subset | tests | pass | refused as documented | differ for a reason | defects |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for subset in (*dict.fromkeys(result.subset for result in found), "all"):
        kinds = Counter(_kind(result) for result in found if subset in (result.subset, "all"))
        counts = (sum(kinds.values()), *(kinds[kind] for kind in ("passed", "refused", "differs", "defect")))
        lines.append(f"| {subset} | {' | '.join(map(str, counts))} |")
    reasons = Counter((_kind(result), result.reason.why) for result in found if result.reason is not None)
    lines += ["", *(f"{kind}, {count}: {why}" for (kind, why), count in sorted(reasons.items(), reverse=True))]
    lines += [
        "",
        *(
            f"defect: {result.test}: {' '.join(result.outcome.said.split())[:300]}"
            for result in found
            if result.is_defect
        ),
    ]
    return "\n".join(lines).rstrip()


def _kind(result: Result) -> str:
    if result.reason is None:
        return "defect" if result.is_defect else "passed"
    return "refused" if result.reason in REFUSED else "differs"
