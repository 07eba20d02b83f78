"""Messages of `FederatedStrategy` itself."""

from __future__ import annotations

from lightning_fedscale import FederatedStrategy
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: FederatedStrategy().population_table(),
        RuntimeError,
        "population_table is known once fit has begun with FederatedStrategy(population=...).",
    ),
    Row(
        lambda: FederatedStrategy().divide_alike([0, 1]),
        RuntimeError,
        "divide_alike: the clients' training data is known only once fit has begun: call it then.",
    ),
    Row(
        lambda: FederatedStrategy().personal_model(0),
        ValueError,
        "personal_model: clients have no personal models: pass FederatedStrategy(personal=...).",
    ),
    Row(
        lambda: FederatedStrategy(personal=["head.*"]).personal_model(0),
        RuntimeError,
        "personal_model: clients have personal models only once fit has begun: call it then.",
    ),
    Row(
        lambda: FederatedStrategy.register(" "),
        TypeError,
        "name=' ': pass a name for Trainer(strategy=...), such as 'fed5'.",
    ),
    Row(
        lambda: FederatedStrategy.register("auto"),
        ValueError,
        "name='auto' already names a strategy: choose another name.",
    ),
    Row(
        lambda: FederatedStrategy.register("ddp"),
        ValueError,
        "name='ddp' already names a strategy: choose another name, or pass override=True.",
    ),
]
