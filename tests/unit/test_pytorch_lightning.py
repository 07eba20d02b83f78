"""`lightning_fedscale.pytorch_lightning` is the package once more, over Lightning's other package."""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as twin_pl
from lightning.pytorch.demos import boring_classes as boring
from pytorch_lightning.demos import boring_classes as twin_boring

import lightning_fedscale
from lightning_fedscale import callbacks
from lightning_fedscale import pytorch_lightning as twin
from lightning_fedscale.utils.moved import MOVED
from tests.unit import test_imports as parts

ONE = "lightning_fedscale."
OTHER = "lightning_fedscale.pytorch_lightning."


def room_of(module: str) -> str:
    return module.partition(".")[0]


def twins() -> list[str]:
    return [module for module in parts.files() if room_of(module) in twin.KNOW_LIGHTNING]


def dotted(module: str) -> str:
    return module.removesuffix(".__init__")


def test_what_knows_lightning_exists_twice() -> None:
    doors = {"__init__", "cli", "pytorch_lightning"}
    assert set(map(room_of, parts.KNOW_LIGHTNING)) - doors == twin.KNOW_LIGHTNING, "keep the two lists alike"


def test_no_other_part_needs_one_that_exists_twice() -> None:
    for module, path in parts.files().items():
        if room_of(module) in map(room_of, parts.KNOW_LIGHTNING):
            continue
        for name in parts.imports(path.read_text(encoding="utf-8")):
            assert name.removeprefix(ONE).split(".")[0] not in twin.KNOW_LIGHTNING, module


@pytest.mark.parametrize("module", twins())
def test_a_twin_imports_nothing_of_the_other_side(module: str) -> None:
    tree = twin._OtherImports().visit(ast.parse(parts.files()[module].read_text(encoding="utf-8")))
    for name in parts.imports(ast.unparse(tree)):
        assert name.split(".")[0] != "lightning", name
        if name.startswith(ONE) and not name.startswith(OTHER):
            assert name.removeprefix(ONE).split(".")[0] not in twin.KNOW_LIGHTNING, name


@pytest.mark.parametrize("module", twins())
def test_a_twin_has_all_that_the_original_has(module: str) -> None:
    one = importlib.import_module(ONE + dotted(module))
    other = importlib.import_module(OTHER + dotted(module))
    # Put there by pytest, and by Python where a module has warned.
    added = {name for name in (*vars(one), *vars(other)) if name[0] == "@" or name == "__warningregistry__"}
    # And modules of a package that somebody has imported, by their name or by one from before they moved.
    moved = {name.rpartition(".")[2] for name in MOVED}
    added |= {n for side in (one, other) for n in vars(side) if n in moved or f"{side.__name__}.{n}" in sys.modules}
    assert vars(one).keys() - added == vars(other).keys() - added
    assert other.__file__ == one.__file__
    for name, value in vars(one).items():
        if getattr(value, "__module__", "").startswith(ONE) and isinstance(value, type):
            shared = room_of(value.__module__.removeprefix(ONE)) not in twin.KNOW_LIGHTNING
            assert (value is vars(other)[name]) == shared, name


def test_the_front_doors_are_alike() -> None:
    assert set(twin.__all__) == {*lightning_fedscale.__all__, "callbacks"}
    for name in twin.__all__:
        assert hasattr(twin, name)
    assert {*twin.callbacks.__all__} == {*callbacks.__all__}


def test_parts_that_know_no_lightning_are_the_same() -> None:
    from lightning_fedscale import partitioners

    again = importlib.import_module(OTHER + "partitioners.dirichlet")
    assert again is sys.modules[ONE + "partitioners.dirichlet"]
    assert importlib.import_module(OTHER + "partitioners") is partitioners
    assert partitioners.__spec__ is not None
    assert partitioners.__spec__.name == ONE + "partitioners"
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        importlib.import_module(OTHER + "nothing_of_this_name")


