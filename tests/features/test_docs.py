"""The pages of docs/: their code runs, their lists are those of the code, their commands exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_fedscale import FederatedStrategy, aggregators, compressors, partitioners, privacy, server
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.cli import COMMANDS, main
from lightning_fedscale.cli.arguments import parse
from lightning_fedscale.devices import Population
from lightning_fedscale.scaling import plan
from lightning_fedscale.utils.fairness import Spread
from tests.features import executed
from tests.laws import reference

ROOT = executed.ROOT
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if executed.blocks(DOCS / page)]
NAMESPACES = "round|client|clients|personal|probe|phase|compute"


@cache
def tool(name: str) -> ModuleType:
    """A module of docs/ that the site is built with."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- code


@pytest.mark.parametrize("page", WITH_CODE)
def test_its_code_runs(page: str) -> None:
    short = {"max_epochs": 2} if page == "index.md" else {}  # it shows 200
    executed.execute(DOCS / page, executed.project([], **short))


def test_code_is_run_or_says_that_it_is_not() -> None:
    for page in PAGES:
        for fence in re.findall(r"^```(\w+.*)$", (DOCS / page).read_text("utf8"), re.M):
            language = fence.split()[0]
            assert fence in ("python", "bash", "yaml") or (language == "py" and "not run here" in fence), (page, fence)


def test_values_are_checked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\nx + 1  # two -> 2\n```\n")
    assert executed.execute(page, {}) == 1
    page.write_text("text\n```python\n1 + 1  # -> 3\n```\n")
    with pytest.raises(AssertionError, match="line 3: 2"):
        executed.execute(page, {})


def commands() -> list[str]:
    """Every `fedscale ...` in the pages and in README.md."""
    texts = [(DOCS / page).read_text("utf8") for page in PAGES] + [(ROOT / "README.md").read_text("utf8")]
    return [line.strip() for text in texts for line in re.findall(r"^ *fedscale .*$", text, re.M)]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_package.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel, BoringDataModule\n"
        "class MyModule(BoringModel):\n    def __init__(self, size: int = 8) -> None:\n        super().__init__()\n"
        "class MyData(BoringDataModule):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    words = shlex.split(command, comments=True)
    Path("conf", "experiment").mkdir(parents=True)  # a reader's own
    Path("conf", "experiment", "mine.yaml").write_text("# @package _global_\nseed: 1\n")
    if words[1] == "train":  # a Hydra application: the configuration that it would run with, the first one of a sweep
        if "hydra/launcher=joblib" not in words:  # the others are plugins that are not installed here
            words = [word for word in words if not re.match(r"\+?hydra[./]launcher", word)]
        assert main([*(word.partition(",")[0] for word in words[1:] if word != "-m"), "--cfg", "job"]) == 0
        return
    name, _ = parse(COMMANDS, words[1:])
    assert name == words[1]


# ---- pages and their order


def nav(entry: Any) -> list[str]:
    """The pages that the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in nav(each)]


def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf8"))
    return found


def test_every_page_is_in_the_navigation() -> None:
    assert set(PAGES) <= set(nav(config()["nav"]))


def test_nothing_comes_from_elsewhere_when_it_is_built() -> None:
    assert config()["theme"]["font"] is False
    assert not {"social", "privacy"} & {next(iter(p)) if isinstance(p, dict) else p for p in config()["plugins"]}
    assert all("//" not in name for name in config().get("extra_css", []) + config().get("extra_javascript", []))


def test_no_page_borrows_the_readme() -> None:
    """Marks are for what is made from the source; all else stands on the page itself."""
    texts = {page: (DOCS / page).read_text("utf8") for page in PAGES}
    assert {kind for text in texts.values() for kind in re.findall(r"^<!-- (\w+)", text, re.M)} == {
        "reference", "papers", "messages", "groups", "privates", "end",
    }  # fmt: skip
    # benchmarks/ and examples/ have a README each, which are pages of the site.
    leading = [page for page, text in texts.items() if re.search(r"\]\((?:\.\./)+README\.md", text)]
    assert leading == []


def test_pictures_of_the_pages_are_more_than_a_few_bytes() -> None:
    pictures = {
        (DOCS / page).parent / picture
        for page in PAGES
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", (DOCS / page).read_text("utf8"))
    }
    assert len(pictures) >= 8
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


def test_the_picture_is_drawn() -> None:
    root = ElementTree.parse(DOCS / "pictures" / "round.svg").getroot()
    words = " ".join(" ".join(root.itertext()).split())
    assert all(word in words for word in ("Server", "Client", "Aggregator", "sampler", "server_optimizer"))


# ---- logged names


@cache
def documented() -> frozenset[str]:
    """The names of the page, where {} stands for a part of one's own."""
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "logged-names.md").read_text("utf8"), re.M)
    return frozenset(name for row in rows for name in re.findall(rf"`((?:{NAMESPACES})/[^`]+)`", row))


