"""`ClientMetrics`: evaluate a model on each client's own validation data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedscale.callbacks.client_metrics.data import Loaders, OwnData, own_data
from lightning_fedscale.callbacks.client_metrics.module_copy import Found, ValidationCopy
from lightning_fedscale.callbacks.client_metrics.report import ClientReport, draw_clients, lay_out_clients, show_clients
from lightning_fedscale.callbacks.client_metrics.table import ClientTable
from lightning_fedscale.core.executors import Transfer
from lightning_fedscale.core.lightning.loggers import publish, send
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.core.plan import place_longest_first
from lightning_fedscale.partitioners import Partition, Partitioner
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import IntArray, RoundRecord
from lightning_fedscale.utils import checks, collectives, randomness

_LESS_IS_BETTER = ("*loss*", "*err*", "*mse*", "*mae*", "*perplexity*", "*nll*")


class ClientMetrics(Callback):
    """Evaluates the global model, or every client's personal one, on the clients' own validation data.

    A good mean may hide poorly served clients. Every ``every_n_rounds`` rounds, your module's own ``validation_step``
    and the validation hooks around it run for each client separately. The numbers and torchmetrics objects that they
    log per epoch become one value for each client. For each name, ``clients/NAME/...`` logs the ``mean`` over clients,
    ``weighted_mean`` (by validation samples), ``worst10`` and ``best10`` (mean of the worst and of the best tenth of
    the clients), ``std``, and Jain's fairness index ``jain`` (`lightning_fedscale.utils.fairness`);
    ``clients/evaluated`` is the number of evaluated clients. They can be monitored:
    ``ModelCheckpoint(monitor="clients/val_acc/worst10", mode="max")``. TensorBoard also gets a histogram over clients,
    a table of the ten worst, a chart of the mean between both tenths, and at the end a figure of all clients.

    **Data.** The Trainer's validation set is divided like the training data: of every label, each client gets the same
    fraction as of the training samples; with natural ids it gets the samples of its id. Partitioners that use no labels
    give each client a random part, as does a `Partition` of data without classes. Clients without samples are left out.
    The set is divided once, when training begins.

    **Model.** The global model from which the next clients start is evaluated, not the average of `ServerEMA`.

    Evaluation costs the forward passes, and memory for a copy of the module. It runs on this copy and does not affect
    training: results are bit-identical with and without it. The clients are distributed over the ranks, which need one
    collective. Values do not depend on the number of ranks, the executor or interruptions.

    Args:
        every_n_rounds: evaluate after every so many rounds, and after the first one.
        clients: clients to evaluate: None for all; a number, or a fraction in (0, 1], of clients drawn every time.
        personal: evaluate each client's personal model, by ``FederatedStrategy(personal=...)``, instead of the global
            model, and log it as ``personal/...``. None does so if layers stay with clients, since the global model is
            then incomplete, but not with `Ditto`, whose global model is complete. Two of these callbacks log both.
        dataloaders: validation data instead of the Trainer's: a loader whose dataset is divided, or one loader for each
            client.
        partitioner: another way to divide that dataset: a name, a partitioner, or a `Partition` of it.
        lower_is_better: patterns of names (as in a shell, in lower case) whose lower values are better; for others,
            higher ones are. A logged torchmetrics object decides for itself.
        seed: seed of the selection of clients, of the partition, and of random numbers in ``validation_step``.

    Attributes:
        last: the `ClientReport` of the last evaluation, with every client's values; None before the first.

    Raises:
        TypeError, ValueError: for invalid arguments; before the first round, if there is no data to evaluate on.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_fedscale.callbacks import ClientMetrics
        >>> class Model(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.step(batch))
        >>> watch = ClientMetrics()
        >>> trainer = pl.Trainer(strategy=FederatedStrategy(num_clients=4), max_epochs=2, callbacks=[watch],
        ...                      accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Model())
        >>> watch.last.clients.tolist(), watch.last.samples.tolist()
        ([0, 1, 2, 3], [16, 16, 16, 16])
        >>> sorted(name for name in trainer.callback_metrics if name.startswith("clients/val_loss/"))
        ['clients/val_loss/best10', 'clients/val_loss/jain', 'clients/val_loss/mean', 'clients/val_loss/std',
         'clients/val_loss/weighted_mean', 'clients/val_loss/worst10']
    """

    def __init__(
        self,
        every_n_rounds: int = 1,
        clients: int | float | None = None,
        personal: bool | None = None,
        dataloaders: Loaders | None = None,
        partitioner: str | Partitioner | Partition | None = None,
        lower_is_better: Sequence[str] = _LESS_IS_BETTER,
        seed: int = 0,
    ) -> None:
        self._every = checks.integer("every_n_rounds", every_n_rounds)
        self._wanted = _checked_clients(clients)
        if personal not in (None, True, False):
            raise TypeError(f"personal={personal!r}: pass True, False or None.")
        self._personal = personal
        if partitioner is not None and isinstance(dataloaders, list | tuple):
            raise ValueError(
                f"partitioner={partitioner!r}: with a loader for each client there is nothing to divide: leave it out,"
                " or pass a single loader in dataloaders=."
            )
        _check_partitioner(partitioner)
        self._loaders = dataloaders
        self._partitioner = partitioner
        if isinstance(lower_is_better, str) or not all(isinstance(each, str) for each in lower_is_better):
            raise TypeError(f"lower_is_better={lower_is_better!r}: pass a list of patterns, such as ['*loss*'].")
        self._less = [pattern.lower() for pattern in lower_is_better]
        self._seed = checks.integer("seed", seed, minimum=0)
        self._data: OwnData | None = None
        self._table: ClientTable | None = None
        self._evaluates_personal = False
        self._laid_out: set[str] = set()
        self._warned: set[str] = set()
        self.last: ClientReport | None = None

    @property
    def state_key(self) -> str:
        """Key of the saved state; it differs between callbacks that evaluate different models."""
        facts = {"personal": self._personal}
        return f"{type(self).__qualname__}{facts}"

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse invalid combinations that are known before there is data."""
        check_package(self, trainer)
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, FederatedStrategy):
            raise TypeError(
                f"ClientMetrics evaluates clients, but strategy={type(strategy).__name__} has none: pass"
                " Trainer(strategy=FederatedStrategy(...))."
            )
        if not is_overridden("validation_step", pl_module):
            raise ValueError(
                f"ClientMetrics runs the module's validation_step, and {type(pl_module).__name__} has none: add one"
                " that logs the metrics of a client."
            )
        if self._personal and strategy.personal is None:
            raise ValueError(
                "personal=True: clients have no personal models: pass FederatedStrategy(personal=...), or leave it out"
                " to evaluate the global model."
            )
        layers = isinstance(strategy.personal, tuple)
        self._evaluates_personal = layers if self._personal is None else self._personal
        if trainer.global_step == 0:
            self.last = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find every client's data, and publish the last evaluation of a resumed run."""
        self._data = own_data(trainer, self._loaders, self._partitioner, self._seed)
        self._table = ClientTable(self._is_higher_better, trainer.strategy.root_device)
        self._laid_out, self._warned = set(), set()
        there = int((self._data.sizes > 0).sum())
        if isinstance(self._wanted, int) and self._wanted > there:
            raise ValueError(
                f"ClientMetrics: clients={self._wanted} is more than the {there} that have validation samples: lower"
                " it, or leave it out to take all."
            )
        if self.last is not None:
            publish(trainer, self.last.metrics(self._namespace))

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Evaluate if the round is due."""
        if record.round == 0 or (record.round + 1) % self._every == 0:
            self.last = self._evaluate(trainer, pl_module, record.round)
            self._show(trainer, self.last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last evaluation."""
        if self.last is not None:
            draw_clients(trainer, self.last, self._namespace)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop worker processes."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: all results, but nothing that belongs to a Trainer."""
        return {**vars(self), "_data": None, "_table": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the last evaluation; further evaluations do not depend on earlier ones."""
        return {} if self.last is None else self.last.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.last = ClientReport.from_state(state_dict) if state_dict else None

    # ---- an evaluation

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, round: int) -> ClientReport:
        assert self._data is not None
        assert self._table is not None
        clients = self._choose(round)
        mine: dict[int, dict[str, Found]] = {}
        failure: Exception | None = None
        try:
            with randomness.untouched():
                mine = self._evaluate_mine(trainer, module, round, clients)
        except Exception as error:
            failure = error  # the other ranks wait in the collective, where they learn of it
        values = self._table.put_together(clients.tolist(), mine, failed=failure is not None)
        if failure is not None:
            raise failure
        if values is None:
            raise RuntimeError(f"ClientMetrics: an exception ended the evaluation of round {round} on another rank.")
        return ClientReport(round, clients, self._data.sizes[clients], values, dict(self._table.higher_is_better))

    def _evaluate_mine(
        self, trainer: pl.Trainer, module: pl.LightningModule, round: int, clients: IntArray
    ) -> dict[int, dict[str, Found]]:
        """Evaluate the clients of this rank."""
        assert self._data is not None
        strategy, found = trainer.strategy, dict[int, dict[str, Found]]()
        assert isinstance(strategy, FederatedStrategy)
        mine = clients[self._places(strategy, clients) == trainer.global_rank].tolist()
        if not mine:
            return found
        model, transfer = ValidationCopy(trainer, module), Transfer(trainer)
        listeners = [
            hook
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if (hook := getattr(callback, "on_client_evaluation", None)) is not None
        ]

        def announce(batch: Any) -> AbstractContextManager[Any]:
            around = ExitStack()
            for hook in listeners:
                if isinstance(context := hook(trainer, batch), AbstractContextManager):
                    around.enter_context(context)
            return around

        for work, batches in self._data.of(mine, round):
            randomness.seed_globals(work.seed, strategy.root_device)
            if self._evaluates_personal:
                own = strategy.personal_model(work.client)
                assert own is not None
                model.load(own)
            ready = (batch if batch is None else transfer(batch) for batch in batches)
            try:
                found[work.client] = model.evaluate(ready, announce)
            except Exception as error:
                if work.num_samples > 1:
                    raise
                self._leave_out(work.client, error)
                model = ValidationCopy(trainer, module)  # a new copy, since the failed step may have changed this one
        return found

    def _leave_out(self, client: int, error: Exception) -> None:
        """Warn that a client is left out: its only sample is a batch of one, which a module need not support."""
        if (reason := type(error).__name__) not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"ClientMetrics: client {client} has a single validation sample, on which validation_step raised"
                f" {reason}: {error}. Clients like it are left out; pass partitioner= to give each more samples.",
                stacklevel=2,
            )

    def _choose(self, round: int) -> IntArray:
        """Return the clients to evaluate, ascending."""
        assert self._data is not None
        there = self._data.sizes.nonzero()[0]
        if self._wanted is None:
            return there
        count = self._wanted if isinstance(self._wanted, int) else max(1, int(self._wanted * len(there) + 0.5))
        generator = randomness.generator(self._seed, randomness.EVALUATION, round)
        return np.sort(generator.choice(there, count, replace=False))

    def _places(self, strategy: FederatedStrategy, clients: IntArray) -> IntArray:
        """Return the rank that evaluates each client: for personal models, the rank that holds the client's model."""
        assert self._data is not None
        ranks = place_longest_first(self._data.sizes[clients], collectives.world_size())
        if self._evaluates_personal:
            holders = [strategy.holder_of(client) for client in clients.tolist()]
            ranks = np.array([rank if at is None else at for rank, at in zip(ranks.tolist(), holders, strict=True)])
        return ranks

    def _is_higher_better(self, name: str, known: bool | None) -> bool:
        return not any(fnmatchcase(name.lower(), pattern) for pattern in self._less) if known is None else known

    # ---- display

    @property
    def _namespace(self) -> str:
        return "personal" if self._evaluates_personal else "clients"

    def _show(self, trainer: pl.Trainer, report: ClientReport) -> None:
        send(trainer, report.metrics(self._namespace))
        show_clients(trainer, report, self._namespace)
        if self._laid_out != report.values.keys():
            lay_out_clients(trainer, report, self._namespace)
            self._laid_out = set(report.values)
        for metric, values in report.values.items():
            if (spoilt := ~np.isfinite(values)).any() and metric not in self._warned:
                self._warned.add(metric)
                names = ", ".join(map(str, report.clients[spoilt][:10].tolist()))
                rank_zero_warn(
                    f"ClientMetrics: {spoilt.sum()} of {len(values)} clients have no finite {metric!r} ({names}"
                    f"{', ...' if spoilt.sum() > 10 else ''}) and are left out of clients' mean and spread."
                )


def _checked_clients(clients: Any) -> int | float | None:
    if clients is None:
        return None
    if isinstance(clients, float):
        if not 0 < clients <= 1:
            raise ValueError(f"clients={clients}: pass a fraction in (0, 1], a number of clients, or None for all.")
        return clients
    return checks.integer("clients", clients)


def _check_partitioner(partitioner: Any) -> None:
    if partitioner is None or isinstance(partitioner, Partition):
        return
    if not isinstance(partitioner, str | Partitioner):
        raise TypeError(
            f"partitioner={partitioner!r}: pass a name, a Partitioner or a Partition of the validation data."
        )
    if getattr(partitioner, "seed", 0) is None:
        raise ValueError(
            "partitioner: seed=None divides the data differently on every rank and after every restart: pass a"
            " partitioner with a number as its seed."
        )