def test_each_is_of_its_own_package() -> None:
    assert issubclass(twin.FederatedStrategy, twin_pl.strategies.DDPStrategy)
    assert not issubclass(twin.FederatedStrategy, pl.strategies.DDPStrategy)
    assert issubclass(twin.callbacks.RoundEvents, twin_pl.Callback)
    assert isinstance(twin_pl.Trainer(strategy="federated", accelerator="cpu").strategy, twin.FederatedStrategy)


def test_an_import_without_a_name_cannot_have_a_twin() -> None:
    with pytest.raises(ImportError, match=r"line 1: write `import lightning.pytorch as \.\.\.`"):
        twin._OtherImports().visit(ast.parse("import lightning.pytorch"))


def test_tracebacks_show_the_real_lines() -> None:
    with pytest.raises(ValueError, match="num_clients=0") as caught:
        twin.FederatedStrategy(num_clients=0)
    frames = {(frame.filename, frame.name): frame.line for frame in traceback.extract_tb(caught.tb)}
    (line,) = (line for (file, name), line in frames.items() if file.endswith("strategy.py") and name == "__init__")
    assert line is not None
    assert line == "self._options = checked(given)"


# ---- what does not mix


def quiet(package: Any, **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_a_strategy_in_the_other_trainer_says_where_the_right_one_is() -> None:
    remedy = r"is for lightning\.pytorch; for pytorch_lightning import it from lightning_fedscale\.pytorch_lightning>"
    with pytest.raises(ValueError, match=f"FederatedStrategy {remedy}"):
        quiet(twin_pl, strategy=lightning_fedscale.FederatedStrategy())
    remedy = r"is for pytorch_lightning; for lightning\.pytorch import it from lightning_fedscale>"
    with pytest.raises(ValueError, match=f"FederatedStrategy {remedy}"):
        quiet(pl, strategy=twin.FederatedStrategy())


PROBES: list[Callable[[Any], Any]] = [
    lambda package: package.MaxBatchProbe(budget="1GiB"),
    lambda package: package.CriticalPhase(),
    lambda package: package.ComputeAccounting(),
    lambda package: package.ClientMetrics(),
]


@pytest.mark.parametrize("strategy", ["auto", "federated"])
@pytest.mark.parametrize("make", PROBES, ids=["MaxBatchProbe", "CriticalPhase", "ComputeAccounting", "ClientMetrics"])
def test_a_callback_in_the_other_trainer_says_where_the_right_one_is(make: Callable[[Any], Any], strategy: str) -> None:
    wrong = (
        r"pytorch_lightning import it from lightning_fedscale\.pytorch_lightning\.callbacks|not a Callback of pytorch_"
    )
    with pytest.raises(TypeError, match=wrong):
        quiet(twin_pl, strategy=strategy, callbacks=[make(callbacks)]).fit(twin_boring.BoringModel())
    wrong = r"import it from lightning_fedscale\.callbacks|not a Callback of lightning\.pytorch"
    with pytest.raises(TypeError, match=wrong):
        quiet(pl, strategy=strategy, callbacks=[make(twin.callbacks)]).fit(boring.BoringModel())


def test_lightnings_own_callbacks_of_the_other_package_are_refused() -> None:
    strange = twin_pl.callbacks.EarlyStopping("round/loss")
    with pytest.raises(TypeError, match=r"callbacks: EarlyStopping .*lightning\.pytorch"):
        quiet(pl, strategy="federated", callbacks=[strange]).fit(boring.BoringModel())


@pytest.mark.parametrize(("package", "module"), [(pl, twin_boring.BoringModel), (twin_pl, boring.BoringModel)])
def test_a_module_of_the_other_package_is_refused_by_lightning(package: Any, module: type) -> None:
    with pytest.raises(TypeError, match="Please switch to a single import style"):
        quiet(package, strategy="federated").fit(module())