def is_documented(name: str) -> bool:
    return any(re.fullmatch(re.escape(each).replace(r"\{\}", ".+"), name) for each in documented())


@cache
def names_in_code() -> frozenset[str]:
    """Every string in the source that looks like a logged name, with {} for what is put in."""
    found = set()
    for path in [*(ROOT / "lightning_fedscale").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        tree = ast.parse(path.read_text("utf8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if re.fullmatch(rf"(?:{NAMESPACES})/[\w/{{}}]+", text):
                found.add(text)
    return frozenset(found)


def test_every_logged_name_of_the_code_is_on_the_page() -> None:
    named = documented()
    missing = {name for name in names_in_code() - named if not is_documented(name.replace("{}", "x"))}
    # The statistic of a detector; the page has both that there are.
    assert missing <= {"phase/{}"}, "docs/logged-names.md: add a row"


def test_hydras_groups_are_listed_with_what_each_option_is() -> None:
    options = list(tool("groups").collect())
    assert {"strategy/partitioner", "strategy/aggregator/attack", "callbacks", "law"} <= {
        each.group for each in options
    }
    assert all(len(each.about.split()) >= 3 for each in options)
    assert ("strategy/partitioner", "dirichlet") in {each[:2] for each in options}


def test_the_page_names_nothing_else() -> None:
    known = names_in_code()
    statistics = {f"phase/{name}" for name in ("relative_change", "cumulative_sum")}
    spreads = {
        f"{model}/{{}}/{part}" for model in ("clients", "personal") for part in (*Spread._fields, "worst", "sorted")
    }
    others = {f"{model}/{name}" for model in ("clients", "personal") for name in ("{}", "evaluated")}
    assert documented() - known <= statistics | spreads | others


STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "synchronous": dict,
    "population": lambda: {"population": Population({"phone": 1.0}, batch_size="loader")},
    "asynchronous": lambda: {
        "population": Population({"phone": 1.0}, batch_size="loader"), "mode": "async", "clients_per_round": 2,
    },
    "private": lambda: {"privacy": privacy.dp_fed_avg(1.0, 1.0, delta=1e-3), "client_log_every_n": 2},
}  # fmt: skip


class Validated(reference.Classifier):
    """The reference module with a metric of its own."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("kind", STRATEGIES)
def test_what_a_run_logs_is_on_the_page(kind: str) -> None:
    logger = CSVLogger("logs")
    callbacks = [MaxBatchProbe(budget="1GiB", device_classes=["phone"], apply=False), CriticalPhase(action="observe"),
                 ComputeAccounting(law="Chinchilla", max_flops=1e12), ClientMetrics()]  # fmt: skip
    run = reference.quiet_trainer(
        max_epochs=3, logger=logger, log_every_n_steps=1, callbacks=callbacks,
        strategy=FederatedStrategy(num_clients=6, executor="sequential", **STRATEGIES[kind]()),
    )  # fmt: skip
    data = reference.dataset()
    run.fit(Validated(), reference.loader(data), reference.loader(data, shuffle=False))
    table = Path(logger.log_dir, "metrics.csv").read_text()
    logged = {name for name in table.splitlines()[0].split(",") if re.match(rf"(?:{NAMESPACES})/", name)}
    assert len(logged) > 20
    assert {name for name in logged if not is_documented(name)} == set()


def test_a_round_logs_what_concepts_promises_and_nothing_else() -> None:
    sentence = re.search(r"Every round logs (.*?), whatever", (DOCS / "concepts.md").read_text("utf8"), re.S)
    assert sentence is not None
    promised = {name.removeprefix("round/") for name in re.findall(r"`([\w/]+)`", sentence[1])}
    run = reference.quiet_trainer(max_epochs=1, strategy=FederatedStrategy())
    run.fit(reference.make_module(), reference.loader(reference.dataset()))
    assert promised == {name.removeprefix("round/") for name in run.strategy.last_round.metrics()}  # type: ignore[attr-defined]


# ---- errors and warnings


WRONG: list[Callable[[], Any]] = [
    lambda: FederatedStrategy(num_clients=0),
    lambda: FederatedStrategy(num_clients="ten"),  # type: ignore[arg-type]
    lambda: FederatedStrategy(clients_per_round=1.5),
    lambda: FederatedStrategy(partitioner="dirichlt"),
    lambda: FederatedStrategy(server_optimizer="fed_adam2"),
    lambda: FederatedStrategy(local_steps=3, local_epochs=2),
    lambda: FederatedStrategy(local_rule="scaffold", sampler="poisson", privacy=privacy.dp_fed_avg(1, 1, delta=1e-5)),
    lambda: partitioners.Partition.from_lists([[0, 1], [1]]),
    lambda: partitioners.DirichletPartitioner(10).load_partition(0),
    lambda: aggregators.trimmed_mean(0.7),
    lambda: aggregators.krum(attackers=-1),
    lambda: privacy.dp_fed_avg(clip_norm=1.0, delta=1e-5),
    lambda: privacy.dp_fed_avg(clip_norm=0.0, noise_multiplier=1.0, delta=1e-5),
    lambda: server.chain(),
    lambda: compressors.error_feedback(compressors.error_feedback(compressors.sign())),
    lambda: Population({}),
    lambda: plan(flops=-1.0),
    lambda: ComputeAccounting(law="Chinchila"),
    lambda: CriticalPhase(threshold=-1.0),
    lambda: MaxBatchProbe(budget="much"),
]


@cache
def messages_in_code() -> list[Any]:
    found: list[Any] = tool("messages").collect()
    return found


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_a_user_is_told_is_on_the_page(number: int) -> None:
    messages = messages_in_code()
    with pytest.raises((TypeError, ValueError, AttributeError)) as caught:
        WRONG[number]()
    assert any(message.matches(str(caught.value)) for message in messages), str(caught.value)


def test_the_page_of_messages_is_long_and_each_has_words() -> None:
    messages = messages_in_code()
    assert len(messages) > 300
    assert {"core/options", "core/round", "partitioners", "scaling"} <= {each.room for each in messages}
    assert {"ValueError", "TypeError", "warning"} <= {each.kind for each in messages}
    assert not messages[0].matches("words that nobody says")


def test_papers_of_the_docstrings_are_found() -> None:
    found = {source.name: source.papers for source in tool("papers").collect()}
    assert found["local_rules.scaffold"] == ("1910.06378",)
    assert "2203.15556" in found["scaling.Chinchilla"]


# ---- the site

ROOMS = ["aggregators", "callbacks", "compressors", "devices", "local_rules", "partitioners", "phases", "privacy",
         "samplers", "scaling", "server"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_it_is_built_strictly_and_the_reference_has_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    for room in ROOMS:
        html = (site / "reference" / f"{room}.html").read_text("utf8")
        module = importlib.import_module(f"lightning_fedscale.{room}")
        objects = [name for name in module.__all__ if isinstance(getattr(module, name), type | FunctionType)]
        missing = [name for name in objects if f'id="lightning_fedscale.{room}.{name}"' not in html]
        assert missing == [], room
    errors = (site / "errors.html").read_text("utf8")
    assert "pass an integer of at least" in errors
    assert "fed_adam" in (site / "papers.html").read_text("utf8")
    everything = [path.read_text("utf8") for path in site.rglob("*.html")]
    assert not any(re.search("<!-- (?:messages|papers|groups)", page) for page in everything)
    assert not any(re.search(r'(?:src|rel="stylesheet" href)="https?://', page) for page in everything)
