"""`ClientMetrics`: how well a model serves each client, on the client's own validation data."""

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
from lightning_fedscale.callbacks.client_metrics.module_copy import Found, ValidationTwin
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

    A good mean may hide clients that are served badly. Every ``every_n_rounds`` rounds your module's own
    ``validation_step``, and the validation hooks around it, run for one client after the other, and what they log per
    epoch, numbers and torchmetrics objects, becomes one value for each client. Logged of each name are, as
    ``clients/NAME/...``, ``mean`` over clients, ``weighted_mean`` (by validation samples), ``worst10`` and ``best10``
    (mean of the worst and of the best tenth of the clients), ``std``, and Jain's fairness index ``jain``
    (`lightning_fedscale.utils.fairness`); ``clients/evaluated`` is how many were. They can be monitored:
    ``ModelCheckpoint(monitor="clients/val_acc/worst10", mode="max")``. TensorBoard also gets a histogram over clients,
    a table of the ten worst, a chart of the mean between both tenths, and in the end a figure of all clients.

    **Whose data.** The Trainer's validation set is divided as the training data are: each client gets of every label
    the share that it has of the training samples, with natural ids the samples of its id. Partitioners that look at no
    label give everyone a random part, as does a `Partition` of data without classes. Clients that get none are left
    out. It is divided once, when training begins.

    **Which model.** The one that the next clients start from; `ServerEMA`'s average is not looked at.

    It costs the forward passes, and memory for a copy of the module, on which all that happens: training goes on bit
    for bit as without this callback. Clients are shared among the ranks, which meet in one collective. Values do not
    depend on their number, on the executor or on interruptions.

    Args:
        every_n_rounds: evaluate after every so many rounds, and after the first one.
        clients: how many are evaluated: None for all, a number, or a fraction in (0, 1]; others every time.
        personal: evaluate what each client has of its own by ``FederatedStrategy(personal=...)`` instead of the global
            model, and log it as ``personal/...``. None does so where layers stay with clients, since the global model
            is not whole there, but not with `Ditto`, whose global model is. Two of these callbacks log both.
        dataloaders: validation data instead of the Trainer's: a loader whose dataset is divided, or one loader for each
            client.
        partitioner: how that dataset is divided instead: a name, a partitioner, or a `Partition` of it.
        lower_is_better: patterns of names (as in a shell, in lower case) of which less is better; of others, more is. A
            torchmetrics object that is logged knows for itself.
        seed: of the choice of clients, of the division, and of what ``validation_step`` draws.

    Attributes:
        last: the `ClientReport` of the last evaluation, with every client's values; None before the first.

    Raises:
        TypeError, ValueError: for arguments that cannot be; before the first round, if there is no data for it.

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
                f"partitioner={partitioner!r} together with a loader for each client, and there is nothing to divide:"
                " leave it out, or pass a single loader."
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
        """Two that evaluate different models keep apart what they save."""
        return self._generate_state_key(personal=self._personal)

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can be seen before there is data."""
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
                " that logs what is to be known of every client."
            )
        if self._personal and strategy.personal is None:
            raise ValueError(
                "personal=True: clients have no models of their own: pass FederatedStrategy(personal=...), or leave it"
                " out to evaluate the global model."
            )
        layers = isinstance(strategy.personal, tuple)
        self._evaluates_personal = layers if self._personal is None else self._personal
        if trainer.global_step == 0:
            self.last = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find every client's data, and go on from the last evaluation if there was one."""
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
        """Evaluate, if it is time."""
        if record.round == 0 or (record.round + 1) % self._every == 0:
            self.last = self._evaluate(trainer, pl_module, record.round)
            self._show(trainer, self.last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last evaluation."""
        if self.last is not None:
            draw_clients(trainer, self.last, self._namespace)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`, which the Trainer leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop worker processes."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all that was found out, and nothing that belongs to a Trainer."""
        return {**vars(self), "_data": None, "_table": None}

    def state_dict(self) -> dict[str, Any]:
        """The last evaluation; the next ones need nothing of those before."""
        return {} if self.last is None else self.last.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
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
            failure = error  # the other ranks wait in the collective: there they are told
        values = self._table.put_together(clients.tolist(), mine, failed=failure is not None)
        if failure is not None:
            raise failure
        if values is None:
            raise RuntimeError(f"ClientMetrics: an exception ended the evaluation of round {round} on another rank.")
        return ClientReport(round, clients, self._data.sizes[clients], values, dict(self._table.higher_is_better))

    def _evaluate_mine(
        self, trainer: pl.Trainer, module: pl.LightningModule, round: int, clients: IntArray
    ) -> dict[int, dict[str, Found]]:
        """What the clients of this rank come to."""
        assert self._data is not None
        strategy, found = trainer.strategy, dict[int, dict[str, Found]]()
        assert isinstance(strategy, FederatedStrategy)
        mine = clients[self._places(strategy, clients) == trainer.global_rank].tolist()
        if not mine:
            return found
        twin, transfer = ValidationTwin(trainer, module), Transfer(trainer)
        listeners = [
            hook
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if (hook := getattr(callback, "on_client_evaluation", None)) is not None
        ]

        def tell(batch: Any) -> AbstractContextManager[Any]:
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
                twin.load(own)
            ready = (batch if batch is None else transfer(batch) for batch in batches)
            try:
                found[work.client] = twin.evaluate(ready, tell)
            except Exception as error:
                if work.held > 1:
                    raise
                self._leave_out(work.client, error)
                twin = ValidationTwin(trainer, module)  # nothing of what the step had begun
        return found

    def _leave_out(self, client: int, error: Exception) -> None:
        """A module need not stand a batch of one, which the Trainer's own validation may never have."""
        if (reason := type(error).__name__) not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"ClientMetrics: client {client} has a single validation sample, on which validation_step raised"
                f" {reason}: {error}. Clients like it are left out; pass partitioner= to give each more samples.",
                stacklevel=2,
            )

    def _choose(self, round: int) -> IntArray:
        """Who is evaluated, ascending."""
        assert self._data is not None
        there = self._data.sizes.nonzero()[0]
        if self._wanted is None:
            return there
        count = self._wanted if isinstance(self._wanted, int) else max(1, int(self._wanted * len(there) + 0.5))
        generator = randomness.generator(self._seed, randomness.EVALUATION, round)
        return np.sort(generator.choice(there, count, replace=False))

    def _places(self, strategy: FederatedStrategy, clients: IntArray) -> IntArray:
        """The rank that evaluates each client; where a client has a model of its own, the one that holds it."""
        assert self._data is not None
        ranks = place_longest_first(self._data.sizes[clients], collectives.world_size())
        if self._evaluates_personal:
            held = [strategy.holder_of(client) for client in clients.tolist()]
            ranks = np.array([rank if at is None else at for rank, at in zip(ranks.tolist(), held, strict=True)])
        return ranks

    def _is_higher_better(self, name: str, known: bool | None) -> bool:
        return not any(fnmatchcase(name.lower(), pattern) for pattern in self._less) if known is None else known

    # ---- showing it

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
            "partitioner: seed=None divides the data differently on every rank and after every restart: give it a"
            " number."
        )
